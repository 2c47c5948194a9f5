"""Batch normalisation in training, and the ReLU behind it."""

import functools

import jax

from shiftnet.kernels import checks
from shiftnet.kernels.batch_norm import xla

__all__ = ["batch_norm"]


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, relu: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by the mean and the variance of the batch, in plain XLA.

    Args:
      x: `[..., C]`, floating.
      scale, bias: `[C]`, float32 or wider: what normalised values are multiplied by, and what is
        added to them.
      epsilon: added to the variance.
      relu: whether negative results become 0.

    Returns:
      The result in the dtype of `x`; the mean and the biased variance, `[C]` in the dtype of
      `scale`, which carry no gradient.

    Raises:
      ValueError: for shapes that do not fit.
    """
    checks.shaped("batch_norm", x.shape[-1:], scale=scale, bias=bias)
    return _batch_norm(relu, epsilon, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_norm(relu, epsilon, x, scale, bias):
    return xla.forward(x, scale, bias, relu=relu, epsilon=epsilon)


def _forward(relu, epsilon, x, scale, bias):
    y, mean, var = _batch_norm(relu, epsilon, x, scale, bias)
    return (y, mean, var), (x, mean, var, scale, bias)


def _backward(relu, epsilon, residuals, cotangents):
    return xla.backward(*residuals, cotangents[0], relu=relu, epsilon=epsilon)


_batch_norm.defvjp(_forward, _backward)
