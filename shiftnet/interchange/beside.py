"""Values that stand beside a network in checkpoints: dates, paths, NumPy's numbers and arrays.

None of them is part of a network, so nothing of them is kept but the name of their class; a NumPy
scalar becomes a number, since accuracies are often one. As everywhere here, no function that a file
names is called: each name in `CALLS` has a function of ours.
"""

from collections.abc import Mapping

import numpy as np

from shiftnet.interchange.limits import Refusal
from shiftnet.interchange.pickles import Call, Global, Inert

# NumPy 2 renamed the package that its pickles name.
_CORE = ("numpy.core", "numpy._core")

_SCALARS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


def _inert(name: str) -> Call:
    return lambda arguments: Inert(name)


def _encode(arguments: tuple) -> bytes:
    """`_codecs.encode(text, "latin1")`: how protocols 0 to 2 write bytes in Python 3."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
        raise Refusal("it asks to run _codecs.encode for something else than bytes")
    try:
        return arguments[0].encode("latin-1")
    except UnicodeEncodeError:
        raise Refusal("it holds bytes that are none") from None


def _bytes(arguments: tuple) -> bytes:
    """`bytes()`, which is how those protocols write none."""
    if arguments:
        raise Refusal("it asks to run builtins.bytes")
    return b""


def _dtype(arguments: tuple) -> Inert:
    if not arguments or not isinstance(arguments[0], str):
        raise Refusal("it has a numpy.dtype without a name")
    return Inert(f"numpy.dtype.{arguments[0]}")


def _scalar(arguments: tuple) -> object:
    """`scalar(dtype, bytes)`: the number, or nothing but its class where it is of another kind."""
    kind, data = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(kind, Inert) or not kind.type_name.startswith("numpy.dtype."):
        raise Refusal("it has a NumPy scalar without a dtype")
    code = kind.type_name.removeprefix("numpy.dtype.")
    order = kind.state[1:2] if isinstance(kind.state, tuple) else ()
    if code not in _SCALARS or order not in (("<",), ("|",)) or not isinstance(data, bytes):
        return Inert("numpy.generic")
    if len(data) != int(code[1:]):
        raise Refusal(f"it has a NumPy scalar of type {code} in {len(data)} bytes")
    if code == "b1":  # a byte that stands for a bool may have any value
        return data != b"\0"
    return np.frombuffer(data, f"<{code}")[0].item()


def _array(arguments: tuple) -> Inert:
    """`_reconstruct(numpy.ndarray, (0,), b"b")`; what BUILD brings later is not looked at."""
    if not arguments or arguments[0] != Global("numpy.ndarray"):
        raise Refusal("it asks to run numpy.core.multiarray._reconstruct of another class")
    return Inert("numpy.ndarray")


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_INERT = (
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in _PATHS),
    *(f"datetime.{kind}" for kind in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{kind}" for kind in ("bytearray", "complex", "frozenset", "range", "slice")),
    *("decimal.Decimal", "fractions.Fraction", "random.Random", "types.SimpleNamespace"),
    *(f"numpy.random._pickle.__{kind}_ctor" for kind in ("randomstate", "generator")),
    *("numpy.random._pickle.__bit_generator_ctor", "numpy.random.__RandomState_ctor"),
)

# For `pickles.Machine`, beside those of `tensors.py`.
CALLS: Mapping[str, Call] = {
    **{name: _inert(name) for name in _INERT},
    **{f"{core}.multiarray._reconstruct": _array for core in _CORE},
    **{f"{core}.multiarray.scalar": _scalar for core in _CORE},
    **{f"{core}.numeric._frombuffer": _inert("numpy.ndarray") for core in _CORE},
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "builtins.bytes": _bytes,
    # A list of ours, to which the elements are appended.
    "collections.deque": lambda arguments: [],
}
