"""The formats that hold arrays and nothing else: .npz and .safetensors."""

import json
import math
import re
from pathlib import Path

import numpy as np
import safetensors

from shiftnet.interchange.limits import MAX_DIMS, MAX_HEADER, MAX_TENSORS, Refusal, joined, short
from shiftnet.interchange.tensors import Storage, Tensor, array, elements
from shiftnet.interchange.zips import Zip

# The header of an .npy file is a Python dictionary, but NumPy and all who write for it write just
# this (Python 2 with an L after large integers), so that nothing needs to be evaluated. Source:
# `numpy/lib/format.py`.
_NPY = re.compile(
    rb"\{'descr': '([<>|=][a-zA-Z]\d{0,3})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,12}L?(?:, ?|(?=\))))*)\),? ?\}\s*"
)
_NPY_TYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}

_SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_npz(archive: Zip) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, in its order.

    Not by `np.load`, which makes an array of the size that a header claims before it looks how
    much there is.

    Raises:
      Refusal: for anything but arrays of numbers.
    """
    if len(archive.sizes) > MAX_TENSORS:
        raise Refusal(f"it holds more than {MAX_TENSORS} arrays")
    arrays = {}
    for member in archive.sizes:
        if not member.endswith(".npy"):
            raise Refusal(f"expected .npy members, found {short(member)}")
        name = joined("", member.removesuffix(".npy"))
        arrays[name] = _npy(name, archive.read(member))
    return arrays


def comment(archive: Zip) -> dict[str, object]:
    """What an .npz file says beside its arrays: a JSON object of texts in the archive's comment."""
    try:
        facts = json.loads(archive.comment)
    except (ValueError, RecursionError):  # none, or one of another kind
        return {}
    texts = facts.items() if isinstance(facts, dict) else ()
    return {name: text for name, text in texts if isinstance(text, str)}


def _npy(name: str, data: bytes) -> np.ndarray:
    version = data[6:7]
    width = 2 if version == b"\x01" else 4  # bytes of the header's length
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if data[:6] != b"\x93NUMPY" or version not in (b"\x01", b"\x02", b"\x03"):
        raise Refusal(f"array {short(name)} does not start as .npy files do")
    if b"'|O" in data[:200]:
        raise Refusal(f"array {short(name)} holds pickled objects, expected numbers")
    header = _NPY.fullmatch(data, 8 + width, start)
    if header is None or header[1][1:].decode() not in _NPY_TYPES:
        raise Refusal(f"array {short(name)} is not described as an array of numbers")
    shape = tuple(int(part) for part in re.findall(rb"\d+", header[3]))
    layout = np.dtype(header[1].decode())
    size = elements(shape) * layout.itemsize
    if len(shape) > MAX_DIMS or size != len(data) - start:
        raise Refusal(
            f"array {short(name)} of shape {shape[:MAX_DIMS]} must take {size} bytes, "
            f"found {len(data) - start}"
        )
    is_bool = layout.kind == "b"  # of which a byte may have any value
    values = np.frombuffer(data, "u1" if is_bool else layout, offset=start)
    values = values.reshape(shape, order="F" if header[2] == b"True" else "C")
    return values != 0 if is_bool else values.astype(layout.newbyteorder("="), order="C")


def read_safetensors(path: Path, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a .safetensors file in the order of their data, and its metadata.

    The format's own library checks that shapes, types and places fit together. This gives it no
    more than it can read in a moment, and makes the arrays, because it knows no bfloat16 in NumPy.

    Args:
      path: where the file is.
      data: all its bytes.

    Raises:
      Refusal: for anything but arrays of numbers that fill the file.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise Refusal(f"its header claims {length} bytes, expected at most {MAX_HEADER}")
    try:
        with safetensors.safe_open(path, "np") as file:
            order, facts = file.offset_keys(), file.metadata() or {}
        found = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise Refusal(f"it is no sound .safetensors file: {short(str(error))}") from None
    if len(order) > MAX_TENSORS:
        raise Refusal(f"it holds more than {MAX_TENSORS} arrays")
    return {joined("", name): _tensor(name, **found[name]) for name in order}, facts


def _tensor(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype not in _SAFETENSORS_TYPES:
        raise Refusal(f"tensor {short(name)} is of type {short(dtype)}")
    if len(shape) > MAX_DIMS:
        raise Refusal(f"tensor {short(name)} has {len(shape)} dimensions, expected {MAX_DIMS}")
    storage = Storage(name, _SAFETENSORS_TYPES[dtype], elements(tuple(shape)))
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return array(Tensor(storage, 0, tuple(shape), strides), memoryview(data))
