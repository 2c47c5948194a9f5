"""Integers as sums of signed powers of two, of which a product needs one addition each.

The non-adjacent form has the fewest: 7 is 8 - 1, and no integer of 8 bits needs more than 4.
"""

import math

import numpy as np


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the powers that are added and those that are subtracted, as sums, int64.

    `values` is added minus subtracted, and the bits set in the two are the digits.
    """
    x = np.abs(values.astype(np.int64))
    half = x >> 1
    threefold = x + half
    differ = half ^ threefold
    plus, minus = threefold & differ, half & differ
    return np.where(values < 0, minus, plus), np.where(values < 0, plus, minus)


def magnitude(values: np.ndarray) -> np.ndarray:
    """Returns the sum of the digits' magnitudes, int64: 9 for 7."""
    plus, minus = split(values)
    return plus + minus


def count(values: np.ndarray) -> np.ndarray:
    """Returns the number of digits, int64."""
    total = magnitude(values)
    return sum(((total >> place) & 1 for place in range(40)), start=np.zeros_like(total))


def nearest(value: float, terms: int) -> int:
    """Returns an integer of at most `terms` digits near a number: the nearest power first."""
    result, rest = 0, value
    for _ in range(terms):
        if abs(rest) < 0.5:
            break
        exponent = math.floor(math.log2(abs(rest)))
        if abs(rest) > 1.5 * 2.0**exponent:
            exponent += 1
        power = int(math.copysign(2 ** max(exponent, 0), rest))
        result, rest = result + power, rest - power
    return result
