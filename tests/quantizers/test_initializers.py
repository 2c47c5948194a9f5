"""Weights start as PyTorch's do: uniform within ±1/sqrt(fan_in)."""

import jax
import numpy as np
import pytest
from flax import nnx

from shiftnet.layers import Conv, Linear

pytestmark = pytest.mark.core


def assert_uniform(values, fan_in: int) -> None:
    """Range, mean, variance and quartiles; each limit is several standard errors wide."""
    scaled = np.asarray(values, np.float64).ravel() * fan_in**0.5
    error = scaled.size**-0.5
    assert np.abs(scaled).max() <= 1 + 1e-6
    assert abs(scaled.mean()) < 5 * error * 3**-0.5
    assert abs(scaled.var() - 1 / 3) < 5 * error * (4 / 45) ** 0.5
    np.testing.assert_allclose(
        np.quantile(scaled, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=5 * error
    )


@pytest.mark.parametrize(
    ("shape", "groups", "fan_in"),
    [((16, 64, 1), 1, 16), ((16, 32, 3), 1, 144), ((64, 64, 3), 64, 9), ((3, 64, 7), 1, 147)],
)
def test_convolution(shape, groups, fan_in):
    inside, out, kernel_size = shape
    conv = Conv(inside, out, kernel_size, groups=groups, rngs=nnx.Rngs(0))
    assert conv.weight.shape == (kernel_size, kernel_size, inside // groups, out)
    assert_uniform(conv.weight(), fan_in)


def test_linear_weight_and_bias():
    linear = Linear(64, 1000, rngs=nnx.Rngs(0))
    assert_uniform(linear.weight(), 64)
    assert_uniform(linear.bias[...], 64)


def test_every_layer_and_every_seed_draws_its_own():
    rngs = nnx.Rngs(0)
    first, second = Conv(16, 16, 1, rngs=rngs), Conv(16, 16, 1, rngs=rngs)
    again, other = Conv(16, 16, 1, rngs=nnx.Rngs(0)), Conv(16, 16, 1, rngs=nnx.Rngs(1))
    kernels = [jax.device_get(conv.weight()) for conv in (first, second, other)]
    assert len({kernel.tobytes() for kernel in kernels}) == 3
    np.testing.assert_array_equal(again.weight(), kernels[0])
