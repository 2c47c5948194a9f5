"""The shift: every channel moves by its own fixed offset, without arithmetic or parameters."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from shiftnet.kernels import checks
from shiftnet.kernels.implementations import is_lowered_for
from shiftnet.kernels.operation import Case, Kernel, Operation
from shiftnet.kernels.shift import gpu, tpu, xla
from shiftnet.kernels.shift.offsets import (
    ChannelOrder,
    Neighbourhood,
    Offsets,
    arrays,
    channel_offsets,
)

__all__ = ["ChannelOrder", "Implementation", "Offsets", "channel_offsets", "shift"]

Implementation = Literal["xla", "gather", "select", "tpu", "gpu"]


def shift(
    x: jax.Array,
    kernel_size: int = 3,
    dilation: int = 1,
    *,
    channel_order: ChannelOrder = "interleaved",
    offsets: Offsets | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Moves every channel of an image by its own offset, with zeros from outside the image.

    `y[..., h, w, c] = x[..., h + dh[c], w + dw[c], c]`, and 0 where that lies outside, with
    `dh, dw = channel_offsets(channels, kernel_size, dilation, channel_order)`. The gradient is the
    shift by the negated offsets. Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter
    Alternative to Spatial Convolutions", arXiv:1711.08141, with the channel assignment of its
    published code.

    Args:
      x: `[..., H, W, C]` of any dtype.
      kernel_size: side k of the neighbourhood, at least 1, odd or even. Channels are assigned to
        its k*k positions in turn; the remaining `C mod k*k` do not move.
      dilation: distance between neighbours in pixels, at least 1. Offsets larger than the image
        give zeros.
      channel_order: see `channel_offsets`.
      offsets: `(dh, dw)`, integers for each channel, instead of those of a neighbourhood.
      implementation: `"tpu"` and `"gpu"` are kernels. `"gather"` is plain XLA that reads through a
        constant index table (the fastest on CPU, and fused into its neighbours on GPU), `"select"`
        selects among shifted windows; `"xla"` is `"select"` on TPU, where gathers are slow, and
        `"gather"` elsewhere. None selects the device's kernel if it supports `x`, else `"xla"`.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: if `x` has too few dimensions, `kernel_size` or `dilation` is not an integer of at
        least 1, `offsets` are for another number of channels, `channel_order` or `implementation`
        is unknown, or the implementation does not support `x`.
    """
    if x.ndim < 3:
        raise ValueError(f"shift needs [..., H, W, C], at least 3 dimensions, got {x.shape}")
    moves = checks.moves("shift", x.shape[-1], kernel_size, dilation, channel_order, offsets)
    images = x if x.ndim == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    y = OPERATION(images, moves=moves, implementation=implementation)
    return y if x.ndim == 4 else y.reshape(x.shape)


def plain(x: jax.Array, dh: np.ndarray, dw: np.ndarray) -> jax.Array:
    """Shifts in plain XLA, by the form that is fastest on the device.

    Args:
      x: `[..., H, W, C]`.
      dh, dw: offsets, int32 `[C]` each.
    """

    def move(x, dh, dw):
        if is_lowered_for("onnx"):
            return xla.convolve(x, dh, dw)
        if is_lowered_for("tpu"):
            return xla.select(x, dh, dw)
        return jax.lax.platform_dependent(
            x, tpu=lambda x: xla.select(x, dh, dw), default=lambda x: xla.gather(x, dh, dw)
        )

    # A gradient of its own: JAX's would scatter where this gathers.
    moved = jax.custom_vjp(lambda x: move(x, dh, dw))
    moved.defvjp(lambda x: (move(x, dh, dw), None), lambda _, dy: (move(dy, -dh, -dw),))
    return moved(x)


def _kernel(move: Callable[..., jax.Array], **options: Any) -> Kernel:
    """Returns a kernel whose gradient is itself with the offsets negated."""
    return Kernel(move, lambda x, dy, dh, dw: (move(dy, dh=-dh, dw=-dw),), **options)


def _prepare(x, moves):
    dh, dw = arrays(x.shape[-1], moves)
    return {"dh": dh, "dw": dw}


def _unsupported(module):
    return lambda x, dh, dw, backward: module.unsupported(x.shape, x.dtype, dh, dw)


OPERATION = Operation(
    "shift",
    plain,
    {
        "gather": _kernel(xla.gather),
        "select": _kernel(xla.select),
        "tpu": _kernel(tpu.shift, unsupported=_unsupported(tpu), layout="HWCN"),
        "gpu": _kernel(gpu.shift, unsupported=_unsupported(gpu)),
    },
    images=(True,),
    prepare=_prepare,
    cases=[
        Case((shape,), {"moves": Neighbourhood(3, 1)})
        for shape in ((128, 4, 8, 144), (256, 32, 32, 144))
    ],
)
