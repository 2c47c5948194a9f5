"""Shift and 1x1 convolution on a TPU, in HWCN; the kernel is in `shiftnet.kernels.tpu`.

Memory traffic forward: x, the result and the residual, once each; backward: x, dout and dx, once
each. In addition the weights and the 0/1 matrix that sorts the channels of x by offset,
`[padded C, C]` in the dtype of x (twice in the backward pass). This matrix is not needed if the
stride is 1 and the channels of each offset are contiguous, in whole tiles of 8 channels (16 of
bfloat16), in the order of their offsets `(dh, dw)`.

The channels of each offset are padded to whole tiles, so that with 9 offsets fewer than 72 channels
(144 of bfloat16) cost as much arithmetic as 72 (144).
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
    """Returns why the kernels do not support these arguments, or None.

    It depends on shapes, dtypes and offsets only. The gradients need more memory on the chip; with
    `backward=False` the answer is for `forward` only.
    """
    del relu  # makes no difference
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
    """Computes `epilogue(shift(prologue(x))[::stride, ::stride] @ w)`.

    Args:
      x: `[H, W, C, N]`, float32 or bfloat16, N a multiple of 128.
      w: `[C, K]`, converted to the dtype of `x`.
      scale, bias: `[C]` each, the prologue with `relu`, computed in float32.
      dh, dw: int `[C]`, the offset that each channel is read from; outside the image are zeros.
      stride: at least 1.
      out_scale, out_bias: `[K]` each, followed by `out_relu` and `residual [H', W', K, N]`.
      interpret: whether to interpret the kernel, which works on any device but is slow.

    Returns:
      `[H', W', K, N]` in the dtype of `x`, with H' = ceil(H / stride) and W' = ceil(W / stride). If
      channels have to be sorted, an infinity or NaN in `x` makes all channels of its pixel NaN.
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
    """Returns the gradients `(dx, dw, dscale, dbias)` of `forward` without an epilogue.

    `dout [H', W', K, N]` has the dtype of `x`. Each gradient has the shape and dtype of its
    argument, or is None if that is. Sums over pixels and images are float32 throughout.
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
