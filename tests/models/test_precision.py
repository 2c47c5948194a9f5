"""Which precision a network computes in, keeps its numbers in, and answers in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import networks
from tests.models.test_build import SMALL, config

IMAGES = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
LABELS = np.arange(8)


@functools.cache
def step(family: str, compute: str, given: str):
    """One step of a network on images of a dtype.

    Returns logits in evaluation, logits in training, gradients, and statistics afterwards.
    """
    model = networks.random(config(f"{family}8", dtype=compute), 10)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, x):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits = model(x, train=True)
            return networks.cross_entropy(LABELS)(logits), (logits, nnx.state(model, nnx.BatchStat))

        grads, (logits, new_stats) = jax.grad(loss, has_aux=True)(params)
        return nnx.merge(graphdef, params, stats)(x), logits, grads, new_stats

    return run(params, jnp.asarray(IMAGES.astype(given)))


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def joined(tree) -> np.ndarray:
    """All numbers in a row."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def relative_error(ours, theirs) -> float:
    """Root mean square of the difference, over the reference's."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


@pytest.mark.core
@pytest.mark.parametrize("given", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.covering
@pytest.mark.usefixtures("float64")
def test_logits_come_in_the_inputs_precision(given, compute, train):
    model = networks.abstract(config("shiftresnet8", dtype=compute), 10)
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), given)
    logits = nnx.eval_shape(lambda model, x: model(x, train=train), model, x)
    assert logits.dtype == given


@pytest.mark.core
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.covering
def test_parameters_and_statistics_are_float32(family, compute, wide):
    with jax.enable_x64(wide):
        model = networks.abstract(config(f"{family}8", dtype=compute), 10)
    assert dtypes(nnx.state(model)) == {"float32"}


@pytest.mark.parametrize(
    "family",
    [
        "shiftresnet",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in ("resnet", "depthwiseresnet", "wrn")
        ),
    ],
)
def test_bfloat16_network_keeps_float32_numbers_and_stays_close_to_float32(family):
    reference = step(family, "float32", "float32")
    evaluated, trained, grads, stats = step(family, "bfloat16", "float32")
    assert evaluated.dtype == trained.dtype == jnp.float32  # the input's
    assert dtypes(grads) == dtypes(stats) == {"float32"}
    assert np.isfinite(joined(grads)).all()
    assert 1e-4 < relative_error(evaluated, reference[0]) < 0.02  # above: it did use bfloat16
    assert 1e-4 < relative_error(trained, reference[1]) < 0.02
    # ReLUs that switch near zero make gradients ten times as sensitive as outputs.
    assert relative_error(*(joined(tree) for tree in (grads, reference[2]))) < 0.25
    for ours, theirs in zip(jax.tree.leaves(stats), jax.tree.leaves(reference[3]), strict=True):
        assert relative_error(ours, theirs) < 0.02


def test_bfloat16_input_to_a_float32_network_gives_bfloat16_logits():
    evaluated, trained, grads, stats = step("shiftresnet", "float32", "bfloat16")
    assert evaluated.dtype == trained.dtype == jnp.bfloat16
    assert dtypes(grads) == dtypes(stats) == {"float32"}


@pytest.mark.usefixtures("float64")
def test_float64_input_gives_float64_logits_from_float32_parameters():
    evaluated, trained, grads, stats = step("shiftresnet", "float32", "float64")
    assert evaluated.dtype == trained.dtype == jnp.float64
    assert dtypes(grads) == dtypes(stats) == {"float32"}
    in_float32 = step("shiftresnet", "float32", "float32")
    assert 1e-9 < relative_error(in_float32[0], evaluated) < 1e-5  # above: it did use float64
    assert 1e-9 < relative_error(in_float32[1], trained) < 1e-5
