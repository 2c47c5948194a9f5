"""Pooling over windows."""

import jax
from flax import nnx


def average_pool(x: jax.Array) -> jax.Array:
    """Takes means of 3x3 windows at stride 2, `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), C]`.

    One pixel of zeros is added around and counts: every sum is divided by 9.
    """
    # flax's avg_pool divides by an integer, which strict type promotion forbids (0.12.12).
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), padding) / 9


def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 3x3 windows at stride 2, `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), C]`."""
    return nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
