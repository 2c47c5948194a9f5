"""Convolutions on a CPU, computed by `conv.cc`."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import native
from shiftnet.kernels.operation import Relu


def unsupported(
    x: jax.Array,
    w: jax.Array,
    packed: jax.Array | None,
    *,
    backward: bool,
    stride: int,
    groups: int,
) -> str | None:
    """Returns why these arguments are not supported, in one clause, or None."""
    del packed, backward, stride, groups
    if w.shape[0] != w.shape[1] or w.shape[0] % 2 == 0:
        return "the kernel needs a square window of an odd side"
    return native.unsupported(x.dtype)


def pack(w: np.ndarray, stride: int) -> np.ndarray | None:
    """Does what `forward` does to the weights of a convolution with one group, float32 `[P]`.

    It returns None where there is nothing to gain. The result is of use to this machine alone.
    """
    library = native.load().library
    if library is None or w.dtype != np.float32 or w.size == 0:
        return None
    w = np.ascontiguousarray(w)
    function = library.shiftnet_conv_pack
    function.restype, (kernel, _, inside, outside) = ctypes.c_int64, w.shape
    sizes = [ctypes.c_int64(size) for size in (kernel, inside, outside, stride)]
    packed = np.empty(function(None, *sizes, None), np.float32)
    function(ctypes.c_void_p(w.ctypes.data), *sizes, ctypes.c_void_p(packed.ctypes.data))
    return packed


def forward(
    x: jax.Array,
    w: jax.Array,
    packed: jax.Array | None,
    *,
    stride: int,
    groups: int,
    out_scale: jax.Array | None = None,
    out_bias: jax.Array | None = None,
    out_relu: Relu = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Computes what `xla.forward` does, and the epilogue."""
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), w.shape[3])
    nothing = jnp.zeros(0, jnp.float32)
    rest = (packed, out_scale, out_bias, residual)
    filled = (nothing if array is None else array for array in rest)
    sizes = {"stride": stride, "groups": groups}
    result = jax.ShapeDtypeStruct(shape, x.dtype)
    return _call("shiftnet_conv", result, x, w, *filled, **sizes, relu=native.RELU[out_relu])


def backward(
    x: jax.Array,
    w: jax.Array,
    packed: jax.Array | None,
    dout: jax.Array,
    *,
    stride: int,
    groups: int,
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients of `x` and `w`. XLA removes the one that is not used."""
    sizes = {"stride": stride, "groups": groups}
    dx, dw = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, w))
    return (
        _call("shiftnet_conv_input_gradient", dx, dout, w, **sizes),
        _call("shiftnet_conv_weight_gradient", dw, x, dout, **sizes),
        None if packed is None else jnp.zeros_like(packed),
    )


def _call(
    name: str, result: jax.ShapeDtypeStruct, *arrays: jax.Array, **settings: int
) -> jax.Array:
    numbers = {name: np.int64(value) for name, value in settings.items()}
    return native.call(name, result, *arrays, **numbers)
