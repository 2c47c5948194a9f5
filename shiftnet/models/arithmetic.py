"""The arithmetic of multiply-adds: their kind, bit operations and energy.

The energies are those of a 45 nm chip at 0.9 V: M. Horowitz, "Computing's energy problem (and what
we can do about it)", ISSCC 2014, figure 1.1.9. They are of the operations alone, without registers,
wires and control. docs/counting.md states the assumptions.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("float", "integer", "shift-add", "sign")

# Picojoules per operation, by its bits.
FLOAT_ADD = {16: 0.4, 32: 0.9}
FLOAT_MULTIPLY = {16: 1.1, 32: 3.7}
INTEGER_ADD = {8: 0.03, 32: 0.1}
INTEGER_MULTIPLY = {8: 0.2, 32: 3.1}
# Picojoules per byte of DRAM: the lower of the table's 1.3 to 2.6 nJ per 64 bits.
DRAM_BYTE = 1300 / 8


class Arithmetic(NamedTuple):
    """How a layer computes each of its multiply-adds.

    Attributes:
      kind: `"sign"`: an addition or subtraction, since one factor is ±1 or 0; `"shift-add"`: shifts
        and additions, since the weight is a power of two or a sum of two; `"integer"`: a
        multiplication of integers; `"float"`: any other.
      weight_bits: bits per weight.
      activation_bits: bits per value of the input.
      picojoules: energy of one.
    """

    kind: str
    weight_bits: int
    activation_bits: int
    picojoules: float

    @property
    def bit_operations(self) -> int:
        """Bit operations of one: bits per weight times bits per value."""
        return self.weight_bits * self.activation_bits


def arithmetic(
    levels: Sequence[int] | None,
    weight_bits: int,
    activation_bits: int | None,
    float_bits: int = 32,
) -> Arithmetic:
    """Finds how a layer computes its multiply-adds.

    Args:
      levels: of its weight, rising; None for a float weight.
      weight_bits: bits per weight that is not float.
      activation_bits: bits per value of its input; None for a float input.
      float_bits: bits per float number, 16 or 32.
    """
    is_float = levels is None or activation_bits is None
    add = FLOAT_ADD[float_bits] if is_float else INTEGER_ADD[32]
    if activation_bits == 1 or (levels is not None and max(map(abs, levels)) <= 1):
        kind, picojoules = "sign", add
    elif levels is not None and (powers := _powers(levels)):
        # The table has no shift. On floats it is an addition to the exponent, of 8 bits.
        shift = INTEGER_ADD[8 if is_float else 32]
        kind, picojoules = "shift-add", powers * (shift + add)
    elif is_float:
        kind, picojoules = "float", FLOAT_MULTIPLY[float_bits] + add
    else:
        width = 8 if max(weight_bits, activation_bits or 0) <= 8 else 32
        kind, picojoules = "integer", INTEGER_MULTIPLY[width] + add
    return Arithmetic(
        kind,
        float_bits if levels is None else weight_bits,
        float_bits if activation_bits is None else activation_bits,
        picojoules,
    )


def _powers(levels: Sequence[int]) -> int | None:
    """Returns how many powers of two, at most two, add up to each level; None where more do.

    Evenly spaced levels are those of integers, whose products are left to a multiplier.
    """
    most = max(abs(level).bit_count() for level in levels)
    steps = {after - before for before, after in itertools.pairwise(levels)}
    return most if most == 1 or (most == 2 and len(steps) > 1) else None
