"""Batch norm in training on a CPU in float32, computed by `batch_norm.cc`."""

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import native
from shiftnet.kernels.operation import Relu


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    *,
    relu: Relu,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes what `xla.forward` does, and the steps after it."""
    flat, channels = (x.size // x.shape[-1], x.shape[-1]), x.shape[-1:]
    residual = jnp.zeros(0, jnp.float32) if residual is None else residual.reshape(flat)
    arrays = (x.reshape(flat), scale, bias, residual)
    shapes = (flat, channels, channels)
    y, mean, var = _call("shiftnet_batch_norm", shapes, arrays, relu, epsilon)
    return y.reshape(x.shape), mean, var


def backward(
    x: jax.Array,
    out: jax.Array | None,
    dout: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    relu: Relu,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of `x`, `scale`, `bias` and what was added.

    `out` is the result, which is needed where a ReLU came last.
    """
    flat, channels = (x.size // x.shape[-1], x.shape[-1]), x.shape[-1:]
    out = jnp.zeros(0, jnp.float32) if out is None else out.reshape(flat)
    arrays = (x.reshape(flat), out, dout.reshape(flat), mean, var, scale, bias)
    shapes = (flat, channels, channels, flat if relu == "last" else (0,))
    found = _call("shiftnet_batch_norm_gradients", shapes, arrays, relu, epsilon)
    dx, dscale, dbias, dresidual = found
    dresidual = dresidual.reshape(x.shape) if relu == "last" else dout
    return dx.reshape(x.shape), dscale, dbias, dresidual


def _call(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    arrays: tuple[jax.Array, ...],
    relu: Relu,
    epsilon: float,
) -> tuple[jax.Array, ...]:
    # The C++ loops over the leading axes that `jax.vmap` adds.
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    call = jax.ffi.ffi_call(name, results, vmap_method="broadcast_all")
    return tuple(call(*arrays, relu=np.int64(native.RELU[relu]), epsilon=np.float32(epsilon)))
