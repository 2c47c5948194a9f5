"""The whole shift block in plain XLA."""

import jax
import numpy as np

from shiftnet.kernels.layouts import Layout, affine, every, product
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
    layout: Layout,
) -> jax.Array:
    """As `shift_block`, without what comes after the second product."""
    y = jax.nn.relu(affine(product(x, w1, layout), None, b1, layout))
    return product(every(plain(y, dh, dw, layout), stride, layout), w2, layout)
