"""The shift as a layer; what it does is tested at tests/kernels/test_shift.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.kernels.shift import shift
from shiftnet.layers import Conv, Shift

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (5, 2), (2, 1)])
def test_layer_is_the_operation_and_has_no_state(kernel_size, dilation):
    layer = Shift(kernel_size, dilation)
    x = jnp.arange(2 * 6 * 5 * 30, dtype=jnp.float32).reshape(2, 6, 5, 30)
    np.testing.assert_array_equal(layer(x), shift(x, kernel_size, dilation))
    assert not jax.tree.leaves(nnx.state(layer))


def test_stands_in_for_a_convolution_as_its_documentation_shows():
    layer = nnx.Sequential(Shift(3), Conv(64, 128, 1, rngs=nnx.Rngs(0)))
    assert layer(jnp.ones((2, 8, 8, 64))).shape == (2, 8, 8, 128)


def test_a_bad_kernel_size_is_named():
    with pytest.raises(ValueError, match="kernel_size 0"):
        Shift(0)(jnp.ones((1, 4, 4, 9)))
