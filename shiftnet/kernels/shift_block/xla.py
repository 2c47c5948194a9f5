"""The whole shift block in plain XLA."""

import jax
import numpy as np

from shiftnet.kernels.layouts import affine, pointwise_conv, subsample
from shiftnet.kernels.shift import plain


def forward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> jax.Array:
    """Computes `shift_block` without an epilogue."""
    y = jax.nn.relu(affine(pointwise_conv(x, w1, "NHWC"), None, b1, "NHWC"))
    return pointwise_conv(subsample(plain(y, dh, dw), stride, "NHWC"), w2, "NHWC")
