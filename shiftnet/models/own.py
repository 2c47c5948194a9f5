"""Networks of a user's own files: `model.arch = "my_file.py:Net"`.

Code of a file runs only after `allow`, which commands call with what their user typed; what a
checkpoint says is never enough.
"""

import inspect
import os
import re
import sys
import traceback
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.files import path_of
from shiftnet.models.network import Network

_allowed: list[type[nnx.Module]] = []  # the last one counts


def is_own(arch: str) -> bool:
    """Tells whether an architecture's name is that of a file and a class in it."""
    return re.fullmatch(r".+\.py:\w+", arch) is not None


def allow(network: str | type[nnx.Module]) -> None:
    """Lets networks be built that are not this package's.

    Args:
      network: the class, or `"FILE.py:CLASS"`; the file is run.

    Raises:
      UserError: if there is no such file or class, or running the file raises.
    """
    if isinstance(network, str):
        if not is_own(network):
            raise UserError(f"expected FILE.py:CLASS for a network of your own, found {network!r}")
        network = _class_of(*network.rsplit(":", 1))
    _allowed.append(network)


class OwnNetwork(Network):
    """A network of the user's own class, with the interface of this package's networks.

    The class takes `rngs`, and what it wants of `num_classes`, `weights` (a name), `bits` and
    `dtype`, by keyword. Calling it on `[N, H, W, 3]` returns logits. It is told `train` where it
    takes that; otherwise `train()` or `eval()` of the network is called before.

    Attributes:
      net: the network.
    """

    first_and_last = ("", "")  # not known

    def __init__(self, net: nnx.Module, dtype: jnp.dtype | None):
        super().__init__(dtype)
        self.net = net
        self.takes_train = "train" in inspect.signature(type(net).__call__).parameters

    def set_mode(self, *, train: bool) -> None:
        if not self.takes_train:
            (self.net.train if train else self.net.eval)()

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.net(x, train=train) if self.takes_train else self.net(x)


def build(
    arch: str, num_classes: int, *, weights: str, bits: int, dtype: str, rngs: nnx.Rngs
) -> OwnNetwork:
    """Builds the allowed network.

    Args:
      arch: the name in the recipe; a class that was allowed is built whatever its file.
      num_classes, weights, bits, dtype, rngs: what the class may take.

    Raises:
      UserError: if none is allowed, or the class needs other arguments, raises, takes no `weights`
        when they are not float, or keeps other state than parameters and batch statistics.
    """
    if not _allowed:
        raise UserError(
            f"the network is {arch}, a file whose code is not run unless you name it: "
            f"--network {arch}"
        )
    kind = _allowed[-1]
    own_dtype = None if dtype == "float32" else jnp.dtype(dtype)
    offered = {
        "num_classes": num_classes,
        "weights": weights,
        "bits": bits,
        "dtype": own_dtype,
        "rngs": rngs,
    }
    parameters = inspect.signature(kind.__init__).parameters  # nnx.Module's own takes anything
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {name: value for name, value in offered.items() if any_keyword or name in parameters}
    if weights != "float" and "weights" not in given:
        raise UserError(
            f"{kind.__name__} takes no argument weights, and model.weights is {weights}"
        )
    try:
        net = kind(**given)
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, inspect.getfile(kind))
        raise UserError(f"{kind.__name__}({', '.join(given)}) raises {reason}") from error
    states = {type(leaf) for _, leaf in nnx.to_flat_state(nnx.state(net))}
    strange = {one.__name__ for one in states if not issubclass(one, nnx.Param | nnx.BatchStat)}
    if strange:
        raise UserError(
            f"{kind.__name__} keeps {', '.join(sorted(strange))} (as dropout does); expected "
            "parameters (nnx.Param) and batch statistics (nnx.BatchStat) only"
        )
    return OwnNetwork(net, own_dtype)


def _class_of(file: str, name: str) -> type[nnx.Module]:
    path = os.fspath(path_of(file, "model.arch"))
    module = types.ModuleType("shiftnet_own_network")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses look up a module's names
    folder, before = os.path.dirname(os.path.abspath(path)), list(sys.path)
    sys.path.insert(0, folder)
    try:
        with open(path, "rb") as opened:
            exec(compile(opened.read(), path, "exec", dont_inherit=True), module.__dict__)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:
        raise UserError(f"{path} raises {_reason(error, path)}") from error
    finally:
        sys.path[:] = before
    found: Any = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise UserError(f"{path} has no class {name} that is an nnx.Module")
    return found


def _reason(error: Exception, file: str) -> str:
    """Returns an exception in one line, with the last line of the user's file that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
