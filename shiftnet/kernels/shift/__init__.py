"""The shift: every channel moves by its own fixed offset, at no arithmetic and no parameters."""

import functools
from typing import Literal, get_args

import jax

from shiftnet.kernels.shift import xla
from shiftnet.kernels.shift.offsets import channel_offsets

__all__ = ["Implementation", "channel_offsets", "shift"]

Implementation = Literal["gather", "select"]


def shift(
    x: jax.Array,
    kernel_size: int = 3,
    dilation: int = 1,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Moves every channel of an image by its own offset; zeros come in from outside.

    `y[..., h, w, c] = x[..., h + dh[c], w + dw[c], c]`, and 0 where that lies outside, with
    `dh, dw = channel_offsets(channels, kernel_size, dilation)`. The gradient is the same rule
    with the offsets negated. Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative
    to Spatial Convolutions", arXiv:1711.08141, with the channel assignment of its published code.

    Args:
      x: `[..., H, W, C]` of any dtype; images are NHWC.
      kernel_size: side k of the neighbourhood, at least 1, even ones included. Channels are dealt
        out to its k*k positions in turn; the remaining `C mod k*k` stay where they are.
      dilation: distance between neighbours in pixels, at least 1. Offsets larger than the image
        give zeros.
      implementation: `"gather"` reads through a constant index table (the fastest on CPU and
        fused into its neighbours on GPU), `"select"` picks among shifted windows (TPU, where
        gathers are slow). None takes `"select"` on TPU and `"gather"` elsewhere.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: for an `x` of fewer than 3 dimensions, a `kernel_size` or `dilation` below 1, or
        an unknown `implementation`.
    """
    if x.ndim < 3:
        raise ValueError(f"shift needs [..., H, W, C], at least 3 dimensions, got {x.shape}")
    if kernel_size < 1 or dilation < 1:
        raise ValueError(
            "shift needs a kernel_size and a dilation of at least 1, "
            f"got kernel_size {kernel_size} and dilation {dilation}"
        )
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"unknown implementation {implementation!r} of shift; "
            f"known: {', '.join(get_args(Implementation))}"
        )
    return _shift(x, kernel_size, dilation, 1, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _shift(
    x: jax.Array, kernel_size: int, dilation: int, sign: int, implementation: str | None
) -> jax.Array:
    dh, dw = channel_offsets(x.shape[-1], kernel_size, dilation)
    dh, dw = sign * dh, sign * dw
    if implementation == "gather":
        return xla.gather(x, dh, dw)
    if implementation == "select":
        return xla.select(x, dh, dw)
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: xla.select(x, dh, dw),
        default=lambda x: xla.gather(x, dh, dw),
    )


def _forward(x, kernel_size, dilation, sign, implementation):
    return _shift(x, kernel_size, dilation, sign, implementation), None


def _backward(kernel_size, dilation, sign, implementation, _, dy):
    return (_shift(dy, kernel_size, dilation, -sign, implementation),)


_shift.defvjp(_forward, _backward)
