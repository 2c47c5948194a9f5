"""Gradient descent as PyTorch's, with the originals' learning rates."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shiftnet.config import default_config
from shiftnet.training.optimizer import learning_rates, make_optimizer
from tests import networks, oracle

pytestmark = pytest.mark.core


@oracle.needed
def test_learning_rate_of_every_epoch_is_the_originals():
    schedules = json.loads((oracle.FOLDER / "lr_schedules.json").read_text())
    original = schedules["shiftresnet"]["used"]
    np.testing.assert_allclose(learning_rates(default_config()), original, rtol=1e-14)


def test_learning_rate_falls_at_epochs_82_and_123():
    rates = learning_rates(default_config())
    assert len(rates) == 164
    np.testing.assert_allclose(
        rates[[0, 81, 82, 122, 123, 163]], [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3]
    )


@pytest.mark.usefixtures("float64")
def test_steps_are_pytorchs_sgd_with_momentum_over_the_boundary():
    config = default_config()
    config.optimizer.lr, config.optimizer.momentum = 0.5, 0.75
    config.optimizer.weight_decay = 0.125
    config.schedule.boundaries, config.schedule.factor = (1, 3), 0.5
    steps_per_epoch = 2
    gradients = np.random.default_rng(0).normal(size=(8, 3))

    # torch.optim.SGD's documentation, with no dampening and no Nesterov momentum.
    p, buffer = np.array([1.0, -2.0, 3.0]), np.zeros(3)
    rates = [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.125, 0.125]
    expected = []
    for gradient, rate in zip(gradients, rates, strict=True):
        buffer = 0.75 * buffer + gradient + 0.125 * p
        p = p - rate * buffer
        expected.append(p)

    optimizer = make_optimizer(config, steps_per_epoch)
    params = jnp.array([1.0, -2.0, 3.0])
    state = optimizer.init(params)
    ours = []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        ours.append(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-14)


def test_weight_decay_reaches_every_parameter():
    config = default_config()
    model = networks.random({**config.model, "arch": "shiftresnet8"}, 10)
    params = nnx.state(model, nnx.Param)
    optimizer = make_optimizer(config, steps_per_epoch=1)

    @jax.jit
    def one_step(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    updates = one_step(params)
    kinds = {path[-1] for path, _ in nnx.to_flat_state(params)}
    assert kinds == {"value", "scale", "bias"}
    for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(update, -0.1 * 5e-4 * value, rtol=1e-5)
