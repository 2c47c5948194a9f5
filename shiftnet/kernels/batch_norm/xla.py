"""Batch normalisation in training in plain XLA, for any device and floating dtype."""

import jax
import jax.numpy as jnp

from shiftnet.kernels.layouts import affine


def forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, relu: bool, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `batch_norm`."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(scale.dtype)
    mean = wide.mean(axes)
    var = jnp.square(wide - mean).mean(axes)
    y = affine(x, *_affine(mean, var, scale, bias, epsilon))
    return jnp.maximum(y, 0) if relu else y, mean, var


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
    """The gradients of `x`, `scale` and `bias`.

    Written out, because the one that JAX derives goes over the activations more often: a training
    step of ShiftResNet20 at expansion 3 took 0.43 s on a CPU with that, 0.39 s with this.
    """
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    wide, dy = x.astype(scale.dtype), dy.astype(scale.dtype)
    # Without the barrier XLA finds `wide - mean` in the forward pass and keeps it until now, which
    # costs more memory and time than computing it anew.
    mean = jax.lax.optimization_barrier(mean)
    if relu:
        factor, offset = _affine(mean, var, scale, bias, epsilon)
        dy = jnp.where(wide * factor + offset > 0, dy, 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    dbias = dy.sum(axes)
    dscale = (dy * (wide - mean)).sum(axes) * inverse
    # scale * inverse * (dy - dbias / count - normalized * dscale / count), with one factor for each
    # of dy and x, so that nothing but those two is read.
    by_dy = scale * inverse
    by_x = -by_dy * inverse * dscale / count
    rest = by_dy * dbias / count + by_x * mean
    return (by_dy * dy + by_x * wide - rest).astype(x.dtype), dscale, dbias


def _affine(mean, var, scale, bias, epsilon):
    factor = scale * jax.lax.rsqrt(var + epsilon)
    return factor, bias - mean * factor
