"""Batch normalisation in training on a CPU: calls of the loops in `batch_norm.cc`, in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import native


def unsupported(x: jax.Array, scale: jax.Array) -> str | None:
    """Why this cannot run, in one clause; None where it can."""
    if x.dtype != jnp.float32 or scale.dtype != jnp.float32:
        return f"the kernel needs float32, not {x.dtype} and {scale.dtype}"
    if x.size == 0:
        return "there are no pixels"
    return native.load().reason


def forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, relu: bool, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `batch_norm`."""
    call = _call("shiftnet_batch_norm", x, scale)
    return call(x, scale, bias, relu=relu, epsilon=np.float32(epsilon))


def backward(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dy: jax.Array,
    *,
    relu: bool,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `x`, `scale` and `bias`."""
    call = _call("shiftnet_batch_norm_gradient", x, scale)
    return call(x, dy, mean, var, scale, bias, relu=relu, epsilon=np.float32(epsilon))


def _call(name, x, scale):
    images, values = (jax.ShapeDtypeStruct(like.shape, jnp.float32) for like in (x, scale))
    return jax.ffi.ffi_call(name, (images, values, values), vmap_method="sequential")
