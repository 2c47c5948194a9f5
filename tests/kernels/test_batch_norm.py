"""Batch normalisation in training, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.kernels.batch_norm import batch_norm

EPSILON = 1e-5


def definition(x, scale, bias, dy, relu, above=None):
    """Result, mean, variance and the gradients of all arguments, in float64.

    `above` says which values the ReLU lets through, where rounding may decide that.
    """
    x, scale, bias, dy = (np.asarray(array, np.float64) for array in (x, scale, bias, dy))
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, var = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(var + EPSILON)
    normalized = (x - mean) * inverse
    y = normalized * scale + bias
    if relu:
        dy, y = np.where(y > 0 if above is None else above, dy, 0), np.maximum(y, 0)
    dscale, dbias = (dy * normalized).sum(axes), dy.sum(axes)
    dx = scale * inverse * (dy - dbias / count - normalized * dscale / count)
    return y, mean, var, dx, dscale, dbias


def arrays(shape, offset=0.0):
    """Random `x`, `scale`, `bias` and `dy`; the channels of x differ in mean and deviation."""
    rng = np.random.default_rng(0)
    channels = shape[-1]
    x = rng.normal(size=shape) * rng.uniform(0.1, 3, channels) + rng.normal(size=channels) + offset
    scale, bias, dy = (
        rng.uniform(-2, 2, channels),
        rng.normal(size=channels),
        rng.normal(size=shape),
    )
    return [np.asarray(array, np.float32) for array in (x, scale, bias, dy)]


def found(x, scale, bias, dy, relu):
    """What the operation makes of it."""

    def call(x, scale, bias):
        y, *statistics = batch_norm(x, scale, bias, epsilon=EPSILON, relu=relu)
        return y, statistics

    y, pull, (mean, var) = jax.vjp(call, x, scale, bias, has_aux=True)
    return y, mean, var, *pull(jnp.asarray(dy))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 9, 7, 16), (2, 5, 5, 42), (128, 3), (1, 2, 2, 1), (4, 11, 13, 130), (1, 5)]
)
def test_is_the_definition_and_its_gradient(shape, relu):
    given = arrays(shape)
    results = found(*given, relu)
    expected_results = definition(*given, relu, np.asarray(results[0]) > 0)
    names = ("y", "mean", "var", "dx", "dscale", "dbias")
    for name, ours, expected in zip(names, results, expected_results, strict=True):
        scale = max(1.0, np.abs(expected).max())
        # A batch of one has no variance: what is left is rounding times 1 / sqrt(epsilon).
        atol = 1e-2 if np.prod(shape[:-1]) == 1 else 2e-5
        np.testing.assert_allclose(ours / scale, expected / scale, atol=atol, err_msg=name)


def test_the_variance_survives_a_mean_that_is_far_larger():
    given = arrays((4, 16, 16, 20), offset=1000.0)
    expected = definition(*given, False)
    np.testing.assert_allclose(found(*given, False)[2], expected[2], rtol=1e-4)


def test_a_constant_channel_becomes_its_bias():
    x = jnp.full((2, 3, 3, 5), 7.25)
    y, _, var = batch_norm(x, jnp.ones(5), jnp.arange(5.0), epsilon=EPSILON)
    assert (var == 0).all()
    np.testing.assert_allclose(y, np.broadcast_to(np.arange(5.0), x.shape), atol=1e-3)
