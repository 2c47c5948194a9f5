"""Shift and 1x1 convolution in plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import Layout, every, per_channel, product
from shiftnet.kernels.shift import plain


def forward(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    layout: Layout,
) -> jax.Array:
    """As `shift_pointwise`, without what comes after the product."""
    if scale is not None:
        x = x * per_channel(scale, layout)
    if bias is not None:
        x = x + per_channel(bias, layout)
    if relu:
        x = jax.nn.relu(x)
    x = every(plain(x, dh, dw, layout), stride, layout)
    return product(x, w, layout)


def epilogue(
    y: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    relu: bool,
    layout: Layout,
) -> jax.Array:
    """What comes after the product: scale, bias, ReLU, addition."""
    if scale is not None:
        y = y * per_channel(scale, layout)
    if bias is not None:
        y = y + per_channel(bias, layout)
    y = jnp.maximum(y, 0) if relu else y
    return y if residual is None else y + residual
