"""Pooling over windows."""

import jax
import jax.numpy as jnp
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
    # Padded apart for jax2onnx, whose max pooling takes no padding in numbers (0.17.1); XLA joins
    # the two again, in gradients too.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
