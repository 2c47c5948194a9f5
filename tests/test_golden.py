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
@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("block_shiftconv", "i16_o32_s2_e1_8x8"),
        ("block_depthwise_noskip", "i12_o20_s2_r0.5_9x7"),
        ("block_mobile", "i12_o20_s2_r0.5_9x7"),
        ("block_shuffle", "i12_o20_s2_r0.9_9x7"),
    ],
)
def test_golden_block_is_the_original(group, name):
    case = oracle.case(group, name)
    golden = oracle.read(oracle.GOLDEN / f"{group}_{name}.npz")
    assert set(golden) == {name for name in case.arrays if "num_batches" not in name}
    for name, value in golden.items():
        original = case.arrays[name]
        summarised = "grad" in name or name.endswith("/y")
        np.testing.assert_array_equal(value, oracle.summary(original) if summarised else original)
