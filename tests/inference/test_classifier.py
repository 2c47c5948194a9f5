"""A loaded network within JAX's transformations; tests/test_doors.py has what users meet first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shiftnet
from shiftnet import packing
from tests.test_packing import images, note, small


@pytest.fixture
def model(tmp_path):
    network, recipe = small("s3")
    packing.write(tmp_path / "net.safetensors", network, note(recipe))
    return shiftnet.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "transform",
    [
        *(jax.jit, jax.eval_shape, jax.grad),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (jax.make_jaxpr, jax.vmap)),
    ],
)
def test_the_first_call_may_be_traced(model, transform):
    x = jnp.asarray(images())
    if transform is jax.eval_shape:
        assert jax.eval_shape(model, x).shape == (3, 10)
    elif transform is jax.vmap:
        assert jax.vmap(model)(x[None]).shape == (1, 3, 10)
    elif transform is jax.grad:
        assert jax.grad(lambda x: model(x).sum())(x).shape == x.shape
    else:
        transform(model)(x)
    logits = np.asarray(model(x))  # fails where something of the trace was kept
    np.testing.assert_allclose(jax.jit(model)(x), logits, rtol=1e-4, atol=1e-4 * abs(logits).max())
