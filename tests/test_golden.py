"""The numbers in tests/golden are the original's."""

import numpy as np
import pytest

from tests import oracle


@oracle.needed
@pytest.mark.parametrize(("values", "table"), [("x", "y_from"), ("cotangent", "grad_from")])
def test_golden_shift_moves_what_the_original_moved(values, table):
    case = oracle.case("shift", "k3d1_c20_7x9")
    source = oracle.read(oracle.GOLDEN / "shift_k3d1_c20_7x9.npz")[table]
    x, y = case.arrays[values][:1], case.arrays["y" if values == "x" else "grad_x"][:1]
    np.testing.assert_array_equal(np.where(source >= 0, x.ravel()[source], 0), y)


@oracle.needed
def test_golden_block_is_the_original():
    case = oracle.case("block_shiftconv", "i16_o32_s2_e1_8x8")
    golden = oracle.read(oracle.GOLDEN / "block_shiftconv_i16_o32_s2_e1_8x8.npz")
    assert set(golden) == {name for name in case.arrays if "num_batches" not in name}
    for name, value in golden.items():
        original = case.arrays[name]
        summarised = "grad" in name or name.endswith("/y")
        np.testing.assert_array_equal(value, oracle.summary(original) if summarised else original)
