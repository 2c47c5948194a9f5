"""Convolution, against plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.layers import Conv

pytestmark = pytest.mark.core


def sums(x: np.ndarray, kernel: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """The convolution as its definition: `[N, H, W, C]` and `[k, k, C / groups, O]`."""
    n, height, width, _ = x.shape
    k, _, per_group, out = kernel.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    y = np.zeros((n, -(-height // stride), -(-width // stride), out))
    for h in range(y.shape[1]):
        for w in range(y.shape[2]):
            for o in range(out):
                first = o // (out // groups) * per_group
                window = padded[:, h * stride :, w * stride :, first : first + per_group]
                y[:, h, w, o] = (window[:, :k, :k] * kernel[..., o]).sum((1, 2, 3))
    return y


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (5, 1), (1, 6), (3, 6)])
@pytest.mark.usefixtures("float64")
def test_is_the_sum_over_the_window(kernel_size, groups, stride, size):
    out = 6 if groups > 1 else 4
    conv = nnx.eval_shape(
        lambda: Conv(6, out, kernel_size, stride=stride, groups=groups, rngs=nnx.Rngs(0))
    )
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, *size, 6)), random.normal(size=conv.weight.shape)
    conv.weight.value.set_value(jnp.asarray(kernel))
    y = conv(jnp.asarray(x))
    expected = sums(x, kernel, stride, groups)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_computes_in_the_inputs_precision_with_float32_parameters(kernel_size):
    conv = Conv(3, 4, kernel_size, rngs=nnx.Rngs(0))
    y = conv(jnp.ones((1, 4, 4, 3), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert conv.weight().dtype == jnp.float32
    gradient = jax.grad(lambda x: conv(x).astype(jnp.float32).sum())(jnp.ones((1, 4, 4, 3)))
    assert gradient.dtype == jnp.float32
