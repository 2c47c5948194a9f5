"""The block 1x1, bias, ReLU, shift, 1x1 on a TPU, in HWCN; the kernel is in `shiftnet.kernels.tpu`.

The expanded tensor never leaves the chip. Moved, forward: x, the result and the residual once each;
backward, where it is computed again: x, dout and dx once each. Beside that the weights and their
gradients, and what sorts their channels by offset.

A group of expanded channels is padded to whole tiles of 8 channels (16 of bfloat16), so that fewer
than 72 channels (144 of bfloat16) cost as much arithmetic as these.
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
    """Why the kernels cannot take these arguments, or None.

    Only shapes, dtypes and offsets count. `backward` keeps more on the chip; without it the answer
    is for `forward` alone.
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
    """`epilogue(shift(relu(x @ w1 + b1))[::stride, ::stride] @ w2)`.

    Args:
      x: `[H, W, C, N]`, float32 or bfloat16, N a multiple of 128.
      w1, w2: `[C, E]` and `[E, K]`; they are taken in x's dtype.
      b1: `[E]`, added in float32; the expanded channels are then rounded to x's dtype.
      dh, dw: int `[E]`, where each channel is read from; outside the image there are zeros.
      stride: at least 1.
      out_bias: `[K]`, then `out_relu`, then `residual [H', W', K, N]`.
      interpret: runs on any device, slowly.

    Returns:
      `[H', W', K, N]` of x's dtype, H' and W' being H and W by the stride, rounded up.
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
    """The gradients `(dx, dw1, db1, dw2)` of `forward` without what comes after the product.

    `dout [H', W', K, N]` has x's dtype. Each gradient has its argument's shape and dtype. Sums over
    pixels and images are float32 throughout.
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
