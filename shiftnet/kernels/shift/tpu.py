"""The shift on a TPU, in the layout HWCN: selects every pixel's channels from other pixels.

N is in the lanes and C in the sublanes, so that a position is an index of two untiled dimensions,
and only sublanes have to be selected: an AND with constant masks and an OR, on 32-bit words that
hold one channel of an image, or two channels of 16 bits. Every bit pattern is preserved.

The grid runs over tiles of images and, inside, over rows, which stay in a ring buffer as long as an
offset reaches back to them. Each row is fetched once and each row of the result written once; the
channels' offsets are fetched once, and the masks are computed from them on the chip.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from shiftnet.kernels import tpu

SUBLANES = 8  # of 32 bits, in a tile


class _Reach:
    """The largest offsets in each direction, without those that leave the image altogether."""

    def __init__(self, height: int, width: int, dh: np.ndarray, dw: np.ndarray):
        inside = (abs(dh) < height) & (abs(dw) < width)
        self.offsets = sorted(set(zip(dh[inside].tolist(), dw[inside].tolist(), strict=True)))
        rows, columns = zip((0, 0), *self.offsets, strict=True)
        self.up, self.down = -min(rows), max(rows)
        self.west, self.east = -min(columns), max(columns)

    def ring(self, width: int, channels: int, dtype: jnp.dtype) -> tuple[int, int, int]:
        """Returns the rows, columns and channels (padded to whole tiles) of the ring buffer."""
        tile = SUBLANES * 4 // jnp.dtype(dtype).itemsize
        columns = self.west + width + self.east
        return self.up + self.down + 1, columns, pl.cdiv(channels, tile) * tile


def _images(x_shape: tuple[int, ...], dtype: jnp.dtype, reach: _Reach) -> int | None:
    """Returns the number of images per grid step; None if even the smallest tile does not fit."""
    _, width, channels, batch = x_shape
    itemsize = jnp.dtype(dtype).itemsize
    slots, columns, padded = reach.ring(width, channels, dtype)
    masks = (len(reach.offsets) + 4) * tpu.padded_bytes(padded * itemsize // 4, 1, 4)
    for tile in tpu.TILES:
        pixel = tpu.padded_bytes(channels, tile, itemsize)
        size = (slots * columns + 4 * width + 4) * pixel + masks
        limit = tpu.VMEM_BYTES if tile == tpu.LANES else tpu.COMFORTABLE_BYTES
        if batch % tile == 0 and size <= limit:
            return tile
    return None


def unsupported(
    x_shape: tuple[int, ...],
    dtype: jnp.dtype,
    dh: np.ndarray | None = None,
    dw: np.ndarray | None = None,
) -> str | None:
    """Returns why `shift` does not support an `x` of this shape and dtype, or None.

    Without offsets, those of a 3x3 neighbourhood decide whether an image fits.
    """
    why = tpu.unsupported_images(x_shape, dtype)
    if why:
        return why
    height, width, channels, _ = x_shape
    if dh is None or dw is None:
        dh, dw = np.array([-1, 1]), np.array([-1, 1])
    if not _images(x_shape, dtype, _Reach(height, width, dh, dw)):
        return f"rows of {width} pixels of {channels} channels do not fit into the chip's memory"
    return None


def shift(x: jax.Array, dh: np.ndarray, dw: np.ndarray, *, interpret: bool = False) -> jax.Array:
    """Computes `y[h, w, c] = x[h + dh[c], w + dw[c], c]`, and 0 where that lies outside.

    Args:
      x: `[H, W, C, N]`, float32 or bfloat16, N a multiple of 128.
      dh, dw: int `[C]`. The gradient is this function with both negated.
      interpret: whether to interpret the kernel, which works on any device but is slow.

    Returns:
      An array of the shape and dtype of `x`.
    """
    height, width, channels, batch = x.shape
    reach = _Reach(height, width, dh, dw)
    tile = _images(x.shape, x.dtype, reach)
    assert tile, "the caller asks `unsupported` first"
    ring = reach.ring(width, channels, x.dtype)
    groups = _groups(reach, ring[2], dh, dw, x.dtype)
    tiles = groups.shape[1]
    # The offsets that occur in each tile of channels; few if groups are contiguous.
    present = [np.unique(groups[:, i][groups[:, i] >= 0]).tolist() for i in range(tiles)]
    return pl.pallas_call(
        functools.partial(_kernel, reach=reach, height=height, present=present),
        grid=(batch // tile, height + reach.down),
        in_specs=(
            tpu.rows_of(width, channels, tile, lambda u: jnp.minimum(u, height - 1)),
            tpu.whole(groups),
        ),
        out_specs=tpu.rows_of(width, channels, tile, lambda u: jnp.maximum(u - reach.down, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=(
            pltpu.VMEM((*ring, tile), x.dtype),
            pltpu.VMEM((len(reach.offsets), tiles, SUBLANES, tpu.LANES), jnp.int32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tpu.VMEM_BYTES
        ),
        interpret=interpret,
    )(x, groups)


def _groups(reach, channels, dh, dw, dtype):
    """Returns each channel's offset index, or -1: int32 `[part of a word, tiles, SUBLANES, 1]`."""
    group = np.full(channels, -1, np.int32)
    for g, (h, w) in enumerate(reach.offsets):
        group[: len(dh)][(dh == h) & (dw == w)] = g
    # The first of the channels in a word has the low bits.
    parts = 4 // jnp.dtype(dtype).itemsize
    return np.moveaxis(group.reshape(-1, SUBLANES, parts, 1), 2, 0)


def _kernel(x, groups, out, ring, masks, *, reach, height, present):
    h = pl.program_id(1)
    channels, images = x.shape[2:]
    parts, tiles = groups.shape[:2]

    @pl.when(h == 0)
    def _():
        tpu.clear_all(ring)
        for g in range(len(reach.offsets)):
            for i in range(tiles):
                mask = jnp.zeros(masks.shape[2:], jnp.int32)
                for part in range(parts):
                    bits = np.uint32((1 << 32 // parts) - 1 << 32 // parts * part).view(np.int32)
                    has = jnp.broadcast_to(groups[part, i] == g, mask.shape)
                    mask |= jnp.where(has, jnp.int32(bits), 0)
                masks[g, i] = mask

    slot = tpu.slot_of(ring, h)

    @pl.when(h < height)
    def _():
        @pl.loop(0, x.shape[1])
        def _(w):
            ring[slot, reach.west + w, :channels] = x[0, w]

    @pl.when(h >= height)
    def _():
        tpu.clear(ring, slot, 0, ring.shape[2])

    @pl.when(h >= reach.down)
    def _():
        slots = {dh: tpu.slot_of(ring, h - reach.down + dh) for dh, _ in reach.offsets}

        @pl.loop(0, x.shape[1])
        def _(w):
            for i in range(tiles):
                start, stop = i * SUBLANES * parts, (i + 1) * SUBLANES * parts
                picked = jnp.zeros((SUBLANES, images), jnp.int32)
                for g in present[i]:
                    dh, dw = reach.offsets[g]
                    there = ring[slots[dh], reach.west + w + dw, start:stop]
                    mask = jnp.tile(masks[g, i], (1, images // tpu.LANES))
                    picked |= pltpu.bitcast(there, jnp.int32) & mask
                exists = min(stop, channels) - start
                out[0, w, start : start + exists] = pltpu.bitcast(picked, out.dtype)[:exists]
