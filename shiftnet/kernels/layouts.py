"""The order of the axes of a batch of images.

JAX's convolutions, cuDNN and everything outside the kernels use NHWC. HWCN has the batch innermost:
the 128 lanes of a TPU's vector registers then hold 128 images, so that a shift only changes
addresses, where NHWC would shuffle lanes, and 16 channels are not padded to 128 lanes.
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
    """Transposes `x` from `layout` to NHWC."""
    return x if layout == "NHWC" else x.transpose(3, 0, 1, 2)


def from_nhwc(x: jax.Array, layout: Layout) -> jax.Array:
    """Transposes `x` from NHWC to `layout`."""
    return x if layout == "NHWC" else x.transpose(1, 2, 3, 0)


def per_channel(values: jax.Array, layout: Layout = "NHWC") -> jax.Array:
    """Reshapes `[C]` so that it broadcasts against a batch of images."""
    return values if layout == "NHWC" else values[:, None]


def subsample(x: jax.Array, stride: int, layout: Layout = "NHWC") -> jax.Array:
    """Subsamples: keeps every `stride`-th row and column, starting with the first."""
    rows = ROWS[layout]
    for axis in (rows, rows + 1):
        x = jax.lax.slice_in_dim(x, 0, None, stride, axis) if stride > 1 else x
    return x


def pixels(x: jax.Array) -> int:
    """Returns the number of pixels of all images."""
    return x.size // x.shape[-1]


def other_axes(x: jax.Array) -> tuple[int, ...]:
    """Returns all axes but the channels'."""
    return tuple(range(x.ndim - 1))


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of sums over pixels and of statistics: float32, or `dtype` if wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def pointwise_conv(x: jax.Array, w: jax.Array, layout: Layout = "NHWC") -> jax.Array:
    """Returns the pointwise (1x1) convolution of images of C channels with `w`, `[C, K]`.

    In NHWC it is one matrix multiplication: XLA's CPU backend then computes the gradient of the
    weights without copying the activations, several times faster than that of a convolution. For
    ONNX it is a convolution, so that all of a network is in NCHW there.
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
    """Returns `x * scale + bias` in the dtype of `x`; scale and bias are `[C]` each, or None.

    It is computed in float32 or wider, so that the gradients of `scale` and `bias`, which are sums
    over all pixels, are too.
    """
    y = x.astype(wide_dtype(x.dtype))
    if scale is not None:
        y = y * per_channel(scale.astype(y.dtype), layout)
    if bias is not None:
        y = y + per_channel(bias.astype(y.dtype), layout)
    return y.astype(x.dtype)
