"""The shift: every channel moves by its own fixed offset, at no arithmetic and no parameters."""

import functools
from typing import Literal, get_args

import jax
import numpy as np

from shiftnet.kernels import checks, implementations
from shiftnet.kernels.layouts import BATCH, CHANNELS, Layout, from_nhwc, to_nhwc
from shiftnet.kernels.shift import gpu, tpu, xla
from shiftnet.kernels.shift.offsets import ChannelOrder, channel_offsets

__all__ = ["ChannelOrder", "Implementation", "channel_offsets", "shift"]

Implementation = Literal["xla", "gather", "select", "tpu", "gpu"]


def shift(
    x: jax.Array,
    kernel_size: int = 3,
    dilation: int = 1,
    *,
    channel_order: ChannelOrder = "interleaved",
    layout: Layout = "NHWC",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Moves every channel of an image by its own offset; zeros come in from outside.

    `y[..., h, w, c] = x[..., h + dh[c], w + dw[c], c]`, and 0 where that lies outside, with
    `dh, dw = channel_offsets(channels, kernel_size, dilation, channel_order)`. The gradient is the
    same rule with the offsets negated. Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter
    Alternative to Spatial Convolutions", arXiv:1711.08141, with the channel assignment of its
    published code.

    Args:
      x: `[..., H, W, C]` of any dtype, or `[H, W, C, N]` in layout HWCN.
      kernel_size: side k of the neighbourhood, at least 1, even ones included. Channels are dealt
        out to its k*k positions in turn; the remaining `C mod k*k` stay where they are.
      dilation: distance between neighbours in pixels, at least 1. Offsets larger than the image
        give zeros.
      channel_order: as of `channel_offsets`.
      layout: of `x` and the result.
      implementation: `"tpu"` and `"gpu"` are kernels. `"gather"` is plain XLA that reads through a
        constant index table (the fastest on CPU, and fused into its neighbours on GPU), `"select"`
        picks among shifted windows; `"xla"` is `"select"` on TPU, where gathers are slow, and
        `"gather"` elsewhere. None takes the device's kernel where it supports `x`, else `"xla"`.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: for an `x` of too few dimensions, a `kernel_size` or `dilation` that is no whole
        number of at least 1, an unknown `channel_order`, `layout` or `implementation`, or one that
        does not support `x`.
    """
    checks.known("shift", layout, channel_order)
    if x.ndim < 3 or (layout == "HWCN" and x.ndim != 4):
        wanted = "[..., H, W, C], at least 3 dimensions" if layout == "NHWC" else "[H, W, C, N]"
        raise ValueError(f"shift needs {wanted}, got {x.shape}")
    if not checks.is_whole(kernel_size, dilation):
        raise ValueError(
            "shift needs a whole kernel_size and dilation of at least 1, "
            f"got kernel_size {kernel_size} and dilation {dilation}"
        )
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"unknown implementation {implementation!r} of shift; "
            f"known: {', '.join(get_args(Implementation))}"
        )
    return _shift(x, (kernel_size, dilation, channel_order), 1, layout, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _shift(
    x: jax.Array,
    neighbourhood: tuple[int, int, ChannelOrder],
    sign: int,
    layout: Layout,
    implementation: str | None,
) -> jax.Array:
    channels = x.shape[CHANNELS[layout] if x.ndim == 4 else -1]
    dh, dw = (sign * offset for offset in channel_offsets(channels, *neighbourhood))
    calls = {
        "xla": lambda x: plain(x, dh, dw, layout),
        "gather": lambda x: from_nhwc(xla.gather(to_nhwc(x, layout), dh, dw), layout),
        "select": lambda x: from_nhwc(xla.select(to_nhwc(x, layout), dh, dw), layout),
        "tpu": lambda x: tpu.shift(x, dh, dw),
        "gpu": lambda x: gpu.shift(x, dh, dw),
    }

    def run(x):
        unsupported: dict[str, implementations.Reason]
        unsupported = {"tpu": implementations.needs_hwcn, "gpu": implementations.needs_nhwc}
        if layout == "HWCN":
            unsupported["tpu"] = lambda: tpu.unsupported(x.shape, x.dtype, dh, dw)
        elif x.ndim == 4:
            unsupported["gpu"] = lambda: gpu.unsupported(x.shape, x.dtype, dh, dw)
        else:
            unsupported["gpu"] = lambda: f"x has {x.ndim} dimensions, not 4"
        return implementations.run("shift", implementation, calls, unsupported, x)

    if x.ndim != 4:
        return run(x)
    return implementations.on_shares(run, (x,), (BATCH[layout],), BATCH[layout])


def plain(x: jax.Array, dh: np.ndarray, dw: np.ndarray, layout: Layout) -> jax.Array:
    """The shift in plain XLA, as the device has it best.

    Args:
      x: as of `shift`.
      dh, dw: offsets, int32 `[C]` each.
      layout: of `x` and the result.
    """

    def move(x, dh, dw):
        if implementations.is_lowered_for("tpu"):
            return from_nhwc(xla.select(to_nhwc(x, layout), dh, dw), layout)
        moved = jax.lax.platform_dependent(
            to_nhwc(x, layout),
            tpu=lambda x: xla.select(x, dh, dw),
            default=lambda x: xla.gather(x, dh, dw),
        )
        return from_nhwc(moved, layout)

    # Its own gradient: JAX would scatter where this gathers.
    moved = jax.custom_vjp(lambda x: move(x, dh, dw))
    moved.defvjp(lambda x: (move(x, dh, dw), None), lambda _, dy: (move(dy, -dh, -dw),))
    return moved(x)


def _forward(x, neighbourhood, sign, layout, implementation):
    return _shift(x, neighbourhood, sign, layout, implementation), None


def _backward(neighbourhood, sign, layout, implementation, _, dy):
    return (_shift(dy, neighbourhood, -sign, layout, implementation),)


_shift.defvjp(_forward, _backward)
