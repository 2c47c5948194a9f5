"""Which channel moves where."""

import numpy as np


def channel_offsets(
    channels: int, kernel_size: int = 3, dilation: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The offsets `(dh, dw)` in pixels that each channel reads from, int32 `[channels]` each.

    Neighbouring channels move in different directions: channel c has
    `dw = dilation * (c % k - k // 2)` and `dh = dilation * (c // k % k - k // 2)`. The last
    `channels mod k*k` channels do not move. Source: the CUDA layer published with arXiv:1711.08141.
    """
    c = np.arange(channels, dtype=np.int32)
    k = kernel_size
    moves = c < channels // (k * k) * (k * k)
    dh = np.where(moves, dilation * (c // k % k - k // 2), 0)
    dw = np.where(moves, dilation * (c % k - k // 2), 0)
    return dh.astype(np.int32), dw.astype(np.int32)
