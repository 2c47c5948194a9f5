"""Batch norm in training in plain XLA, for any device and dtype."""

import functools

import jax
import jax.numpy as jnp

from shiftnet.kernels.layouts import affine, other_axes, pixels


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the normalised batch, and its mean and biased variance, which carry no gradient.

    Its own gradient, because the one that JAX derives goes over the activations more often: a
    training step of ShiftResNet20 at expansion 3 took 0.43 s on CPU with that, 0.39 s with this.
    """
    return formula(x, scale, bias, epsilon)


def formula(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the same, with the gradient that JAX derives."""
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
    axes = other_axes(x)
    wide = x.astype(scale.dtype)
    mean = wide.mean(axes)
    var = jnp.square(wide - mean).mean(axes)
    inverse = jax.lax.rsqrt(var + epsilon)
    y = affine(x, scale * inverse, bias - mean * scale * inverse)
    return (y, mean, var), (x, mean, inverse, scale)


def _backward(epsilon, residuals, cotangents):
    del epsilon
    x, mean, inverse, scale = residuals
    axes = other_axes(x)
    count = pixels(x)
    dy = cotangents[0].astype(scale.dtype)
    wide = x.astype(scale.dtype)
    # Without the barrier XLA finds `wide - mean` in the forward pass and keeps it until now, which
    # costs more memory and time than computing it anew.
    mean = jax.lax.optimization_barrier(mean)
    dbias = dy.sum(axes)
    dscale = (dy * (wide - mean)).sum(axes) * inverse
    # scale * inverse * (dy - dbias / count - normalized * dscale / count), with one factor for each
    # of dy and x, so that nothing but those two is read.
    by_dy = scale * inverse
    by_x = -by_dy * inverse * dscale / count
    rest = by_dy * dbias / count + by_x * mean
    return (by_dy * dy + by_x * wide - rest).astype(x.dtype), dscale, dbias


forward.defvjp(_forward, _backward)
