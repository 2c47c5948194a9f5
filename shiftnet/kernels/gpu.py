"""What the Mosaic GPU kernels for Hopper share: the machine's sizes, groups of channels, loads.

Nothing here imports Pallas when the module is imported: a machine without it loads this too.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# An H100 or H200 (SXM) has 132 multiprocessors, and one block may use 227 KiB of shared memory.
MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
# Left to barriers and to the alignment of every buffer to 1024 bytes.
RESERVED_BYTES = 8 * 1024
# A TMA box reaches this far along every dimension.
BOX = 256


class Tap(NamedTuple):
    """The channels that move by one offset, and where the offset lies in the strided image.

    With stride s, output pixel (h, w) reads input pixel (h*s + dh, w*s + dw): pixel (h + row,
    w + column) of the image that takes every s-th row from `row_phase` and every s-th column from
    `column_phase`. All these images have the size of the output, so that a shift is an offset of
    whole pixels in them at any stride.
    """

    row_phase: int
    column_phase: int
    row: int
    column: int
    channels: np.ndarray

    @property
    def phase(self) -> tuple[int, int]:
        return self.row_phase, self.column_phase

    def flat(self, width: int) -> int:
        """The offset in pixels that are numbered through all images."""
        return self.row * width + self.column


def taps(dh: np.ndarray, dw: np.ndarray, stride: int, height: int, width: int) -> list[Tap]:
    """The taps of an output of this size; without those that read nothing but zeros."""
    members: dict[tuple[int, int], list[int]] = {}
    for channel, offset in enumerate(zip(dh.tolist(), dw.tolist(), strict=True)):
        members.setdefault(offset, []).append(channel)
    found = [
        Tap(y % stride, x % stride, y // stride, x // stride, np.array(channels))
        for (y, x), channels in members.items()
    ]
    return [tap for tap in found if abs(tap.row) < height and abs(tap.column) < width]


class Image(NamedTuple):
    """What a strided product reads and writes.

    Attributes:
      height, width: of the output.
      line: pixels in a row of the copies' view of x.
      taps: the offsets.
    """

    height: int
    width: int
    line: int
    taps: list[Tap]


def image(x: jax.Array, dh: np.ndarray, dw: np.ndarray, stride: int) -> Image | str:
    """How `x [N, H, W, C]` is read at this stride, or why it cannot be."""
    n, height, width, _ = x.shape
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    if stride not in (1, 2):
        return f"the stride is {stride}, not 1 or 2"
    if height % stride or width % stride:
        return f"an image of {height}x{width} pixels has an odd side at stride 2"
    height, width = height // stride, width // stride
    total = n * height * width
    if total == 0:
        return "the batch is empty"
    if total % 8:
        return f"the batch has {total} output pixels, not a multiple of 8"
    if total * stride**2 >= 2**31 - 2**16:
        return "the batch has 2**31 pixels or more"
    found = taps(dh, dw, stride, height, width)
    if not found:
        return "every channel moves out of the image"
    line = 1 if stride == 1 else width
    if line > BOX:
        return f"an output row has {line} pixels, more than {BOX}"
    return Image(height, width, line, found)


class Halo(NamedTuple):
    """A tile of pixels in shared memory, with as many before and after as offsets reach.

    Attributes:
      line: pixels in a row of the copies' view.
      rows: of a tile.
      before: rows loaded before a tile.
      front: pixels in shared memory before the first row that is loaded.
      loaded: rows loaded, those before and after a tile included.
      pixels: in shared memory; all that is read has its place, also what masks drop.
      computed: pixels of a tile, rounded up to what the tensor cores take.
    """

    line: int
    rows: int
    before: int
    front: int
    loaded: int
    pixels: int
    computed: int

    @property
    def tile(self) -> int:
        """Pixels of a tile."""
        return self.rows * self.line

    def base(self, index: Any) -> Any:
        """Where the pixels of a tile begin in shared memory."""
        return self.front + (index * self.rows - self._first_row(index)) * self.line

    def copies(self, interpret: bool) -> list[tuple[int, int]]:
        """First row and number of rows of each copy of a phase."""
        # One row at a time where a copy cannot take several: the interpreter does not reshape.
        box = 1 if interpret and self.line > 1 else BOX
        return [(row, min(box, self.loaded - row)) for row in range(0, self.loaded, box)]

    def fetch(
        self,
        source: Any,
        target: Any,
        arrived: Any,
        index: Any,
        phase: tuple[int, int] = (0, 0),
        *,
        block: Any,
        interpret: bool,
    ) -> None:
        """Starts the copies of a tile.

        Args:
          source: the image `[rows, channels]`, or strided `[rows, 2, line, 2, channels]`.
          target: shared memory, `[pixels, more than channels]`.
          arrived: the barrier that waits for the copies.
          index: of the tile.
          phase: of the strided image.
          block: any index of the grid.
          interpret: whether the kernel is simulated.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        pitch = target.shape[-1]
        first = self._first_row(index)
        for row, count in self.copies(interpret):
            rows: Any = pl.ds(first + row, count)
            part = target.at[pl.ds(self.front + row * self.line, count * self.line)]
            where: tuple[Any, ...] = (rows,)
            if self.line > 1:
                if count > 1:
                    part = part.reshape(count, self.line, pitch)
                else:
                    rows = first + row
                where = (rows, phase[0], pl.ds(0, self.line), phase[1])
            plgpu.copy_gmem_to_smem(source.at[(*where, padded(block, pitch))], part, arrived)

    def _first_row(self, index: Any) -> Any:
        # Never negative: rows before the first tile are not loaded, and masks drop them.
        return jnp.maximum(index * self.rows - self.before, 0)


def halo(view: Image, most: int) -> Halo | None:
    """How to cut an image into tiles of at most `most` pixels; None where no row is that short."""
    reach = max(abs(tap.flat(view.width)) for tap in view.taps)
    front = round_up(reach, 8)
    if view.line == 1:
        before = after = reach
    else:
        before = max(0, *(-tap.row for tap in view.taps))
        after = max(0, *(tap.row for tap in view.taps))
    # The copy engine moves multiples of 128 bytes to multiples of 128 bytes: 8 pixels.
    unit = 8 // math.gcd(view.line, 8)
    rows = most // view.line // unit * unit
    if rows == 0:
        return None
    if rows * view.line % (view.height * view.width) == 0:
        before = after = 0  # whole images
    computed = round_up(rows * view.line, 64)
    loaded = round_up(before + rows + after, unit)
    pixels = max(loaded * view.line, before * view.line + computed + reach)
    return Halo(view.line, rows, before, front, loaded, front + round_up(pixels, 8), computed)


def coordinates(pixels: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of pixels that are numbered through all images."""
    pixels = jax.lax.rem(pixels, np.int32(height * width))
    return jax.lax.div(pixels, np.int32(width)), jax.lax.rem(pixels, np.int32(width))


def inside(tap: Tap, row: jax.Array, column: jax.Array, height: int, width: int) -> Any:
    """Which of the pixels at these rows and columns a tap reads inside the image; None for all."""
    masks = []
    for offset, position, size in ((tap.row, row, height), (tap.column, column, width)):
        if offset < 0:
            masks.append(position >= np.int32(-offset))
        if offset > 0:
            masks.append(position < np.int32(size - offset))
    return functools.reduce(jax.lax.bitwise_and, masks) if masks else None


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def swizzle_bytes(*elements: int) -> int:
    """The widest swizzle whose rows divide all these numbers of 2-byte elements."""
    return 2 * math.gcd(64, *elements)


def tiled(swizzle: int) -> tuple[Any, ...]:
    """The transforms of a shared-memory matrix that the tensor cores or a TMA copy access."""
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # its transforms look abstract to a type checker
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def matrices(*shape: int, part: int = 0) -> Any:
    """Shared memory for factors of products, which are cut into parts of so many columns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(swizzle_bytes(*shape[-2:], part)))


def interpret_params(interpret: bool) -> Any:
    """What `plgpu.kernel` takes as `interpret`: the simulation on a CPU, or False."""
    if not interpret:
        return False
    # Private in JAX 0.10.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # Outside an array a copy reads zeros, as the hardware does. What no copy wrote is NaN, so that
    # nothing may depend on it.
    return InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")


def compiler_params() -> Any:
    """Lane semantics: the kernels state each layout and transform instead of having them found."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def launch(
    kernel: Any, out_type: Any, *, blocks: int, warpgroups: int, interpret: bool, **options: Any
) -> Any:
    """The function of arrays that runs a kernel: axis `"block"` of the grid, `"wg"` inside one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=compiler_params(),
        interpret=interpret_params(interpret),
        **options,
    )


def total(sums: jax.Array, shares: int, chunks: int) -> jax.Array:
    """`[chunks, ...]` of the sums of each warpgroup `[shares * chunks or more, ...]`."""
    return sums[: shares * chunks].reshape(shares, chunks, *sums.shape[1:]).sum(0)


def padded(block: jax.Array, size: int) -> Any:
    """The channels from the first on, more than there are: copies fill or drop the rest.

    JAX 0.12 refuses such a slice where it starts at a constant.
    """
    from jax.experimental import pallas as pl

    return pl.ds(block * 0, size)


def load(ref: Any, layout: Any, interpret: bool) -> jax.Array:
    """Reads shared memory into registers of this layout, at any row offset."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interpret:  # the interpreter of JAX 0.10 knows no other load
        return ref[...]
    # JAX 0.10 requires an index, 0.11 deprecates it, 0.12 has none.
    parameter = inspect.signature(plgpu.load).parameters.get("idx")
    required = parameter is not None and parameter.default is inspect.Parameter.empty
    index = ((),) if required else ()
    # Rows at any offset are not provably free of bank conflicts, so this is not "optimized".
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def count_up(first: jax.Array, number: int, layout: Any, interpret: bool) -> jax.Array:
    """`first`, `first + 1` and so on in registers of this layout."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    numbers = jax.lax.iota(jnp.int32, number)
    return first + (numbers if interpret else plgpu.layout_cast(numbers, layout))


def multiply_add(acc: Any, a: jax.Array, b: Any, scratch: Any) -> None:
    """`acc += a @ b`; with `a` in registers through `scratch`, which the interpreter needs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if scratch is None or not isinstance(a, jax.Array):
        plgpu.wgmma(acc, a, b)
        return
    # The interpreter multiplies references only.
    scratch = scratch.at[:, : a.shape[1]]
    scratch[...] = a
    plgpu.wgmma(acc, scratch, b)


def where_bits(keep: jax.Array, value: jax.Array) -> jax.Array:
    """`value` in the rows, or at the places, to keep and 0 elsewhere.

    1 instruction for 2 bfloat16 values where there is 1 mask for a row.
    """
    mask = jnp.where(keep, np.int16(-1), np.int16(0))
    if mask.shape != value.shape:
        mask = jax.lax.broadcast_in_dim(mask, value.shape, (0,))
    bits = jax.lax.bitcast_convert_type(value, jnp.int16)
    return jax.lax.bitcast_convert_type(bits & mask, value.dtype)
