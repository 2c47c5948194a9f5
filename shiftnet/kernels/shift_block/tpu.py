"""The block 1x1, bias, ReLU, shift, 1x1 on a TPU, in HWCN; the kernel is in `shiftnet.kernels.tpu`.

The expanded tensor never leaves the chip. Memory traffic forward: x, the result and the residual,
once each; backward, where the expanded tensor is recomputed: x, dout and dx, once each. In addition
the weights, their gradients, and the matrices that sort their channels by offset.

The channels of each offset are padded to whole tiles of 8 channels (16 of bfloat16), so that with
9 offsets fewer than 72 channels (144 of bfloat16) cost as much arithmetic as 72 (144).
"""

import jax
import numpy as np

from shiftnet.kernels import tpu


def unsupported(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    backward: bool = True,
) -> str | None:
    """Returns why the kernels do not support these arguments, or None.

    It depends on shapes, dtypes and offsets only. The gradients need more memory on the chip; with
    `backward=False` the answer is for `forward` only.
    """
    return tpu.unsupported(
        x, *w2.shape, dh=dh, dw=dw, stride=stride, own_weight=True, backward=backward
    )


def forward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes `epilogue(shift(relu(x @ w1 + b1))[::stride, ::stride] @ w2)`.

    Args:
      x: `[H, W, C, N]`, float32 or bfloat16, N a multiple of 128.
      w1, w2: `[C, E]` and `[E, K]`, converted to the dtype of `x`.
      b1: `[E]`, added in float32; the expanded channels are then rounded to the dtype of `x`.
      dh, dw: int `[E]`, the offset that each channel is read from; outside the image are zeros.
      stride: at least 1.
      out_bias: `[K]`, followed by `out_relu` and `residual [H', W', K, N]`.
      interpret: whether to interpret the kernel, which works on any device but is slow.

    Returns:
      `[H', W', K, N]` in the dtype of `x`, with H' = ceil(H / stride) and W' = ceil(W / stride).
    """
    return tpu.forward(
        x,
        w1,
        None,
        b1,
        w2,
        relu=True,
        dh=dh,
        dw=dw,
        stride=stride,
        out_bias=out_bias,
        out_relu=out_relu,
        residual=residual,
        interpret=interpret,
    )


def backward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    dout: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients `(dx, dw1, db1, dw2)` of `forward` without an epilogue.

    `dout [H', W', K, N]` has the dtype of `x`. Each gradient has the shape and dtype of its
    argument. Sums over pixels and images are float32 throughout.
    """
    grads = tpu.backward(
        x,
        w1,
        None,
        b1,
        w2,
        dout,
        relu=True,
        dh=dh,
        dw=dw,
        stride=stride,
        interpret=interpret,
    )
    return grads["x"], grads["w1"], grads["bias"], grads["w2"]
