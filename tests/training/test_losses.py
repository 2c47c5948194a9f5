"""Losses and their gradients against PyTorch's numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.config import default_config
from shiftnet.training.losses import (
    balanced_weights,
    cross_entropy,
    distillation,
    loss_of_recipe,
)
from tests import oracle

NUMBERS = json.loads((oracle.GOLDEN / "torch.json").read_text())["losses"]


def losses():
    labels, teacher = jnp.asarray(NUMBERS["labels"]), jnp.asarray(NUMBERS["teacher"])
    return {
        "cross_entropy": lambda x: cross_entropy(x, labels),
        "smoothed": lambda x: cross_entropy(x, labels, smoothing=0.1),
        "weighted": lambda x: cross_entropy(x, labels, weights=1 / (1 + np.arange(x.shape[1]))),
        "soft_targets": lambda x: cross_entropy(x, labels, targets=jax.nn.softmax(teacher)),
        "distillation": lambda x: distillation(x, teacher, temperature=4.0, standardize=False),
        "standardized": lambda x: distillation(x, teacher, temperature=2.0, standardize=True),
    }


@pytest.mark.core
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    ["cross_entropy", "smoothed", "weighted", "soft_targets", "distillation", "standardized"],
)
def test_losses_and_gradients_are_pytorchs(name):
    loss, gradient = jax.value_and_grad(losses()[name])(jnp.asarray(NUMBERS["logits"]))
    np.testing.assert_allclose(loss, NUMBERS[name]["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, NUMBERS[name]["gradient"], rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("standardize", "name"), [(False, "distillation"), (True, "standardized")])
def test_a_recipe_weighs_the_labels_and_the_teacher(standardize, name):
    config = default_config()
    config.distill.weight, config.distill.standardize = 0.25, standardize
    config.distill.temperature = 2.0 if standardize else 4.0
    logits, labels, teacher = (jnp.asarray(NUMBERS[k]) for k in ("logits", "labels", "teacher"))
    expected = 0.75 * NUMBERS["cross_entropy"]["loss"] + 0.25 * NUMBERS[name]["loss"]
    loss = loss_of_recipe(config, logits, labels, guidance=teacher)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    alone = loss_of_recipe(config, logits, labels)
    np.testing.assert_allclose(alone, NUMBERS["cross_entropy"]["loss"], rtol=1e-12)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (jnp.asarray(NUMBERS[k], jnp.float32) for k in ("logits", "teacher"))
    gradient = jax.grad(lambda t: distillation(student, t, temperature=2.0, standardize=True))(
        teacher
    )
    assert not gradient.any()


def test_balanced_weights_make_all_classes_count_the_same():
    labels = np.repeat(np.array([0, 1, 3], np.int32), (6, 1, 2))
    weights = balanced_weights(labels, 4)
    np.testing.assert_allclose(np.bincount(labels, weights[labels]), [9 / 4, 9 / 4, 0, 9 / 4])
    # Mixed images count by their shares, and smoothing as ever.
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
    targets = jax.nn.one_hot(labels, 4, dtype=jnp.float32)
    for smoothing in (0.0, 0.1):
        plain = cross_entropy(logits, labels, smoothing=smoothing, weights=weights)
        soft = cross_entropy(logits, labels, targets, smoothing=smoothing, weights=weights)
        np.testing.assert_allclose(plain, soft, rtol=1e-5)


def test_a_network_of_equal_logits_can_learn_from_standardized_ones():
    teacher = jax.random.normal(jax.random.key(0), (2, 10))

    def loss(logits):
        return distillation(logits, teacher, temperature=2.0, standardize=True)

    start = jnp.zeros((2, 10))
    gradient = jax.grad(loss)(start)
    assert np.isfinite(gradient).all()
    assert loss(start - 0.1 * gradient) < loss(start)
