"""Which channel moves where."""

from typing import Literal, NamedTuple

import numpy as np

ChannelOrder = Literal["interleaved", "grouped"]


class Offsets(NamedTuple):
    """The offsets in pixels that each channel reads from, as whole numbers."""

    dh: tuple[int, ...]
    dw: tuple[int, ...]


class Neighbourhood(NamedTuple):
    """The offsets that channels are dealt out to by their place; see `channel_offsets`."""

    kernel_size: int
    dilation: int
    channel_order: ChannelOrder = "interleaved"


def arrays(channels: int, moves: Offsets | Neighbourhood) -> tuple[np.ndarray, np.ndarray]:
    """The offsets of so many channels, int32 `[channels]` each."""
    if isinstance(moves, Offsets):
        return np.array(moves.dh, np.int32), np.array(moves.dw, np.int32)
    return channel_offsets(channels, *moves)


def channel_offsets(
    channels: int,
    kernel_size: int = 3,
    dilation: int = 1,
    channel_order: ChannelOrder = "interleaved",
) -> tuple[np.ndarray, np.ndarray]:
    """The offsets `(dh, dw)` in pixels that each channel reads from, int32 `[channels]` each.

    Neighbouring channels move in different directions: channel c has
    `dw = dilation * (c % k - k // 2)` and `dh = dilation * (c // k % k - k // 2)`. The last
    `channels mod k*k` channels do not move. Source: the CUDA layer published with arXiv:1711.08141.

    "grouped" lays the channels that move the same way side by side, in the order of the first
    channels of "interleaved": the same network with its channels permuted, which loads better.
    """
    c = np.arange(channels, dtype=np.int32)
    k = kernel_size
    each = channels // (k * k)
    moves = c < each * k * k
    if channel_order == "grouped":
        c = c // max(each, 1)
    dh = np.where(moves, dilation * (c // k % k - k // 2), 0)
    dw = np.where(moves, dilation * (c % k - k // 2), 0)
    return dh.astype(np.int32), dw.astype(np.int32)
