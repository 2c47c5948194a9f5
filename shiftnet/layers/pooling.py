"""Pooling over windows."""

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.layouts import ROWS, Layout


def average_pool(x: jax.Array, layout: Layout = "NHWC") -> jax.Array:
    """Means of 3x3 windows at stride 2, `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), C]`.

    One pixel of zeros is added around and counts: every sum is divided by 9. In layout HWCN from
    `[H, W, C, N]` likewise.
    """
    # flax's avg_pool divides by an integer, which strict type promotion forbids (0.12.12).
    spatial = [ROWS[layout] <= axis < ROWS[layout] + 2 for axis in range(4)]
    window, strides = ([size if here else 1 for here in spatial] for size in (3, 2))
    padding = [(1, 1) if here else (0, 0) for here in spatial]
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, padding) / 9


def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 3x3 windows at stride 2, `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), C]`."""
    # Padded apart for jax2onnx, whose max pooling takes no padding in numbers (0.17.1); XLA joins
    # the two again, in gradients too.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
