"""Batch norm in training on a CPU, computed by `batch_norm.cc`."""

from typing import Any

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
    results = _results((flat, x), (channels, scale), (channels, bias))
    settings = _settings(relu, epsilon)
    y, mean, var = native.call("shiftnet_batch_norm", results, *arrays, **settings)
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
    added = flat if relu == "last" else (0,)
    results = _results((flat, x), (channels, scale), (channels, bias), (added, x))
    settings = _settings(relu, epsilon)
    found = native.call("shiftnet_batch_norm_gradients", results, *arrays, **settings)
    dx, dscale, dbias, dresidual = found
    dresidual = dresidual.reshape(x.shape) if relu == "last" else dout
    return dx.reshape(x.shape), dscale, dbias, dresidual


def _results(*results: tuple[tuple[int, ...], jax.Array]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of a shape and the dtype of an array each."""
    return tuple(jax.ShapeDtypeStruct(shape, array.dtype) for shape, array in results)


def _settings(relu: Relu, epsilon: float) -> dict[str, Any]:
    return {"relu": np.int64(native.RELU[relu]), "epsilon": np.float32(epsilon)}
