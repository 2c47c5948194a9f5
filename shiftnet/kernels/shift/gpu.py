"""The shift for Hopper: an image's tile comes into shared memory once and leaves it shifted.

Pixels are numbered through all images, which makes every offset a whole number of rows of the
matrix `x[pixels, channels]`. A warpgroup loads a tile of pixels with as many before and after as
the offsets reach (none where a tile is whole images), moves the channels of one offset at a time
from there to the tile's result, with zeros for what wrapped around an image's edge, and stores the
result in one piece. It has its next tile under way meanwhile.

The channels of one offset are every 9th, say, so that single values are moved. That is cheap
enough: the memory's speed asks for 5 values a cycle from each multiprocessor, which can move 32.

Bytes moved per value of b bytes: b read, plus the reach of the offsets on both sides of a tile
(which other blocks read at about the same time and the second-level cache holds), and b written.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shiftnet.kernels import gpu

# Warpgroups of a block and pixels of a tile, best first.
_SHAPES = (
    *((4, 256), (3, 256), (2, 256), (3, 128), (2, 128), (4, 64), (3, 64), (2, 64)),
    *((1, 128), (1, 64)),
)
_SLOTS = 2
_MOST_PIECES = 64
_PADDINGS = (16, 48, 80, 112)  # bytes between two pixels in shared memory


class _Piece(NamedTuple):
    """Channels `start`, `start + step` and so on, which move by one offset."""

    tap: gpu.Tap
    start: int
    step: int
    length: int


class _Plan(NamedTuple):
    pieces: list[_Piece]
    channels: int  # moved at a time
    pitch: int  # values from one pixel to the next in shared memory
    tile: int  # pixels of a tile
    before: int  # pixels loaded before a tile
    front: int  # pixels in shared memory before the first that is loaded
    loaded: int  # pixels loaded, those before and after a tile included
    pixels: int  # pixels in shared memory
    warpgroups: int


def _pieces(taps: list[gpu.Tap]) -> list[_Piece]:
    """The channels of each tap, cut into arithmetic progressions.

    An even number each, as far as possible, since lanes go along them: channels move twice for it.
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
    """Pixels that the 32 lanes of a warp cover: as many lanes as divide a piece go along it."""
    return 32 // math.gcd(32, piece.length)


def _period(dh: np.ndarray, dw: np.ndarray, unit: int) -> int:
    """The fewest channels, a multiple of the unit, after which all offsets repeat."""
    channels = dh.size
    for period in range(unit, channels, unit):
        if channels % period == 0 and all(
            np.array_equal(offset, np.tile(offset[:period], channels // period))
            for offset in (dh, dw)
        ):
            return period
    return channels


def _plan(shape, dtype, dh, dw) -> _Plan | str:
    """How to cut these arguments into tiles, or why that cannot be done."""
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
    # A piece is read as whole steps, the last of which may end beyond the channels.
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
    """Why `shift` cannot take an array like this, in one clause; None when it can."""
    plan = _plan(shape, dtype, dh, dw)
    return plan if isinstance(plan, str) else None


def shift(x: jax.Array, dh: np.ndarray, dw: np.ndarray, *, interpret: bool = False) -> jax.Array:
    """`y[..., h, w, c] = x[..., h + dh[c], w + dw[c], c]`, and 0 where that lies outside.

    The gradient is the same with the offsets negated.

    Args:
      x: `[..., H, W, C]` bfloat16 or float32; the bytes of a pixel are a multiple of 16.
      dh, dw: int32 `[C]`.
      interpret: simulate the kernel on the CPU.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: where `unsupported` gives a reason.
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
        """One value at a time."""
        rows = _rows(piece)
        lanes = 32 // rows
        if rows == 1:
            tiling = plgpu.Tiling(((4, 32, 1),))
            return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        tiling = plgpu.Tiling(((4 * rows, lanes, 1), (rows, lanes, 1)))
        lane_dims = (-3,) if lanes == 1 else (-3, -2)
        return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=lane_dims, vector_dim=-1)

    def values(ref, row, piece):
        """The values of a piece at a tile of pixels, as a reference `[tile, count, 1]`."""
        ref = ref.at[pl.ds(row, tile), pl.ds(piece.start, piece.length * piece.step)]
        return ref.reshape(tile, piece.length, piece.step).at[:, :, pl.ds(0, 1)]

    def simulated(ref, row, piece):
        """The same for the interpreter, which does not reshape: `[tile, count]`."""
        return ref.at[pl.ds(row, tile), pl.ds(piece.start, piece.length, piece.step)]

    def body(x_gmem, y_gmem, image, moved, arrived):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        worker = block * warpgroups + wg
        channels = gpu.padded(block, plan.pitch)
        image, moved = image.at[wg], moved.at[wg]

        def first_pixel(index):
            # Never negative: pixels before the first image are not loaded, and masks drop them.
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
            # The last result has left the buffer that this one goes to.
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
