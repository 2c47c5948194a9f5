"""The packed product for Hopper: weights go from packed words to the tensor cores in registers.

The tensor cores' large side is 64 columns of the matrix, their small side the rows of x: `out^T =
W^T x^T`. A block has a tile of 64 or 128 columns, and its warpgroups share the inputs: each takes
every so-many-th group of 256 inputs, with copies of its own under way (words and the matching part
of x), and adds up its own product; at the end the first one sums all of them through shared memory.
Where there are fewer tiles than multiprocessors, several blocks share the inputs of a tile in the
same way, and XLA adds up their float32 results.

Eight rows of 64 words are the registers of 16 weights of 64 columns already, in the tensor cores'
order (`packed.py`): a thread reads its words from shared memory, shifts and masks, and for levels
with a zero multiplies by 2^127, which turns m in the exponent's place into 2^m, and 0 into 0.

As compiled for an H200, a warp's loop is about 400 instructions for 4096 3-bit weights and 300 for
1-bit ones: at most 41 and 54 weights a clock of a multiprocessor, 4 and 5 times the 10.4 that
memory delivers as bfloat16 (4.8 TB/s, 1.755 GHz). Not measured on a device yet.

Bytes moved: the words once. Every tile reads all of x again, from the second-level cache, which
holds it: `2 K N` bytes, beside `8 K bits` of words for 64 columns. So more than 8 rows take the
wide tiles where there are enough of them. Rows that fill N up to 8 are not read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.packed_matmul import packed as layout
from benchmarks.packed_matmul import thirds
from benchmarks.packed_matmul.packed import Encoding, PackedMatrix
from shiftnet.kernels import gpu

MAX_ROWS = 64
COLUMNS = 64  # of a tensor core instruction
STEP = 64  # inputs a tensor core instruction group takes: 128 bytes of x
SLOTS_OF_STEP = STEP * layout.SLOTS // layout.GROUP
MAX_STAGES = 6


def unsupported(x: Any, packed: PackedMatrix) -> str | None:
    """Why `matmul` cannot take these, or None; x is an array or a `jax.ShapeDtypeStruct`."""
    del packed
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16 or float32"
    parts = 3 if x.dtype == jnp.float32 else 1
    if not 0 < x.shape[0] * parts <= MAX_ROWS:
        return f"x has {x.shape[0]} rows of {x.dtype}, not 1 to {MAX_ROWS // parts}"
    return None


def matmul(x: jax.Array, packed: PackedMatrix, *, interpret: bool = False) -> jax.Array:
    """`x @ expand(packed)` for x `[N, K]`, bfloat16 or float32, N at most 64 (21 in float32)."""
    if x.dtype == jnp.float32:
        return thirds.join(_matmul(thirds.split(x), packed, jnp.float32, interpret))
    return _matmul(x, packed, x.dtype, interpret)


def _matmul(x, packed, dtype, interpret):
    rows, inputs = x.shape
    # Whole tiles of 8 rows and 64 inputs, or a part of one; what else a copy asks for is zeros.
    x = jnp.pad(x, ((0, -rows % 8 if rows > 8 else 0), (0, -inputs % STEP)))
    plan = _Plan.of(gpu.round_up(rows, 8), packed)
    out_dtype = dtype if plan.blocks == 1 else jnp.float32
    out = _kernel(x, packed, plan, out_dtype, interpret)
    if plan.blocks > 1:
        out = out.reshape(plan.blocks, plan.rows, -1).sum(0)
    return out[:rows, : packed.shape[1]].astype(dtype)


class _Plan(NamedTuple):
    rows: int  # of x, filled up
    tile: int  # columns of a block
    blocks: int  # that share the inputs of a tile
    warpgroups: int
    stages: int  # copies that each warpgroup has under way
    word_rows: int  # of a group

    @classmethod
    def of(cls, rows: int, packed: PackedMatrix) -> "_Plan":
        columns = packed.words.shape[1]
        wide = rows > 8 and columns // (2 * COLUMNS) >= gpu.MULTIPROCESSORS
        tile = 2 * COLUMNS if wide else COLUMNS
        tiles = columns // tile
        # As many as run at the same time, but not for less than two turns of each warpgroup.
        blocks = max(1, min(gpu.MULTIPROCESSORS // tiles, packed.groups // 8))
        # One block to a multiprocessor, or else small ones, so that some compute as others start.
        alone = tiles * blocks <= gpu.MULTIPROCESSORS
        warpgroups = 4 if alone and rows <= 32 else 2
        word_rows = 8 * packed.bits
        stage = warpgroups * (word_rows * tile * 4 + rows * layout.GROUP * 2)
        sums = (warpgroups + 1) * tile * rows * 4
        for residents in (1,) if alone else (3, 2, 1):
            room = gpu.SHARED_BYTES // residents - gpu.RESERVED_BYTES - sums
            if room >= 3 * stage:
                break
        turns = -(-packed.groups // (blocks * warpgroups))
        stages = min(MAX_STAGES, room // stage, turns)
        return cls(rows, tile, blocks, warpgroups, stages, word_rows)


def _kernel(x, packed, plan, dtype, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    encoding = packed.encoding
    columns = packed.words.shape[1]
    rows, tile, warpgroups, stages = plan.rows, plan.tile, plan.warpgroups, plan.stages
    workers = plan.blocks * warpgroups
    parts = range(tile // COLUMNS)

    def body(x_gmem, words_gmem, scale_gmem, out_gmem, *scratch):
        words, x_smem, sums, scale, out_smem, left, arrived, scale_arrived, summed = scratch
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        here = pl.ds(lax.axis_index("tile") * tile, tile)
        worker = block * warpgroups + wg
        turns = (packed.groups - worker + workers - 1) // workers

        def fetch(turn):
            slot = lax.rem(turn, stages)
            group = worker + turn * workers
            barrier = arrived.at[wg * stages + slot]
            source = words_gmem.at[pl.ds(group * plan.word_rows, plan.word_rows), here]
            plgpu.copy_gmem_to_smem(source, words.at[wg, slot], barrier)
            all_rows = gpu.padded(block, rows)
            source = x_gmem.at[all_rows, pl.ds(group * layout.GROUP, layout.GROUP)]
            plgpu.copy_gmem_to_smem(source, x_smem.at[wg, slot], barrier)

        for turn in range(stages):

            @pl.when(turn < turns)
            def _first(turn=turn):
                fetch(turn)

        def product(*totals):
            @pl.loop(0, turns)
            def _group(turn):
                slot = lax.rem(turn, stages)
                plgpu.barrier_wait(arrived.at[wg * stages + slot])
                for part in parts:
                    here = pl.ds(part * COLUMNS, COLUMNS)
                    octets = [
                        gpu.load(
                            words.at[wg, slot, pl.ds(8 * octet, 8), here],
                            _words_layout(),
                            interpret,
                        )
                        for octet in range(encoding.bits)
                    ]
                    for start in range(0, layout.GROUP, STEP):
                        first = start * layout.SLOTS // layout.GROUP
                        slots = range(first, first + SLOTS_OF_STEP)
                        weights = _weights(octets, encoding, slots, interpret)
                        x_part = x_smem.at[wg, slot, :, pl.ds(start, STEP)].transpose((1, 0))
                        stand_in = left.at[wg] if interpret else None
                        gpu.multiply_add(totals[part], weights, x_part, stand_in)
                        # The next weights take these registers.
                        plgpu.wgmma_wait(0)

                @pl.when(turn + stages < turns)
                def _next():
                    fetch(turn + stages)

            return tuple(total[...] for total in totals)

        totals = pl.run_scoped(product, *[plgpu.ACC((COLUMNS, rows), jnp.float32) for _ in parts])
        for part, total in zip(parts, totals, strict=True):
            sums[wg, part] = total
        plgpu.barrier_arrive(summed)

        @pl.when(wg == 0)
        def _finish():
            plgpu.copy_gmem_to_smem(scale_gmem.at[here], scale, scale_arrived)
            plgpu.barrier_wait(summed)
            plgpu.barrier_wait(scale_arrived)
            for part in parts:
                here_smem = pl.ds(part * COLUMNS, COLUMNS)
                whole = gpu.load(sums.at[0, part], plgpu.Layout.WGMMA, interpret)
                for other in range(1, warpgroups):
                    whole += gpu.load(sums.at[other, part], plgpu.Layout.WGMMA, interpret)
                by_column = plgpu.Layout.WGMMA.reduce(1)
                factor = gpu.load(scale.at[here_smem], by_column, interpret)
                factor = factor * np.float32(encoding.unit / 2)
                whole = (whole * lax.broadcast_in_dim(factor, whole.shape, (0,))).astype(dtype)
                whole = plgpu.layout_cast(whole, plgpu.Layout.WGMMA_TRANSPOSED)
                out_smem.at[:, here_smem].transpose((1, 0))[...] = whole
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[pl.ds(block * rows, rows), here])
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((warpgroups, stages, plan.word_rows, tile), jnp.int32),
        plgpu.SMEM(
            (warpgroups, stages, rows, layout.GROUP), jnp.bfloat16, transforms=gpu.tiled(2 * STEP)
        ),
        plgpu.SMEM((warpgroups, len(parts), COLUMNS, rows), jnp.float32),
        plgpu.SMEM((tile,), jnp.float32),
        plgpu.SMEM((rows, tile), dtype),
        plgpu.SMEM((warpgroups, COLUMNS, STEP), jnp.bfloat16) if interpret else None,
        plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups * stages),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=warpgroups),
    ]

    def packed_matmul(*refs):
        pl.run_scoped(lambda *scratch: body(*refs, *scratch), *scratch, collective_axes="wg")

    return plgpu.kernel(
        packed_matmul,
        out_type=jax.ShapeDtypeStruct((plan.blocks * rows, columns), dtype),
        grid=(columns // tile, plan.blocks),
        grid_names=("tile", "block"),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=gpu.compiler_params(),
        interpret=gpu.interpret_params(interpret),
    )(x, packed.words, packed.scale)


def _words_layout() -> Any:
    """Words `[8, 64]` in registers: word (i, column) where weights 2 i, 2 i + 1 of a column belong.

    As `plgpu.Layout.WGMMA` for 16-bit `[64, 16]`, but for the order of the axes and with one word
    for two weights.
    """
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiling = fragmented_array.Tiling(((4, 64), (4, 16), (4, 8), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=(-2, -3), vector_dim=-1)


def _weights(
    octets: list[jax.Array], encoding: Encoding, slots: range, interpret: bool
) -> jax.Array:
    """The weights of some slots, bfloat16 `[64, 16 * slots]`: ±2^(m + 1), or ±2^m beside zero."""
    words = []
    for j in slots:
        pairs = layout.pairs(octets.__getitem__, encoding.bits, j)
        words.append(pairs if encoding.zero else layout.as_bfloat16(pairs, encoding))
    weights = _as_weights(words, interpret)
    return weights * jnp.bfloat16(2.0**127) if encoding.zero else weights


def _as_weights(words: list[jax.Array], interpret: bool) -> jax.Array:
    """Words int32 `[8, 64]` each as the bfloat16 `[64, 16 * len(words)]` that they are."""
    if interpret:
        halves = [lax.bitcast_convert_type(w, jnp.bfloat16) for w in words]
        return jnp.concatenate([h.transpose(1, 0, 2).reshape(COLUMNS, 16) for h in halves], axis=1)
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    shape = (COLUMNS, 16 * len(words))
    target = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(_words_layout(),) * len(words), return_type=target)
    def reinterpret(_, *words):
        # Only names change. Both layouts list a thread's registers in the same order: along k in
        # steps of 8 weights, and inside them column c before column c + 8.
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = [utils.bitcast(r, pair) for w in words for r in w.registers.flat]
        wgmma = plgpu.Layout.WGMMA.to_mgpu()
        return mosaic.FragmentedArray(
            _registers=np.array(registers, object).reshape(wgmma.registers_shape(shape)),
            _layout=wgmma,
            _is_signed=None,
        )

    return reinterpret(*words)
