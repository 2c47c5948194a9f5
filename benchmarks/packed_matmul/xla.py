"""The packed product in plain XLA: expand all weights, then one product."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.packed_matmul import packed as layout
from benchmarks.packed_matmul.packed import PackedMatrix


def matmul(x: jax.Array, packed: PackedMatrix) -> jax.Array:
    """`x @ expand(packed)`, accumulated in float32 (float64 for float64); x is `[N, K]`.

    The product is with powers of two, which bfloat16 holds exactly; the scale comes after it.
    """
    accumulate = accumulator(x.dtype)
    dtype = x.dtype if x.dtype == jnp.bfloat16 else accumulate
    product = jnp.dot(
        x.astype(dtype),
        powers(packed, dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulate,
    )
    return (product * factors(packed).astype(accumulate)).astype(x.dtype)


def accumulator(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What products of this dtype are summed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def powers(packed: PackedMatrix, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The weights without `factors`, `[K, M]`: zeros and signed powers of two, exact."""
    encoding, columns = packed.encoding, packed.words.shape[1]
    words = packed.words.reshape(packed.groups, encoding.bits, 8, columns)
    bits = layout.as_bfloat16(_pairs(words, layout.SLOTS_OF_BITS[encoding.bits]), encoding)
    # bfloat16 is the upper half of float32. Of [groups, slots, 8, half] the half is k's lowest bit.
    halves = jnp.stack([bits << np.int32(16), bits & np.int32(-0x10000)], axis=3)
    dense = jax.lax.bitcast_convert_type(halves, jnp.float32).reshape(-1, columns)
    return dense[: packed.shape[0], : packed.shape[1]].astype(dtype)


def _pairs(words: jax.Array, slots: list[tuple[layout.Part, ...]]) -> jax.Array:
    """`layout.pairs` of all slots of all groups, `[groups, 16, 8, columns]`."""
    result = None
    for number in range(max(map(len, slots))):
        parts = [s[number] if number < len(s) else layout.Part(0, 0, 0) for s in slots]
        octets, shifts, masks = np.array(parts).T
        found = words[:, octets]
        shifts = shifts.astype(np.int32)[:, None, None]
        found = jnp.where(shifts < 0, found >> -shifts.clip(max=0), found << shifts.clip(min=0))
        found = found & (masks * 0x10001).astype(np.uint32).view(np.int32)[:, None, None]
        result = found if result is None else result | found
    assert result is not None
    return result


def factors(packed: PackedMatrix) -> jax.Array:
    """What a column of `powers` is to be multiplied by, float32 `[M]`."""
    return packed.scale[: packed.shape[1]] * unit(packed)


def unit(packed: PackedMatrix) -> np.float32:
    """What `powers` are to be multiplied by to be levels."""
    return np.float32(layout.unit_of_bfloat16(packed.encoding))
