"""The shift for Hopper: each tile is loaded into shared memory once and stored shifted.

Pixels are numbered through all images, so that every offset is a whole number of rows of the matrix
`x[pixels, channels]`. A warpgroup loads a tile of pixels and the pixels before and after it that
offsets reach (none if a tile consists of whole images), moves the channels of one offset at a time
to the result, with zeros for values that wrapped around an image's edge, and stores the result with
one copy. Meanwhile its next tile is being loaded.

The channels of one offset are not contiguous (every 9th, for instance), so single values are moved.
That is fast enough: at the memory's bandwidth each multiprocessor has to move 5 values per cycle,
and it can move 32.

Memory traffic per value of b bytes: b read, plus the pixels around tiles (which other blocks read
at about the same time, so that they are in the L2 cache), and b written.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shiftnet.kernels import gpu

# Warpgroups per block and pixels per tile, best first.
_SHAPES = (
    *((4, 256), (3, 256), (2, 256), (3, 128), (2, 128), (4, 64), (3, 64), (2, 64)),
    *((1, 128), (1, 64)),
)
_SLOTS = 2
_MOST_PIECES = 64
_PADDINGS = (16, 48, 80, 112)  # bytes between two pixels in shared memory


class _Piece(NamedTuple):
    """Channels `start`, `start + step` and so on, which have one offset."""

    tap: gpu.Tap
    start: int
    step: int
    length: int


class _Plan(NamedTuple):
    pieces: list[_Piece]
    channels: int  # channels moved at a time
    pitch: int  # values from one pixel to the next in shared memory
    tile: int  # pixels of a tile
    before: int  # pixels loaded before a tile
    front: int  # pixels in shared memory before the first that is loaded
    loaded: int  # pixels loaded, including those before and after the tile
    pixels: int  # pixels in shared memory
    warpgroups: int


def _pieces(taps: list[gpu.Tap]) -> list[_Piece]:
    """Divides the channels of each tap into arithmetic progressions.

    Their lengths are even where possible, since lanes run along them; some channels are moved twice
    to that end.
    """
    pieces = []
    for tap in taps:
        channels = tap.channels.tolist()
        while channels:
            step = channels[1] - channels[0] if len(channels) > 1 else 1
            count = 1
            while count < len(channels) and channels[count] == channels[0] + count * step:
                count += 1
            even = count // 2 * 2
            if even:
                pieces.append(_Piece(tap, channels[0], step, even))
            if even < count:
                position = tap.channels.tolist().index(channels[count - 1])
                pair = tap.channels[max(position - 1, 0) : position + 1].tolist()
                pieces.append(_Piece(tap, pair[0], max(pair[-1] - pair[0], 1), len(pair)))
            channels = channels[count:]
    return pieces


def _rows(piece: _Piece) -> int:
    """Returns the number of pixels per warp: gcd(32, length) of its 32 lanes run along a piece."""
    return 32 // math.gcd(32, piece.length)


def _period(dh: np.ndarray, dw: np.ndarray, unit: int) -> int:
    """Returns the shortest period of the offsets, in channels, that is a multiple of `unit`."""
    channels = dh.size
    for period in range(unit, channels, unit):
        if channels % period == 0 and all(
            np.array_equal(offset, np.tile(offset[:period], channels // period))
            for offset in (dh, dw)
        ):
            return period
    return channels


def _plan(shape, dtype, dh, dw) -> _Plan | str:
    """Returns how these arguments are divided into tiles, or why that is not supported."""
    if len(shape) < 3:
        return f"x has {len(shape)} dimensions, fewer than 3"
    *batch, height, width, channels = shape
    size = np.dtype(dtype).itemsize
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {np.dtype(dtype)}, not bfloat16 or float32"
    if channels * size % 16 or channels == 0:
        return f"a pixel has {channels * size} bytes, not a multiple of 16"
    total = int(np.prod(batch)) * height * width
    if total == 0:
        return "x is empty"
    if total >= 2**31 - 2**16:
        return "x has 2**31 pixels or more"
    at_once = _period(dh, dw, 16 // size)
    if at_once + _PADDINGS[0] // size > gpu.BOX:
        return f"the offsets do not repeat within {gpu.BOX - _PADDINGS[0] // size} channels"
    taps = gpu.taps(dh[:at_once], dw[:at_once], 1, height, width)
    if sum(tap.channels.size for tap in taps) < at_once:
        return "an offset is larger than the image"
    pieces = _pieces(taps)
    if len(pieces) > _MOST_PIECES:
        return f"the channels of an offset are in {len(pieces)} pieces, more than {_MOST_PIECES}"
    # A piece is read in whole steps, the last of which may end beyond the channels.
    needed = max([piece.start + piece.step * piece.length for piece in pieces], default=0)
    pitches = [at_once + padding // size for padding in _PADDINGS]
    pitch = next((pitch for pitch in pitches if pitch >= needed), gpu.BOX + 1)
    if pitch > gpu.BOX:
        return "the channels of an offset lie too far apart"
    reach = max([abs(tap.row * width + tap.column) for tap in taps], default=0)
    front = gpu.round_up(reach, 8)
    for warpgroups, tile in _SHAPES:
        if any(tile % (4 * _rows(piece)) for piece in pieces):
            continue
        before = 0 if tile % (height * width) == 0 else reach
        loaded = gpu.round_up(tile + 2 * before, 8)
        pixels = front + gpu.round_up(max(loaded, before + tile + reach), 8)
        if warpgroups * (_SLOTS * pixels + tile) * pitch * size <= (
            gpu.SHARED_BYTES - gpu.RESERVED_BYTES
        ):
            return _Plan(pieces, at_once, pitch, tile, before, front, loaded, pixels, warpgroups)
    return (
        f"offsets of {reach} pixels at {at_once} channels do not fit into {gpu.SHARED_BYTES} bytes "
        "of shared memory"
    )


def unsupported(shape: tuple[int, ...], dtype: Any, dh: np.ndarray, dw: np.ndarray) -> str | None:
    """Returns why `shift` does not support such an array, in one clause, or None."""
    plan = _plan(shape, dtype, dh, dw)
    return plan if isinstance(plan, str) else None


def shift(x: jax.Array, dh: np.ndarray, dw: np.ndarray, *, interpret: bool = False) -> jax.Array:
    """Computes `y[..., h, w, c] = x[..., h + dh[c], w + dw[c], c]`, and 0 where that lies outside.

    The gradient is the shift by the negated offsets.

    Args:
      x: `[..., H, W, C]` bfloat16 or float32; a pixel must have a multiple of 16 bytes.
      dh, dw: int32 `[C]`.
      interpret: whether to interpret the kernel on the CPU.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: if `unsupported` returns a reason.
    """
    plan = _plan(x.shape, x.dtype, dh, dw)
    if isinstance(plan, str):
        raise ValueError(f"shift has no GPU kernel for this: {plan}")
    *_, height, width, channels = x.shape
    view = x.reshape(-1, channels // plan.channels, plan.channels)
    return _kernel(plan, (height, width), view, interpret).reshape(x.shape)


def _kernel(plan: _Plan, size: tuple[int, int], x: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    height, width = size
    total, chunks, _ = x.shape
    tile, warpgroups = plan.tile, plan.warpgroups
    items = -(-total // tile) * chunks
    blocks = min(gpu.MULTIPROCESSORS, -(-items // warpgroups))
    workers = blocks * warpgroups
    box = gpu.BOX
    copies = [(row, min(box, plan.loaded - row)) for row in range(0, plan.loaded, box)]

    def layout(piece):
        """Returns a register layout that holds single values."""
        rows = _rows(piece)
        lanes = 32 // rows
        if rows == 1:
            tiling = plgpu.Tiling(((4, 32, 1),))
            return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        tiling = plgpu.Tiling(((4 * rows, lanes, 1), (rows, lanes, 1)))
        lane_dims = (-3,) if lanes == 1 else (-3, -2)
        return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=lane_dims, vector_dim=-1)

    def values(ref, row, piece):
        """Returns a reference to a piece's values at a tile of pixels, `[tile, count, 1]`."""
        ref = ref.at[pl.ds(row, tile), pl.ds(piece.start, piece.length * piece.step)]
        return ref.reshape(tile, piece.length, piece.step).at[:, :, pl.ds(0, 1)]

    def simulated(ref, row, piece):
        """Does the same for the interpreter, which cannot reshape: `[tile, count]`."""
        return ref.at[pl.ds(row, tile), pl.ds(piece.start, piece.length, piece.step)]

    def body(x_gmem, y_gmem, image, moved, arrived):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        worker = block * warpgroups + wg
        channels = gpu.padded(block, plan.pitch)
        image, moved = image.at[wg], moved.at[wg]

        def first_pixel(index):
            # Never negative: pixels before the first image are not loaded, and are masked.
            return jnp.maximum(index * tile - plan.before, 0)

        def fetch(item, slot):
            index, chunk = lax.div(item, chunks), lax.rem(item, chunks)
            for row, count in copies:
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(first_pixel(index) + row, count), chunk, channels],
                    image.at[slot, pl.ds(plan.front + row, count)],
                    arrived.at[wg * _SLOTS + slot],
                )

        mine = lax.div(items - worker + (workers - 1), workers)
        for slot in range(_SLOTS):

            @pl.when(slot < mine)
            def _first(slot=slot):
                fetch(worker + slot * workers, slot)

        @pl.loop(0, mine)
        def _item(turn):
            item = worker + turn * workers
            index, chunk = lax.div(item, chunks), lax.rem(item, chunks)
            slot = lax.rem(turn, _SLOTS)
            # The previous result must have left the buffer that this one is written to.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_wait(arrived.at[wg * _SLOTS + slot])
            base = plan.front + index * tile - first_pixel(index)
            for piece in plan.pieces:
                shape = (tile, piece.length, 1)
                source = base + piece.tap.row * width + piece.tap.column
                if interpret:
                    value = simulated(image.at[slot], source, piece)[...].reshape(shape)
                    pixel = lax.broadcasted_iota(jnp.int32, shape, 0)
                else:
                    value = gpu.load(values(image.at[slot], source, piece), layout(piece), False)
                    pixel = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout(piece))
                row, column = gpu.coordinates(index * tile + pixel, height, width)
                keep = gpu.inside(piece.tap, row, column, height, width)
                if keep is not None:
                    value = jnp.where(keep, value, jnp.zeros((), value.dtype))
                if interpret:
                    simulated(moved, 0, piece)[...] = value.reshape(shape[:2])
                else:
                    values(moved, 0, piece)[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(moved, y_gmem.at[pl.ds(index * tile, tile), chunk, channels])

            @pl.when(turn + _SLOTS < mine)
            def _next():
                fetch(item + _SLOTS * workers, slot)

        plgpu.wait_smem_to_gmem(0)

    return gpu.launch(
        body,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[
            plgpu.SMEM((warpgroups, _SLOTS, plan.pixels, plan.pitch), x.dtype),
            plgpu.SMEM((warpgroups, tile, plan.pitch), x.dtype),
            plgpu.Barrier(num_arrivals=len(copies), num_barriers=warpgroups * _SLOTS),
        ],
        blocks=blocks,
        warpgroups=warpgroups,
        interpret=interpret,
    )(x)
