"""The offset of each channel."""

from typing import Literal, NamedTuple

import numpy as np

ChannelOrder = Literal["interleaved", "grouped"]


FAR = 1 << 30  # pixels; to which a position in an image can be added


class Offsets(NamedTuple):
    """The offsets in pixels that each channel reads from, as integers."""

    dh: tuple[int, ...]
    dw: tuple[int, ...]


class Neighbourhood(NamedTuple):
    """Offsets that are assigned to channels by their index; see `channel_offsets`."""

    kernel_size: int
    dilation: int
    channel_order: ChannelOrder = "interleaved"


def arrays(channels: int, moves: Offsets | Neighbourhood) -> tuple[np.ndarray, np.ndarray]:
    """Returns the offsets of `channels` channels, int32 `[channels]` each."""
    if isinstance(moves, Offsets):
        return _in_int32(np.array(moves.dh, np.int64)), _in_int32(np.array(moves.dw, np.int64))
    return channel_offsets(channels, *moves)


def channel_offsets(
    channels: int,
    kernel_size: int = 3,
    dilation: int = 1,
    channel_order: ChannelOrder = "interleaved",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each channel's offsets `(dh, dw)` in pixels to read from, int32 `[channels]` each.

    Neighbouring channels move in different directions: channel c has
    `dw = dilation * (c % k - k // 2)` and `dh = dilation * (c // k % k - k // 2)`. The last
    `channels mod k*k` channels do not move. Source: the CUDA layer published with arXiv:1711.08141.

    "grouped" makes the channels of one offset contiguous, the offsets being in the order of the
    first channels of "interleaved": the same network with its channels permuted, which kernels load
    faster.
    """
    c = np.arange(channels, dtype=np.int64)
    k = kernel_size
    each = channels // (k * k)
    moves = c < each * k * k
    if channel_order == "grouped":
        c = c // max(each, 1)
    dh = np.where(moves, dilation * (c // k % k - k // 2), 0)
    dw = np.where(moves, dilation * (c % k - k // 2), 0)
    return _in_int32(dh), _in_int32(dw)


def _in_int32(offsets: np.ndarray) -> np.ndarray:
    """Returns offsets as int32; those beyond any image stay beyond it."""
    return offsets.clip(-FAR, FAR).astype(np.int32)
