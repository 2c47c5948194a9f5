"""The order of an image batch's axes.

NHWC is what JAX's convolutions, cuDNN and everything outside the kernels take. HWCN has the batch
innermost: on a TPU the 128 lanes then hold 128 images, so a shift moves whole rows of them by an
address, where NHWC would shuffle lanes, and 16 channels are not padded to 128 lanes.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from shiftnet.kernels.implementations import is_lowered_for

Layout = Literal["NHWC", "HWCN"]

BATCH = {"NHWC": 0, "HWCN": 3}
CHANNELS = {"NHWC": 3, "HWCN": 2}
ROWS = {"NHWC": 1, "HWCN": 0}
LANES = 128  # of a TPU's vector registers


def to_nhwc(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` in NHWC, out of `layout`."""
    return x if layout == "NHWC" else x.transpose(3, 0, 1, 2)


def from_nhwc(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` in `layout`, out of NHWC."""
    return x if layout == "NHWC" else x.transpose(1, 2, 3, 0)


def per_channel(values: jax.Array, layout: Layout = "NHWC") -> jax.Array:
    """`[C]` in the shape that multiplies an image batch."""
    return values if layout == "NHWC" else values[:, None]


def every(x: jax.Array, stride: int, layout: Layout = "NHWC") -> jax.Array:
    """Every `stride`-th row and column, from the first."""
    rows = ROWS[layout]
    for axis in (rows, rows + 1):
        x = jax.lax.slice_in_dim(x, 0, None, stride, axis) if stride > 1 else x
    return x


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What sums over pixels, and statistics, are taken in: float32, or `dtype` if that is wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def product(x: jax.Array, w: jax.Array, layout: Layout = "NHWC") -> jax.Array:
    """The 1x1 convolution of images of C channels by `w`, `[C, K]`.

    In NHWC as one product of two matrices: XLA's CPU backend then computes the weights' gradient
    without copying the activations, several times faster than a convolution's. In ONNX as a
    convolution, so that a network is one in NCHW throughout.
    """
    if is_lowered_for("onnx"):
        return jax.lax.conv_general_dilated(
            x, w[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    if layout == "HWCN":
        return jnp.einsum("hwcn,ck->hwkn", x, w)
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def affine(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, layout: Layout = "NHWC"
) -> jax.Array:
    """`x * scale + bias` in the dtype of x, computed in float32 or wider; `[C]` each, or None.

    So that the gradients of `scale` and `bias`, which are sums over all pixels, are wide sums.
    """
    y = x.astype(wide_dtype(x.dtype))
    if scale is not None:
        y = y * per_channel(scale.astype(y.dtype), layout)
    if bias is not None:
        y = y + per_channel(bias.astype(y.dtype), layout)
    return y.astype(x.dtype)
