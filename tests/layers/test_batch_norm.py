"""Batch normalisation: PyTorch's statistics, whatever the precision and however it is spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shiftnet.layers import BatchNorm

pytestmark = pytest.mark.core


def test_training_normalises_by_the_biased_variance_and_keeps_the_unbiased():
    bn = BatchNorm(1)
    y = bn(jnp.array([[1.0], [3.0]]), train=True)
    # The mean is 2. The variance is 1 (biased) or 2 (unbiased).
    np.testing.assert_allclose(y, np.array([[-1], [1]]) / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(bn.mean[...], [0.9 * 0 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(bn.var[...], [0.9 * 1 + 0.1 * 2], rtol=1e-6)


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone():
    bn = BatchNorm(2)
    bn.mean.set_value(jnp.array([1.0, 2.0]))
    bn.var.set_value(jnp.array([4.0, 9.0]))
    bn.scale.set_value(jnp.array([2.0, 3.0]))
    bn.bias.set_value(jnp.array([10.0, 20.0]))
    y = bn(jnp.array([[3.0, 5.0], [1.0, 2.0]]))
    np.testing.assert_allclose(y, [[12, 23], [10, 20]], rtol=1e-5)  # epsilon moves the sixth digit
    assert bn.mean[...].tolist() == [1, 2]
    assert bn.var[...].tolist() == [4, 9]


@pytest.mark.parametrize("train", [True, False])
def test_a_relu_and_an_addition_follow(train):
    x, residual = np.random.default_rng(0).normal(size=(2, 4, 3, 3, 5)).astype(np.float32)
    y = BatchNorm(5)(x, train=train)
    for relu, expected in [
        (False, y + residual),
        (True, nnx.relu(y) + residual),
        ("last", nnx.relu(y + residual)),
    ]:
        bn = BatchNorm(5)
        ours = bn(x, train=train, out_relu=relu, residual=residual)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
        assert (bn.mean[...] != 0).any() == train


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3), (2, 4, 5, 3)])
@pytest.mark.usefixtures("float64")
def test_statistics_are_numpys_over_all_but_the_channels(shape):
    x = np.random.default_rng(0).normal(3, 2, shape)
    bn = BatchNorm(3)
    bn.mean.set_value(jnp.zeros(3))  # float64: as precise as the reference
    bn.var.set_value(jnp.ones(3))
    y = bn(jnp.asarray(x), train=True)
    flat = x.reshape(-1, 3)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bn.mean[...], 0.1 * flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(bn.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-12)


def test_bfloat16_input_keeps_float32_statistics():
    # Neighbouring bfloat16 numbers: their mean and variance need more digits than bfloat16 has.
    x = jnp.array([256.0, 258.0] * 500, jnp.bfloat16)[:, None]
    bn = BatchNorm(1)
    y = bn(x, train=True)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(bn))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(bn.mean[...], [25.7], rtol=1e-6)
    np.testing.assert_allclose(bn.var[...], [0.9 + 0.1 * 1000 / 999], rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32)[:2, 0], [-1, 1], rtol=1e-2)


def test_a_large_mean_does_not_drown_the_variance():
    noise = np.random.default_rng(0).normal(0, 1, (4096, 1))
    x = (1000 + noise).astype(np.float32)
    bn = BatchNorm(1)
    bn(jnp.asarray(x), train=True)
    exact = 0.9 + 0.1 * x.astype(np.float64).var(ddof=1)
    np.testing.assert_allclose(bn.var[...], [exact], rtol=1e-5)


def test_a_batch_of_one_value_does_not_divide_by_zero():
    bn = BatchNorm(2)
    bn.bias.set_value(jnp.array([5.0, 6.0]))
    y = bn(jnp.array([[3.0, -4.0]]), train=True)
    assert y.tolist() == [[5, 6]]
    np.testing.assert_allclose(bn.mean[...], [0.3, -0.4], rtol=1e-6)
    np.testing.assert_allclose(bn.var[...], [0.9, 0.9], rtol=1e-6)  # a variance of 0


def test_a_constant_channel_has_finite_gradients():
    bn = BatchNorm(1)
    grads = nnx.grad(lambda bn, x: bn(x, train=True).sum(), argnums=(0, 1))(bn, jnp.ones((4, 1)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.usefixtures("float64")
def test_float64_input_is_computed_in_float64():
    x = 1 + 1e-12 * jnp.arange(4.0)[:, None]  # equal in float32
    y = BatchNorm(1)(x, train=True)
    assert y.dtype == jnp.float64
    assert y[-1, 0] > y[0, 0]


def plain(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The formula of training, for JAX to differentiate by itself."""
    mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale.reshape(1, 1, 1, -1) + bias.reshape(
        1, 1, 1, -1
    )


def applied(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The layer in training with these parameters."""
    bn = BatchNorm(len(scale))
    bn.scale.set_value(scale)
    bn.bias.set_value(bias)
    return bn(x, train=True)


def pulled_back(function, x, scale, bias, dy):
    """Output and gradients, compiled."""

    @jax.jit
    def run(x, scale, bias, dy):
        y, vjp = jax.vjp(function, x, scale, bias)
        return y, *vjp(dy)

    return run(x, scale, bias, dy)


def arguments() -> list[jax.Array]:
    """Images whose means differ, scale, bias, and the gradient at the output."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(4, 3, 2, 5)) + np.arange(4).reshape(4, 1, 1, 1)
    arrays = x, draw.normal(size=5), draw.normal(size=5), draw.normal(size=x.shape)
    return [jnp.asarray(array) for array in arrays]


@pytest.mark.usefixtures("float64")
def test_gradients_are_those_of_the_formula():
    ours, reference = (pulled_back(f, *arguments()) for f in (applied, plain))
    for mine, theirs in zip(ours, reference, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-13)


def test_gradients_of_bfloat16_input_are_summed_in_float32():
    x, scale, bias, dy = arguments()
    rounded = x.astype(jnp.bfloat16), scale, bias, dy.astype(jnp.bfloat16)
    ours = pulled_back(applied, *rounded)
    assert [a.dtype for a in ours] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    reference = pulled_back(plain, *(a.astype(jnp.float32) for a in rounded))
    for mine, theirs, rtol in zip(ours, reference, (8e-3, 8e-3, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=rtol, atol=rtol / 10)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.usefixtures("float64")
def test_a_batch_over_two_devices_is_normalised_as_a_whole():
    x, scale, bias, dy = arguments()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    halves = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = pulled_back(
        applied,
        jax.device_put(x, halves),
        jax.device_put(scale, everywhere),
        jax.device_put(bias, everywhere),
        jax.device_put(dy, halves),
    )
    assert len(spread[0].devices()) == 2
    for mine, theirs in zip(spread, pulled_back(plain, x, scale, bias, dy), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-13)
