"""Batch normalisation in C++ on a CPU, against its definition in float64."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.kernels import native
from shiftnet.kernels.batch_norm import batch_norm

pytestmark = pytest.mark.skipif(
    native.load().library is None, reason=str(native.load().reason or "")
)
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


def found(x, scale, bias, dy, relu, implementation="cpu"):
    """What an implementation makes of it."""

    def call(x, scale, bias):
        y, *statistics = batch_norm(
            x, scale, bias, epsilon=EPSILON, relu=relu, implementation=implementation
        )
        return y, statistics

    y, pull, (mean, var) = jax.vjp(call, x, scale, bias, has_aux=True)
    return y, mean, var, *pull(jnp.asarray(dy))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 9, 7, 16), (2, 5, 5, 42), (128, 3), (1, 2, 2, 1), (4, 11, 13, 130), (1, 5)]
)
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_is_the_definition_and_its_gradient(shape, relu, implementation):
    given = arrays(shape)
    results = found(*given, relu, implementation)
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
    y, _, var = batch_norm(x, jnp.ones(5), jnp.arange(5.0), epsilon=EPSILON, implementation="cpu")
    assert (var == 0).all()
    np.testing.assert_allclose(y, np.broadcast_to(np.arange(5.0), x.shape), atol=1e-3)


def test_the_same_bits_for_any_number_of_threads():
    program = "from tests.kernels.test_batch_norm import print_digest; print_digest()"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "NPROC": threads},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "5")
    }
    (digest,) = digests
    assert len(digest) > 60


def print_digest():
    """What the test above runs in processes of its own."""
    results = found(*arrays((40, 16, 16, 42)), True)
    print(hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest())


def test_stacked_networks_have_their_own_statistics():
    x, scale, bias, _ = arrays((3, 2, 4, 4, 5))
    one = lambda x, implementation: batch_norm(  # noqa: E731
        x, jnp.asarray(scale), jnp.asarray(bias), epsilon=EPSILON, implementation=implementation
    )
    for ours, plain in zip(
        jax.vmap(lambda x: one(x, "cpu"))(x), jax.vmap(lambda x: one(x, "xla"))(x), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_batch_on_two_devices_is_left_to_the_compiler():
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    x, scale, bias, dy = arrays((4, 3, 3, 5))

    def call(x, scale, bias):
        return batch_norm(x, scale, bias, epsilon=EPSILON)

    assert "shiftnet_batch_norm" in jax.jit(call).lower(x, scale, bias).as_text()
    with jax.set_mesh(mesh):
        lowered = jax.jit(call).lower(x, scale, bias)
        assert "shiftnet_batch_norm" not in lowered.as_text()
        y = lowered.compile()(x, scale, bias)[0]
    np.testing.assert_allclose(y, definition(x, scale, bias, dy, False)[0], atol=1e-4)


def test_what_does_not_fit_is_refused():
    x, scale = jnp.ones((2, 3)), jnp.ones(3)
    with pytest.raises(ValueError, match="shape"):
        batch_norm(x, jnp.ones(4), scale, epsilon=EPSILON)
    with pytest.raises(ValueError, match="unknown implementation"):
        batch_norm(x, scale, scale, epsilon=EPSILON, implementation="gpu")
    with pytest.raises(ValueError, match="needs float32"):
        batch_norm(x.astype(jnp.bfloat16), scale, scale, epsilon=EPSILON, implementation="cpu")
