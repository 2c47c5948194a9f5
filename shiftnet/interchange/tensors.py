"""Storages and tensors as pickles describe them, and the arrays they become.

Until an array is asked for, a tensor is a few numbers. The names and the order of the arguments
are those of PyTorch's `torch/_utils.py` (0.2 to 2.x).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np

from shiftnet.interchange.limits import MAX_DIMS, Refusal, short
from shiftnet.interchange.pickles import Call, Global, Inert

# The names of types of storage, for the CPU in `torch`, for GPUs in `torch.cuda`.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# Of types that came later; the tensor names its own, see `_rebuild_tensor_v3`.
_UNTYPED = "torch.storage.UntypedStorage"

# How the elements lie in a file, little-endian. bfloat16 is the upper half of a float32, and a byte
# that stands for a bool may have any value.
LAYOUTS = {
    name: np.dtype({"bfloat16": "<u2", "bool": "u1"}.get(name, name)) for name in _STORAGES.values()
}


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A run of `count` elements, from `start` on, of what a file keeps under `key`."""

    key: str
    kind: str  # a key of LAYOUTS
    count: int
    start: int = 0

    @property
    def bytes(self) -> int:
        return self.count * LAYOUTS[self.kind].itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; all counts are in elements, and lie inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes its array takes."""
        bytes_each = 4 if self.storage.kind == "bfloat16" else LAYOUTS[self.storage.kind].itemsize
        return math.prod(self.shape) * bytes_each


_ENOUGH = 2**48  # elements, more than any file has; and NumPy can still count their bytes


def is_count(value: object) -> bool:
    """Whether this can be a number of elements."""
    return type(value) is int and 0 <= value < _ENOUGH


def elements(shape: tuple[int, ...]) -> int:
    """How many elements an array of this shape has.

    Raises:
      Refusal: where the sizes that are not 0 are too large, which troubles NumPy even in an empty
        array.
    """
    if math.prod(size for size in shape if size) >= _ENOUGH:
        raise Refusal(f"it has a tensor of shape {shape[:MAX_DIMS]}")
    return math.prod(shape)


def storage(identity: tuple, whole: Callable[[Storage], None]) -> Storage:
    """The storage of a persistent id: `("storage", type, key, location, count[, view])`.

    The location, a device, does not matter here. A view, which the zip format has no more, is
    `None` or `(key, start, count)`, and then the count before it is that of the whole storage.

    Args:
      identity: the persistent id.
      whole: told of the whole storage.
    """
    if len(identity) not in (5, 6):
        raise Refusal(f"it describes a storage by {len(identity)} values, expected 5 or 6")
    _, kind, key, _, count = identity[:5]
    package, _, name = kind.name.rpartition(".") if isinstance(kind, Global) else ("", "", "")
    if isinstance(kind, Global) and kind.name == _UNTYPED:
        package, name = "torch", "ByteStorage"
    if package not in ("torch", "torch.cuda") or name not in _STORAGES:
        raise Refusal(f"it has a storage of type {short(getattr(kind, 'name', kind))}")
    if not isinstance(key, str) or not is_count(count):
        raise Refusal(f"it has a storage with the key {short(key)} and no proper count of elements")
    result = Storage(key, _STORAGES[name], count)
    whole(result)
    if len(identity) == 5 or identity[5] is None:
        return result
    view = identity[5]
    if not (isinstance(view, tuple) and len(view) == 3 and all(map(is_count, view[1:]))):
        raise Refusal(f"it has an improper view of storage {short(key)}")
    if view[1] + view[2] > count:
        raise Refusal(f"it has a view that leaves storage {short(key)} of {count} elements")
    return Storage(key, result.kind, view[2], view[1])


def _tensor(of: object, offset: object, shape: object, strides: object) -> Tensor:
    """Checks that every element of the view lies inside its storage.

    Raises:
      Refusal: where one does not, or the numbers are none.
    """
    if not isinstance(of, Storage):
        raise Refusal("it has a tensor without a storage")
    name = f"a tensor of storage {short(of.key)}"
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise Refusal(f"{name} has no proper shape")
    if len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise Refusal(
            f"{name} has {len(shape)} dimensions and {len(strides)} strides, "
            f"expected as many, and at most {MAX_DIMS}"
        )
    if not all(map(is_count, (offset, *shape, *strides))):
        raise Refusal(f"{name} has an offset, a shape or strides that are no proper counts")
    first = cast(int, offset)
    empty = elements(shape) == 0
    last = first if empty else first + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
    if last >= of.count + empty:  # an empty one may start at the end
        raise Refusal(f"{name} reaches element {last}, but the storage has {of.count}")
    return Tensor(of, first, shape, strides)


def _rebuild_tensor(arguments: tuple) -> Tensor:
    """`(storage, offset, shape, strides, ...)`; what follows is for gradients and hooks."""
    if not 4 <= len(arguments) <= 7:
        raise Refusal(f"it describes a tensor by {len(arguments)} values, expected 4 to 7")
    return _tensor(*arguments[:4])


def _rebuild_tensor_v3(arguments: tuple) -> Inert:
    """`(storage, offset, shape, strides, requires_grad, hooks, dtype, ...)`, for newer types."""
    kind = arguments[6] if len(arguments) > 6 else None
    if not isinstance(kind, Global):
        raise Refusal("it has a tensor without a type")
    return Inert(f"tensor of {kind.name}")


def _parameter(arguments: tuple) -> Tensor:
    """`(tensor, ...)`: a parameter is its tensor."""
    if not arguments or not isinstance(arguments[0], Tensor):
        raise Refusal("it has a parameter without a tensor")
    return arguments[0]


def _size(arguments: tuple) -> tuple:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple):
        raise Refusal("it has a torch.Size that is no tuple")
    return arguments[0]


# What the pickles of PyTorch may call, for `pickles.Machine`.
CALLS: Mapping[str, Call] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.autograd.variable.Variable": _parameter,
    "torch.Size": _size,
    "torch.device": lambda arguments: None,
    # An object that modules had until PyTorch 1.1.
    "torch.nn.backends.thnn._get_thnn_function_backend": lambda arguments: None,
}


def array(tensor: Tensor, data: memoryview) -> np.ndarray:
    """A copy of the tensor's elements in C order; bfloat16 becomes float32.

    Args:
      tensor: what to take.
      data: all bytes of its whole storage.
    """
    kind, first = tensor.storage.kind, tensor.storage.start + tensor.offset
    layout = LAYOUTS[kind]
    strides = [stride * layout.itemsize for stride in tensor.strides]
    if 0 in tensor.shape:
        result = np.empty(tensor.shape, layout)
    else:
        result = np.lib.stride_tricks.as_strided(
            np.frombuffer(data, layout)[first:], tensor.shape, strides, writeable=False
        ).copy(order="C")
    if kind == "bfloat16":
        wide = result.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return result != 0 if kind == "bool" else result
