"""The integers that bring a layer's sums to the codes of its output."""

from collections.abc import Sequence

import numpy as np

from shiftnet.errors import UserError
from shiftnet.integers import digits
from shiftnet.integers.graph import INT32, Requantization

LARGEST_MULTIPLIER = 2**15 - 1
# Beyond 2^-MOST a code is not resolved any further.
MOST = 24


def requantization(
    name: str,
    factor: np.ndarray,
    offset: np.ndarray,
    sums: np.ndarray,
    terms: int | None,
    most: int = MOST,
) -> Requantization:
    """Finds multiplier, bias and shift for `round(sum * factor + offset)`, per channel.

    The shift is the largest for which nothing can overflow 32 bits, so that the bias is as exact as
    possible.

    Args:
      name: of the layer, for errors.
      factor: float64 `[channels]`.
      offset: float64 `[channels]`, in codes of the output.
      sums: the largest magnitude of each channel's sums, int64.
      terms: powers of two that a multiplier is the sum of, at most; None allows any multiplier of
        16 bits.
      most: the largest shift.

    Raises:
      UserError: where even a shift of 0 overflows.
    """
    found = [
        _channel(name, float(f), float(o), int(s), terms, most)
        for f, o, s in zip(factor, offset, sums, strict=True)
    ]
    multiplier, bias, shift = (np.array(column) for column in zip(*found, strict=True))
    return Requantization(
        multiplier.astype(np.int16), bias.astype(np.int32), shift.astype(np.uint8)
    )


def sum_requantization(
    name: str, terms_of_sum: Sequence[tuple[float, int]], terms: int | None
) -> tuple[int, ...]:
    """Finds the integers of a sum of codes that have different steps.

    Args:
      name: of the layer, for errors.
      terms_of_sum: for each summand its factor and its largest magnitude.
      terms: as of `requantization`.

    Returns:
      A multiplier for each summand, the bias, and the shift.
    """
    for shift in range(MOST, -1, -1):
        multipliers = [_multiplier(factor * 2.0**shift, terms) for factor, _ in terms_of_sum]
        half = 1 << shift >> 1
        reach = half + sum(
            int(digits.magnitude(np.array(multiplier))) * largest
            for multiplier, (_, largest) in zip(multipliers, terms_of_sum, strict=True)
        )
        if reach <= INT32[1] and max(map(abs, multipliers)) <= LARGEST_MULTIPLIER:
            return (*multipliers, half, shift)
    raise UserError(f"{name} adds numbers whose steps are too different for 32 bits")


def _multiplier(scaled: float, terms: int | None) -> int:
    return round(scaled) if terms is None else digits.nearest(scaled, terms)


def _channel(
    name: str, factor: float, offset: float, largest: int, terms: int | None, most: int
) -> tuple[int, int, int]:
    for shift in range(most, -1, -1):
        scaled = factor * 2.0**shift
        if abs(scaled) > LARGEST_MULTIPLIER:
            continue
        multiplier = _multiplier(scaled, terms)
        if abs(multiplier) > LARGEST_MULTIPLIER:
            continue
        half = 1 << shift >> 1
        bias = round(offset * 2.0**shift) + half
        reach = int(digits.magnitude(np.array(multiplier))) * largest + abs(bias)
        if reach <= INT32[1]:
            return multiplier, bias, shift
    raise UserError(
        f"{name} cannot be brought to its output's codes within 32 bits: its sums reach {largest}, "
        f"times {factor:.3g}, plus {offset:.3g}"
    )
