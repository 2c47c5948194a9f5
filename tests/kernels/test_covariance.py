"""Sums of pixels and of their outer products in C++ on a CPU, against those in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftnet.kernels.covariance import covariance
from tests.kernels.test_conv import needs_library


def pixels(shape, seed=0):
    """Random ones whose channels have means of their own, of up to a hundred deviations."""
    rng = np.random.default_rng(seed)
    means = 100 * rng.uniform(-1, 1, shape[-1])
    return (means + rng.standard_normal(shape)).astype(np.float32)


def check(x):
    total, products = covariance(jnp.asarray(x), implementation="cpu")
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    np.testing.assert_allclose(total, flat.sum(0), rtol=3e-6, atol=1e-4)
    np.testing.assert_allclose(products, centred.T @ centred, rtol=1e-5, atol=1e-5 * len(flat))


@needs_library
@pytest.mark.parametrize(
    "shape", [(8, 16, 16, 16), (3, 7, 5, 9), (1, 3), (5, 2, 2, 64), (2, 4, 4, 130), (70, 33, 32, 3)]
)
def test_sums_are_those_of_all_pixels(shape):
    check(pixels(shape))


@needs_library
@settings(max_examples=25)
@given(st.tuples(st.integers(1, 200), st.integers(1, 9), st.integers(1, 40)), st.integers(0, 9))
def test_any_shape_is_right(shape, seed):
    check(pixels(shape, seed))


@needs_library
def test_images_that_differ_lose_few_digits():
    """What is looked at before tells little of the mean where few images are far from the rest."""
    x = pixels((64, 8, 8, 4))
    x[:3] += 3000
    check(x)


@needs_library
def test_a_constant_channel_has_no_negative_square():
    """Rounding leaves a little less than nothing for a third of these constants."""
    x = np.ones((32, 32, 32, 64), np.float32) * (np.arange(1, 65, dtype=np.float32) / 10)
    _, products = covariance(jnp.asarray(x), implementation="cpu")
    assert np.diagonal(products).min() >= 0
    x[0, 0, 0] = np.nan
    assert np.isnan(covariance(jnp.asarray(x), implementation="cpu")[1]).all()


@needs_library
def test_gradients_and_stacks_are_those_of_the_plain_form():
    x = jnp.asarray(pixels((3, 2, 5, 4, 6)))

    def gradients(implementation):
        def loss(x):
            total, products = covariance(x, implementation=implementation)
            return jnp.sin(total / 40).sum() + jnp.sin(products / 40).sum()

        return jax.vmap(jax.value_and_grad(loss))(x)

    jax.tree.map(
        lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4),
        gradients("cpu"),
        gradients("xla"),
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="floating"):
        covariance(jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="unknown implementation 'gpu' of covariance"):
        covariance(jnp.ones((2, 4)), implementation="gpu")
    with pytest.raises(ValueError, match="has a centre"):
        covariance(jnp.ones((2, 4)), jnp.ones(4), implementation="cpu")
