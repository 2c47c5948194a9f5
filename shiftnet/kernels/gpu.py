"""What the Mosaic GPU kernels for Hopper share: hardware limits, groups of channels, loads.

Pallas is imported inside functions only, so that a machine without it can import this module.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# An H100 or H200 (SXM) has 132 multiprocessors; a block can use 227 KiB of shared memory.
MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
# Reserved for barriers and for the alignment of every buffer to 1024 bytes.
RESERVED_BYTES = 8 * 1024
# The largest size of a TMA box along a dimension.
BOX = 256
# The largest number of axes that an array can have besides the runs': a TMA box has five axes, of
# which tiles take two, so an array with more has its first axis and the runs' in one.
_AXES_BESIDE_RUNS = 2


class Tap(NamedTuple):
    """The channels with one offset, and what the offset is in the strided image.

    With stride s, output pixel (h, w) reads input pixel (h*s + dh, w*s + dw): pixel (h + row,
    w + column) of the image of every s-th row from `row_phase` on and every s-th column from
    `column_phase` on. These images have the size of the output, so that a shift is an offset of
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
        """Returns the offset in pixels that are numbered through all images."""
        return self.row * width + self.column


def taps(dh: np.ndarray, dw: np.ndarray, stride: int, height: int, width: int) -> list[Tap]:
    """Returns the taps of an output of this size, without those that read only zeros."""
    members: dict[tuple[int, int], list[int]] = {}
    for channel, offset in enumerate(zip(dh.tolist(), dw.tolist(), strict=True)):
        members.setdefault(offset, []).append(channel)
    found = [
        Tap(y % stride, x % stride, y // stride, x // stride, np.array(channels))
        for (y, x), channels in members.items()
    ]
    return [tap for tap in found if abs(tap.row) < height and abs(tap.column) < width]


class Image(NamedTuple):
    """The geometry of a strided product's input and output.

    Attributes:
      height, width: size of the output.
      line: pixels per row of the view of x that copies use.
      taps: the offsets.
    """

    height: int
    width: int
    line: int
    taps: list[Tap]


def image(x: jax.Array, dh: np.ndarray, dw: np.ndarray, stride: int) -> Image | str:
    """Returns how `x [N, H, W, C]` is read at this stride, or why that is not supported."""
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
    """A tile of pixels in shared memory, with the pixels before and after it that offsets reach.

    Attributes:
      line: pixels per row of the view that copies use.
      rows: rows of a tile.
      before: rows loaded before a tile.
      front: pixels in shared memory before the first row that is loaded.
      loaded: rows loaded, including those before and after the tile.
      pixels: pixels in shared memory, including those that are read but masked.
      computed: pixels of a tile, rounded up to a size that the tensor cores support.
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
        """Returns where the pixels of a tile begin in shared memory."""
        return self.front + (index * self.rows - self._first_row(index)) * self.line

    def copies(self, interpret: bool) -> list[tuple[int, int]]:
        """Returns the first row and the number of rows of each copy of a phase."""
        # The interpreter cannot reshape, so its copies of a strided image are single rows.
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
          arrived: barrier for the end of the copies.
          index: index of the tile.
          phase: phase of the strided image.
          block: any grid index.
          interpret: whether the kernel is interpreted.
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
        # Never negative: rows before the first tile are not loaded, and are masked.
        return jnp.maximum(index * self.rows - self.before, 0)


def halo(view: Image, most: int) -> Halo | None:
    """Divides an image into tiles of at most `most` pixels; None if its rows are longer."""
    reach = max(abs(tap.flat(view.width)) for tap in view.taps)
    front = round_up(reach, 8)
    if view.line == 1:
        before = after = reach
    else:
        before = max(0, *(-tap.row for tap in view.taps))
        after = max(0, *(tap.row for tap in view.taps))
    # The copy engine moves multiples of 128 bytes between 128-byte aligned addresses: 8 pixels.
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
    """Returns row and column of pixels that are numbered through all images."""
    pixels = jax.lax.rem(pixels, np.int32(height * width))
    return jax.lax.div(pixels, np.int32(width)), jax.lax.rem(pixels, np.int32(width))


def inside(tap: Tap, row: jax.Array, column: jax.Array, height: int, width: int) -> Any:
    """Returns for which pixels a tap reads inside the image, or None if it does for all."""
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
    """Returns the widest swizzle whose rows divide all these numbers of 2-byte elements."""
    return 2 * math.gcd(64, *elements)


def tiled(swizzle: int) -> tuple[Any, ...]:
    """Returns the transforms of a matrix in shared memory for the tensor cores and TMA copies."""
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # its transforms look abstract to a type checker
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def matrices(*shape: int, part: int = 0) -> Any:
    """Returns shared memory for factors of products that are sliced into `part` columns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(swizzle_bytes(*shape[-2:], part)))


def interpret_params(interpret: bool) -> Any:
    """Returns the `interpret` argument of `plgpu.kernel`: the interpreter's parameters or False."""
    if not interpret:
        return False
    # Private in JAX 0.10.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # As on the hardware, a copy reads zeros outside an array. Memory that no copy wrote is NaN, to
    # reveal results that depend on it.
    return InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")


def compiler_params() -> Any:
    """Returns parameters for lane semantics: the kernels state all layouts and transforms."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def launch(
    kernel: Any, out_type: Any, *, blocks: int, warpgroups: int, interpret: bool, **options: Any
) -> Any:
    """Returns a function of arrays that runs a kernel; its axes are `"block"` (grid) and `"wg"`.

    `jax.vmap` of the function is one kernel too, whose grid has the mapped axis in addition.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def call(runs: int, *arrays: jax.Array) -> Any:
        joined = [runs > 0 and array.ndim - 1 > _AXES_BESIDE_RUNS for array in arrays]
        results = len(jax.tree.leaves(out_type))

        def part(ref: Any, is_joined: bool) -> Any:
            """Returns one run's part of an array or a result."""
            run = jax.lax.axis_index("run")
            if not is_joined:
                return ref.at[run]
            # What is read beyond the end of the first axis is masked, so it may be the next run's.
            size = ref.shape[0] // runs
            return ref.at[pl.ds(run * size, size)]

        def of_run(*refs: Any) -> None:
            of_arrays, scratch = refs[: len(arrays) + results], refs[len(arrays) + results :]
            kernel(*map(part, of_arrays, [*joined, *[False] * results]), *scratch)

        of_run.__name__ = kernel.__name__  # which profiles show

        def stacked(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((runs, *one.shape), one.dtype)

        return plgpu.kernel(
            of_run if runs else kernel,
            out_type=jax.tree.map(stacked, out_type) if runs else out_type,
            grid=(runs, blocks) if runs else (blocks,),
            grid_names=("run", "block") if runs else ("block",),
            num_threads=warpgroups,
            thread_name="wg",
            compiler_params=compiler_params(),
            interpret=interpret_params(interpret),
            **options,
        )(
            *(
                array.reshape(-1, *array.shape[2:]) if is_joined else array
                for array, is_joined in zip(arrays, joined, strict=True)
            )
        )

    @jax.custom_batching.custom_vmap
    def launched(*arrays: jax.Array) -> Any:
        return call(0, *arrays)

    @launched.def_vmap
    def of_several(runs: int, batched: Sequence[bool], *arrays: jax.Array) -> Any:
        stacked = (
            array if has_axis else jnp.broadcast_to(array, (runs, *array.shape))
            for array, has_axis in zip(arrays, batched, strict=True)
        )
        return call(runs, *stacked), jax.tree.map(lambda _: True, out_type)

    return launched


def total(sums: jax.Array, shares: int, chunks: int) -> jax.Array:
    """Adds up the sums of the warpgroups, `[shares * chunks or more, ...]`, to `[chunks, ...]`."""
    return sums[: shares * chunks].reshape(shares, chunks, *sums.shape[1:]).sum(0)


def padded(block: jax.Array, size: int) -> Any:
    """Returns a slice of more channels than there are: copies zero-fill or drop the rest.

    JAX 0.12 rejects such a slice with a constant start.
    """
    from jax.experimental import pallas as pl

    return pl.ds(block * 0, size)


def load(ref: Any, layout: Any, interpret: bool) -> jax.Array:
    """Loads shared memory into registers of this layout, at any row offset."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interpret:  # the interpreter of JAX 0.10 supports no other load
        return ref[...]
    # JAX 0.10 requires an index, 0.11 deprecates it, 0.12 has none.
    parameter = inspect.signature(plgpu.load).parameters.get("idx")
    required = parameter is not None and parameter.default is inspect.Parameter.empty
    index = ((),) if required else ()
    # Rows at any offset are not provably free of bank conflicts, so this is not "optimized".
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def count_up(first: jax.Array, number: int, layout: Any, interpret: bool) -> jax.Array:
    """Returns `first`, `first + 1` and so on in registers of this layout."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    numbers = jax.lax.iota(jnp.int32, number)
    return first + (numbers if interpret else plgpu.layout_cast(numbers, layout))


def multiply_add(acc: Any, a: jax.Array, b: Any, scratch: Any) -> None:
    """Computes `acc += a @ b`; the interpreter needs `scratch` for an `a` in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if scratch is None or not isinstance(a, jax.Array):
        plgpu.wgmma(acc, a, b)
        return
    # The interpreter supports products of references only.
    scratch = scratch.at[:, : a.shape[1]]
    scratch[...] = a
    plgpu.wgmma(acc, scratch, b)


def where_bits(keep: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value` where `keep` is set, and 0 elsewhere; `keep` is for rows or for elements.

    With a mask for rows it takes one instruction for two bfloat16 values.
    """
    mask = jnp.where(keep, np.int16(-1), np.int16(0))
    if mask.shape != value.shape:
        mask = jax.lax.broadcast_in_dim(mask, value.shape, (0,))
    bits = jax.lax.bitcast_convert_type(value, jnp.int16)
    return jax.lax.bitcast_convert_type(bits & mask, value.dtype)
