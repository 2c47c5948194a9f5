"""Shift and 1x1 convolution in plain XLA."""

import jax
import numpy as np

from shiftnet.kernels.layouts import affine, pointwise_conv, subsample
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
) -> jax.Array:
    """Computes `shift_pointwise` without an epilogue."""
    y = affine(x, scale, bias, "NHWC")
    y = jax.nn.relu(y) if relu else y
    return pointwise_conv(subsample(plain(y, dh, dw), stride, "NHWC"), w, "NHWC")
