"""The linear layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.layers import Linear

pytestmark = pytest.mark.core


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_is_a_matrix_product_and_a_bias(batch):
    linear = Linear(5, 3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(*batch, 5)).astype(np.float32)
    expected = x @ np.asarray(linear.weight()) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_computes_in_the_inputs_precision_with_float32_parameters():
    linear = Linear(5, 3, rngs=nnx.Rngs(0))
    assert linear(jnp.ones((2, 5), jnp.bfloat16)).dtype == jnp.bfloat16
    assert linear.weight().dtype == linear.bias.dtype == jnp.float32
