"""Codes come back out of the bytes that they were packed into, and fill no bit more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiftnet.quantizers import bits

pytestmark = pytest.mark.core


@given(
    width=st.integers(1, 8),
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_come_back(width, shape, seed):
    codes = np.random.default_rng(seed).integers(0, 2**width, shape).astype(np.uint8)
    packed = bits.pack(codes, width)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-codes.size * width // 8),)
    np.testing.assert_array_equal(bits.unpack(packed, width, shape), codes)


def test_bits_lie_as_documented():
    # 3 bits each, the lowest first: 5 = 101, 1 = 001, 6 = 110 -> 101 100 011, then zeros.
    packed = bits.pack(np.array([5, 1, 6], np.uint8), 3)
    assert packed.tolist() == [0b10001101, 0b1]


@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (np.zeros(3, np.uint8), r"expected uint8 \(2,\), found uint8 \(3,\)"),
        (np.zeros(2, np.int8), r"expected uint8 \(2,\), found int8 \(2,\)"),
        (np.array([0, 2], np.uint8), "bits that belong to no weight"),
    ],
)
def test_what_cannot_be_codes_is_refused(packed, sentence):
    with pytest.raises(ValueError, match=sentence):
        bits.unpack(packed, 3, (3,))
