"""The packed product for TPU: a block of words comes into VMEM, its weights never leave the chip.

The grid goes over tiles of columns and, inside, over blocks of groups of 256 inputs, whose sum
stays in VMEM. Eight rows of words become 16 rows of bfloat16 weights by shifts and masks alone,
because a register of 32-bit words is a register of pairs of bfloat16 rows. Bytes moved: the words
once, x once (its block does not change), the scale and the result once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.packed_matmul import packed as layout
from benchmarks.packed_matmul import thirds
from benchmarks.packed_matmul.packed import PackedMatrix

MAX_ROWS = 64
# All of x stays in VMEM, of which v5e and v6e have 128 MiB.
X_BYTES = 8 * 2**20
# Of words fetched at once: long against the overhead of a step, short against VMEM.
BLOCK_BYTES = 2**20
COLUMNS = (512, 256, layout.COLUMNS)


def unsupported(x: Any, packed: PackedMatrix) -> str | None:
    """Why `matmul` cannot take these, or None; x is an array or a `jax.ShapeDtypeStruct`."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16 or float32"
    parts = 3 if x.dtype == jnp.float32 else 1
    rows, inputs = x.shape
    if not 0 < rows * parts <= MAX_ROWS:
        return f"x has {rows} rows of {x.dtype}, not 1 to {MAX_ROWS // parts}"
    if rows * parts * inputs * 2 > X_BYTES:
        return f"x is {x.shape}, too large to stay on the chip"
    return None


def matmul(x: jax.Array, packed: PackedMatrix, *, interpret: bool = False) -> jax.Array:
    """`x @ expand(packed)` for x `[N, K]`, bfloat16 or float32, N at most 64 (21 in float32)."""
    if x.dtype == jnp.float32:
        return thirds.join(_matmul(thirds.split(x), packed, jnp.float32, interpret))
    return _matmul(x, packed, x.dtype, interpret)


def _matmul(x, packed, dtype, interpret):
    rows, inputs = x.shape
    word_rows, columns = packed.words.shape
    tile = next(tile for tile in COLUMNS if columns % tile == 0)
    of_group = word_rows // packed.groups  # rows
    steps = pl.cdiv(word_rows * tile * 4, BLOCK_BYTES)
    groups = pl.cdiv(packed.groups, steps)  # of a block
    steps = pl.cdiv(packed.groups, groups)
    # The last block's words beyond the array can be anything: every word stands for finite weights.
    x = jnp.pad(x, ((0, 0), (0, steps * groups * layout.GROUP - inputs)))
    product = pl.pallas_call(
        functools.partial(_kernel, encoding=packed.encoding, groups=groups),
        grid=(columns // tile, steps),
        in_specs=[
            pl.BlockSpec(x.shape, lambda m, k: (0, 0)),
            pl.BlockSpec((groups * of_group, tile), lambda m, k: (k, m)),
            pl.BlockSpec((1, tile), lambda m, k: (0, m)),
        ],
        out_specs=pl.BlockSpec((rows, tile), lambda m, k: (0, m)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_shapes=[pltpu.VMEM((rows, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(x, packed.words, packed.scale[None])
    return product[:, : packed.shape[1]]


def _kernel(x_ref, words_ref, scale_ref, out_ref, sum_ref, *, encoding, groups):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add_group(group, total):
        def octet(index):
            return words_ref[pl.ds(pl.multiple_of((group * encoding.bits + index) * 8, 8), 8), :]

        slots = [
            pltpu.bitcast(
                layout.as_bfloat16(layout.pairs(octet, encoding.bits, j), encoding), jnp.bfloat16
            )
            for j in range(layout.SLOTS)
        ]
        start = pl.multiple_of((step * groups + group) * layout.GROUP, layout.GROUP)
        x = x_ref[:, pl.ds(start, layout.GROUP)]
        return total + jnp.dot(x, jnp.concatenate(slots), preferred_element_type=jnp.float32)

    sum_ref[...] = jax.lax.fori_loop(0, groups, add_group, sum_ref[...])

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        factor = scale_ref[...] * layout.unit_of_bfloat16(encoding)
        out_ref[...] = (sum_ref[...] * factor).astype(out_ref.dtype)
