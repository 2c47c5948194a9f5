"""Matrices of low-bit weights, packed so that bfloat16 numbers fall out of shifts and masks.

A weight is a sign and a magnitude m, which stands for `unit * 2^m`, or, where zero is a level, for
0 at m = 0 and `unit * 2^(m - 1)` above: 1 bit (sign alone), 2, 3 or 4 bits. bfloat16 keeps the sign
in bit 15 and the exponent from bit 7 up, so a weight whose bits are moved there is the number, up
to one power of two for the whole matrix: no table, no arithmetic on single weights.

**The words.** 32-bit words `[rows, columns]`, columns (output features) innermost. 256 inputs are a
group of 8 word rows for each bit, and those 8 rows are an octet. Word i of an octet holds in its
low half weights of the inputs `k = 16 j + 2 i`, in its high half those of `k + 1`, for several j.
So a few shifts and masks of whole octets give, for one j, 8 rows of words, and these *are* 16 rows
of bfloat16 weights, k in natural order, without moving anything between lanes:

- TPU: 8 rows of 32 bits and 16 rows of 16 bits are the same vector registers; columns are lanes.
- Hopper: two neighbours along k in one 32-bit register are what a tensor core takes as its left
  operand in registers; eight word rows are one step of it (k = 16).

**The bits** (`SLOTS_OF_BITS`) lie so that one shift, mostly to the left, brings as many as possible
of a weight's bits to their places at once. With sign 15 and m at 7, 8, 9:

| bits | slots of j | shifts and masks for 2 weights |
|---|---|---|
| 1 | 16 signs an octet | 1 and 1 |
| 2 | {15, 7} shifted by 0 to 7: 8 an octet | 1 and 1 |
| 3 | {15, 8, 7} shifted by 0, 2, 4, 6: 4 an octet; the last 4, a bit in each octet | 1.5 and 1.5 |
| 4 | {15, 7} as above, and {9, 8} in two octets more | 2 and 2 |

So 3 bits take 3 bits of memory. Three planes of 1 bit would take 3 and 3; a field of 4 bits for a
3-bit weight 1 and 1, but it reads a third more. On an H200 (132 multiprocessors at 1.755 GHz, one
instruction a clock in each of 4 quarters, 4.8 TB/s) memory delivers 55 3-bit weights a clock of a
multiprocessor, or 41 as 4 bits; with 4 instructions for 2 weights (one multiplication makes zeros)
it can expand 64, with 7 (three planes) 36.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 256  # inputs
COLUMNS = 128  # columns are padded to a multiple: lanes of a TPU, whole tiles of a tensor core
SLOTS = 16  # values of j, each 16 inputs
MAX_BITS = 4


class Part(NamedTuple):
    """Where some bits of a slot's weights are: `octet << shift & mask`, right for negative shifts.

    Nothing comes in from the other half: a bit's place in its half, less the shift, is in the half.
    """

    octet: int
    shift: int
    mask: int  # of one half, after the shift


def _three_bits(j: int) -> tuple[Part, ...]:
    if j < 12:
        return (Part(j // 4, j % 4 * 2, 0x8180),)
    place = (14, 12, 10, 0)[j - 12]
    return Part(0, 15 - place, 0x8000), Part(1, 8 - place, 0x0100), Part(2, 7 - place, 0x0080)


def _four_bits(j: int) -> tuple[Part, ...]:
    half, slot = divmod(j, 8)
    shift = 2 * slot if slot <= 4 else 2 * slot - 16
    return Part(half, slot, 0x8080), Part(2 + half, shift, 0x0300)


SLOTS_OF_BITS: dict[int, list[tuple[Part, ...]]] = {
    1: [(Part(0, j, 0x8000),) for j in range(SLOTS)],
    2: [(Part(j // 8, j % 8, 0x8080),) for j in range(SLOTS)],
    3: [_three_bits(j) for j in range(SLOTS)],
    4: [_four_bits(j) for j in range(SLOTS)],
}


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How levels are kept.

    Attributes:
      unit: the smallest magnitude that is not zero.
      zero: whether zero is a level.
      bits: of a weight.
    """

    unit: float
    zero: bool
    bits: int

    @classmethod
    @functools.cache
    def of(cls, levels: tuple[float, ...]) -> "Encoding":
        """The one for these levels.

        Raises:
          ValueError: where they are not zeros and signed powers of two times one number, or span
            more than 4 bits hold.
        """
        magnitudes = sorted({abs(level) for level in levels if level})
        if not magnitudes or not all(map(math.isfinite, levels)):
            raise ValueError(f"levels must be finite numbers and not all zero, got {levels}")
        unit, zero = magnitudes[0], 0 in levels
        if any(math.frexp(m)[0] != math.frexp(unit)[0] for m in magnitudes):
            raise ValueError(f"levels must be 0 or ± powers of two times one number, got {levels}")
        largest = math.frexp(magnitudes[-1])[1] - math.frexp(unit)[1] + zero
        bits = 1 + largest.bit_length()
        if bits > MAX_BITS:
            raise ValueError(f"{levels} need {bits} bits a weight, more than {MAX_BITS}")
        return cls(unit, zero, bits)

    def halves(self, levels: tuple[float, ...]) -> np.ndarray:
        """Each level's sign and magnitude at their places in bfloat16, uint16."""
        exponents = [
            math.frexp(level)[1] - math.frexp(self.unit)[1] + self.zero if level else 0
            for level in levels
        ]
        signs = [level < 0 for level in levels]
        return (np.left_shift(signs, 15) | np.left_shift(exponents, 7)).astype(np.uint16)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale"],
    meta_fields=["shape", "levels"],
)
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix of `levels[code] * scale`, packed; `pack` makes it.

    Attributes:
      words: int32 `[ceil(K / 256) * 8 * bits, ceil(M / 128) * 128]`, see the module's docstring.
      scale: float32 `[ceil(M / 128) * 128]`, a factor for each column.
      shape: `(K, M)`, inputs and outputs.
      levels: what codes stand for.
    """

    words: jax.Array
    scale: jax.Array
    shape: tuple[int, int]
    levels: tuple[float, ...]

    @property
    def encoding(self) -> Encoding:
        return Encoding.of(self.levels)

    @property
    def bits(self) -> int:
        """Of a weight, in memory."""
        return self.encoding.bits

    @property
    def groups(self) -> int:
        """Of 256 inputs; the last may be padded."""
        return -(-self.shape[0] // GROUP)

    @property
    def nbytes(self) -> int:
        """Bytes of words and scale together, the padding included."""
        return self.words.size * 4 + self.scale.size * 4


def pack(
    codes: np.ndarray | jax.Array,
    levels: Sequence[float],
    scale: float | np.ndarray | jax.Array = 1.0,
) -> PackedMatrix:
    """Packs a matrix of `levels[codes] * scale`, on the host.

    Args:
      codes: integers `[K, M]` from 0 to `len(levels) - 1`, known numbers (not traced).
      levels: what they stand for: zeros, and signed powers of two times one number. It takes
        1 bit a weight for one magnitude and no zero, 2 for {0, ±1} and {±1, ±2}, 3 for
        {0, ±1, ±2, ±4} and {±1, ±2, ±4, ±8}, 4 for up to 2^6 with zero and 2^7 without.
      scale: a factor, or one for each column, `[M]`; kept in float32.

    Raises:
      ValueError: for other levels, codes that are not a matrix of such integers, or a scale of
        another shape.
    """
    levels = tuple(map(float, levels))
    encoding = Encoding.of(levels)
    codes = np.asarray(codes)
    if codes.ndim != 2 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers [K, M], got {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= len(levels):
        raise ValueError(
            f"codes must be from 0 to {len(levels) - 1}, found {codes.min()} to {codes.max()}"
        )
    inputs, outputs = codes.shape
    if np.shape(scale) not in ((), (outputs,)):
        raise ValueError(f"scale must have the shape () or ({outputs},), got {np.shape(scale)}")
    groups, columns = -(-inputs // GROUP), -(-outputs // COLUMNS) * COLUMNS
    halves = np.zeros((groups * GROUP, columns), np.uint16)
    halves[:inputs, :outputs] = encoding.halves(levels)[codes]
    halves = halves.reshape(groups, SLOTS, 8, 2, columns)
    words = np.zeros((groups, encoding.bits, 8, 2, columns), np.uint16)
    for j, parts in enumerate(SLOTS_OF_BITS[encoding.bits]):
        for octet, shift, mask in parts:
            bits = halves[:, j] & np.uint16(mask)
            words[:, octet] |= bits >> shift if shift > 0 else bits << -shift
    packed = words[..., 0, :] | (words[..., 1, :].astype(np.uint32) << 16)
    factors = np.zeros(columns, np.float32)
    factors[:outputs] = scale
    return PackedMatrix(
        jnp.asarray(packed.view(np.int32).reshape(-1, columns)),
        jnp.asarray(factors),
        (inputs, outputs),
        levels,
    )


def pairs(octet: Callable[[int], jax.Array], bits: int, j: int) -> jax.Array:
    """The signs and magnitudes of slot j of a group, two in each int32, at bfloat16's places.

    Args:
      octet: gives a group's word rows `8 o` to `8 o + 7`, for `o < bits`.
      bits: of a weight.
      j: below 16.
    """
    result = None
    for index, shift, mask in SLOTS_OF_BITS[bits][j]:
        words = octet(index)
        # What a shift brings in from the other half, or from the sign, is not in the mask.
        if shift > 0:
            words = words << np.int32(shift)
        elif shift < 0:
            words = words >> np.int32(-shift)
        words = words & _both_halves(mask)
        result = words if result is None else result | words
    assert result is not None
    return result


def as_bfloat16(pairs: jax.Array, encoding: Encoding) -> jax.Array:
    """The bits of two bfloat16 numbers in each int32: ±2^(m + 1), and zero where it is a level."""
    exponent = _both_halves(0x4000)  # of 2
    if not encoding.zero:
        return pairs | exponent
    # Added to 127 << 7, any magnitude but 0 carries into bit 14, the exponent's highest.
    return pairs | ((pairs + _both_halves(0x3F80)) & exponent)


def unit_of_bfloat16(encoding: Encoding) -> float:
    """What the numbers of `as_bfloat16` are to be multiplied by to be levels."""
    return encoding.unit / (4 if encoding.zero else 2)


def _both_halves(mask: int) -> np.int32:
    return np.uint32(mask * 0x10001).view(np.int32)
