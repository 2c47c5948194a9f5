"""Low-bit weights as data: the one encoding that everything outside of training reads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["levels"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight with few values, `levels[codes] * scale`; calling it computes that.

    Packed files, exported programs, counts and the telemetry of training all read this; only a
    `LowBitWeight` makes it.

    Attributes:
      codes: index of each weight's level, uint8 of the weight's shape.
      scale: what levels are multiplied by: a number, or an array that broadcasts with the weight
        (`[]` for one scale per layer, `[out_features]` for one per output channel).
      levels: the integers that a weight can be before it is scaled, rising.
    """

    codes: jax.Array
    scale: jax.Array | float
    levels: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return bits_of(self.levels)

    def __call__(self) -> jax.Array:
        """Returns the weight, in the dtype of the scale; in float32 where that is a number."""
        dtype = jnp.result_type(self.scale) if isinstance(self.scale, jax.Array) else jnp.float32
        return jnp.asarray(self.levels, dtype)[self.codes.astype(jnp.int32)] * self.scale


def bits_of(levels: tuple[int, ...]) -> int:
    """Returns the bits of an index of these levels."""
    return (len(levels) - 1).bit_length()


def packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Returns the bytes of a weight of this shape at `bits` bits each, rounded up."""
    return -(-math.prod(shape) * bits // 8)
