"""Shift and 1x1 convolution in plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import Layout, affine, every, product
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
    y = affine(x, scale, bias, layout)
    y = jax.nn.relu(y) if relu else y
    return product(every(plain(y, dh, dw, layout), stride, layout), w, layout)


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
    y = affine(y, scale, bias, layout)
    y = jnp.maximum(y, jnp.zeros((), y.dtype)) if relu else y  # typed, for exporters
    return y if residual is None else y + residual
