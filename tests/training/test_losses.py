"""Losses and their gradients against PyTorch's numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.training.losses import cross_entropy
from tests import oracle

NUMBERS = json.loads((oracle.GOLDEN / "torch.json").read_text())["losses"]


def losses():
    labels, teacher = jnp.asarray(NUMBERS["labels"]), jnp.asarray(NUMBERS["teacher"])
    return {
        "cross_entropy": lambda x: cross_entropy(x, labels),
        "smoothed": lambda x: cross_entropy(x, labels, smoothing=0.1),
        "soft_targets": lambda x: cross_entropy(x, labels, targets=jax.nn.softmax(teacher)),
    }


@pytest.mark.core
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["cross_entropy", "smoothed", "soft_targets"])
def test_losses_and_gradients_are_pytorchs(name):
    loss, gradient = jax.value_and_grad(losses()[name])(jnp.asarray(NUMBERS["logits"]))
    np.testing.assert_allclose(loss, NUMBERS[name]["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, NUMBERS[name]["gradient"], rtol=1e-10, atol=1e-14)
