"""The shift in plain XLA, in three forms: which one is fast depends on the compiler."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The most offsets that `Stretches` selects among: the 9 of 3x3. Each costs time; in a table it does
# not.
MOST_STRETCHES = 9


def gather(x: jax.Array, dh: np.ndarray, dw: np.ndarray) -> jax.Array:
    """Reads every value through one constant table of positions.

    XLA fuses the table into a single loop over the output. On a CPU this takes about as long as two
    copies; padding, slicing and concatenating takes as long as up to ten.
    """
    *_, height, width, _ = x.shape
    values = _read(x, dh, dw)
    return jnp.where(inside(dh, dw, (height, width)), values, jnp.zeros((), x.dtype))


def inside(
    dh: np.ndarray, dw: np.ndarray, size: tuple[int, int], filled: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns which values of a shifted image come from inside the image, bool `[H, W, C]`.

    Args:
      dh, dw: offsets, `[C]` each.
      size: rows and columns of the image.
      filled: number of first rows and columns that count as inside; all of them by default.
    """
    height, width = size
    h = np.arange(height)[:, None, None] + dh
    w = np.arange(width)[:, None] + dw
    rows, columns = filled or size
    return (h >= 0) & (h < rows) & (w >= 0) & (w < columns)


def _read(x: jax.Array, dh: np.ndarray, dw: np.ndarray) -> jax.Array:
    """Returns what `gather` reads, with arbitrary values where it reads outside."""
    *batch, height, width, channels = x.shape
    h = (np.arange(height)[:, None, None] + dh).clip(0, height - 1)
    w = (np.arange(width)[:, None] + dw).clip(0, width - 1)
    position = ((h * width + w) * channels + np.arange(channels)).astype(np.int32)
    return x.reshape(*batch, position.size)[..., position.ravel()].reshape(x.shape)


class Stretches(NamedTuple):
    """The shift between two pointwise convolutions, as a selection among slices, for a CPU.

    If the pixels of an image lie in one line, padded before the first and after the last, each of
    its shifted images is a slice of that line, except for values that should be zeros from outside.
    Selecting for each channel among as many slices as there are offsets takes 0.5 to 0.9 of the
    time of `gather` (9 offsets). The line is made from the narrow operand of the convolution
    before, which then computes the padding too.

    Attributes:
      dh, dw: offsets, int32 `[C]` each.
      size: rows and columns of the images.
    """

    dh: np.ndarray
    dw: np.ndarray
    size: tuple[int, int]

    @property
    def _distances(self) -> np.ndarray:
        """The offset of each channel along the line, `[C]`; 0 if it reads only outside."""
        height, width = self.size
        reads = (abs(self.dh) < height) & (abs(self.dw) < width)
        return np.where(reads, self.dh * width + self.dw, 0)

    @property
    def _few(self) -> bool:
        return len(np.unique(self._distances)) <= MOST_STRETCHES

    @property
    def _margins(self) -> tuple[int, int]:
        distances = self._distances
        return (max(-distances.min(), 0), max(distances.max(), 0)) if self._few else (0, 0)

    def line(self, x: jax.Array) -> jax.Array:
        """Returns the pixels of `[N, H, W, K]` in one line, zero-padded, `[N, pixels, K]`."""
        flat = x.reshape(len(x), -1, x.shape[-1])
        return jnp.pad(flat, [(0, 0), self._margins, (0, 0)])

    def unmoved(self, line: jax.Array) -> jax.Array:
        """Returns the image `[N, H, W, C]` of a line `[N, pixels, C]`."""
        return self._stretch(line, 0)

    def moved(self, line: jax.Array) -> jax.Array:
        """Returns the shifted image of a line, with arbitrary values where zeros should be."""
        if not self._few:
            return _read(self.unmoved(line), self.dh, self.dw)
        distances = self._distances
        first, *others = np.unique(distances)
        moved = self._stretch(line, first)
        for distance in others:
            moved = jnp.where(distances == distance, self._stretch(line, distance), moved)
        return moved

    def _stretch(self, line: jax.Array, distance: int) -> jax.Array:
        height, width = self.size
        start = self._margins[0] + distance
        stretch = jax.lax.slice_in_dim(line, start, start + height * width, axis=1)
        return stretch.reshape(len(line), height, width, line.shape[-1])


def select(x: jax.Array, dh: np.ndarray, dw: np.ndarray) -> jax.Array:
    """Moves all channels by every offset along W, then along H, and selects the right ones."""
    return _select_along(_select_along(x, dw, x.ndim - 2), dh, x.ndim - 3)


def _select_along(x: jax.Array, offsets: np.ndarray, axis: int) -> jax.Array:
    size = x.shape[axis]
    result = x
    for offset in np.unique(offsets[offsets != 0]):
        window = jnp.zeros_like(x)
        if abs(offset) < size:
            pad = [(0, 0)] * x.ndim
            pad[axis] = (max(-offset, 0), max(offset, 0))
            start = max(offset, 0)
            window = jax.lax.slice_in_dim(jnp.pad(x, pad), start, start + size, axis=axis)
        result = jnp.where(offsets == offset, window, result)
    return result


def convolve(x: jax.Array, dh: np.ndarray, dw: np.ndarray) -> jax.Array:
    """The shift of `[N, H, W, C]` as a depthwise convolution, whose kernels are ones and zeros.

    For ONNX Runtime: on 2 CPU cores ShiftResNet20 (expansion 1) takes 0.38 ms for one image and
    0.90 ms for four, with `select` 1.9 and 15 ms (the fastest of 30 runs).
    """
    most = max(int(abs(offsets).max(initial=0)) for offsets in (dh, dw))
    side, channels = 2 * most + 1, np.arange(len(dh))
    kernel = np.zeros((side, side, 1, len(dh)), np.float32)
    kernel[most + dh, most + dw, 0, channels] = 1
    return jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel, x.dtype),
        (1, 1),
        [(most, most)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=len(dh),
    )
