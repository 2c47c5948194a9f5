"""Convolutions on a CPU in float32, computed by `conv.cc`."""

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import native


def unsupported(
    x: jax.Array, w: jax.Array, *, backward: bool, stride: int, groups: int
) -> str | None:
    """Returns why these arguments are not supported, in one clause, or None."""
    del backward, stride, groups
    if x.dtype != jnp.float32:
        return f"the kernel needs float32, not {x.dtype}"
    if w.shape[0] != w.shape[1] or w.shape[0] % 2 == 0:
        return "the kernel needs a square window of an odd side"
    return native.load().reason


def forward(x: jax.Array, w: jax.Array, *, stride: int, groups: int) -> jax.Array:
    """Computes what `xla.forward` does."""
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), w.shape[3])
    return _call("shiftnet_conv", shape, x, w, stride, groups)


def backward(
    x: jax.Array, w: jax.Array, dout: jax.Array, *, stride: int, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `x` and `w`. XLA removes the one that is not used."""
    return (
        _call("shiftnet_conv_input_gradient", x.shape, dout, w, stride, groups),
        _call("shiftnet_conv_weight_gradient", w.shape, x, dout, stride, groups),
    )


def _call(
    name: str, shape: tuple[int, ...], a: jax.Array, b: jax.Array, stride: int, groups: int
) -> jax.Array:
    # The C++ loops over the leading axes that `jax.vmap` adds.
    call = jax.ffi.ffi_call(
        name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="broadcast_all"
    )
    return call(a, b, stride=np.int64(stride), groups=np.int64(groups))
