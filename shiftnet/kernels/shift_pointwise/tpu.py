"""Shift and 1x1 convolution on a TPU, in HWCN; the kernel is in `shiftnet.kernels.tpu`.

Moved, forward: x, the result and the residual once each; backward: x, dout and dx once each. Beside
that the weights and the 0/1 matrix that sorts x's channels by offset, `[padded C, C]` of x's dtype
(twice, backward). There is no such matrix where stride is 1 and channels with one offset are
contiguous, in whole tiles of 8 channels (16 of bfloat16), in the order of their offsets `(dh, dw)`.

A group is padded to whole tiles, so that fewer than 72 channels (144 of bfloat16) cost as much
arithmetic as these.
"""

import jax
import numpy as np

from shiftnet.kernels import tpu


def unsupported(
    x: jax.Array,
    w: jax.Array,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    backward: bool = True,
) -> str | None:
    """Why the kernels cannot take these arguments, or None.

    Only shapes, dtypes and offsets count. `backward` keeps more on the chip; without it the answer
    is for `forward` alone.
    """
    del relu  # needs nothing
    return tpu.unsupported(
        x, *w.shape, dh=dh, dw=dw, stride=stride, own_weight=False, backward=backward
    )


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
    out_scale: jax.Array | None = None,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`epilogue(shift(prologue(x))[::stride, ::stride] @ w)`.

    Args:
      x: `[H, W, C, N]`, float32 or bfloat16, N a multiple of 128.
      w: `[C, K]`; it is taken in x's dtype.
      scale, bias: `[C]` each, of the prologue; then `relu`. Computed in float32.
      dh, dw: int `[C]`, where each channel is read from; outside the image there are zeros.
      stride: at least 1.
      out_scale, out_bias: `[K]` each, then `out_relu`, then `residual [H', W', K, N]`.
      interpret: runs on any device, slowly.

    Returns:
      `[H', W', K, N]` of x's dtype, H' and W' being H and W by the stride, rounded up. An infinity
      or a NaN in x makes all of its pixel's channels NaN where channels have to be sorted.
    """
    return tpu.forward(
        x,
        None,
        scale,
        bias,
        w,
        relu=relu,
        dh=dh,
        dw=dw,
        stride=stride,
        out_scale=out_scale,
        out_bias=out_bias,
        out_relu=out_relu,
        residual=residual,
        interpret=interpret,
    )


def backward(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    dout: jax.Array,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients `(dx, dw, dscale, dbias)` of `forward` without what comes after the product.

    `dout [H', W', K, N]` has x's dtype. Each gradient has its argument's shape and dtype, or is
    None with it. Sums over pixels and images are float32 throughout.
    """
    grads = tpu.backward(
        x,
        None,
        scale,
        bias,
        w,
        dout,
        relu=relu,
        dh=dh,
        dw=dw,
        stride=stride,
        interpret=interpret,
    )
    return grads["x"], grads["w2"], grads.get("scale"), grads.get("bias")
