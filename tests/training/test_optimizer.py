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


def wide_schedule():
    config = default_config()
    config.epochs = 256
    config.schedule.name = "sgdr"
    config.schedule.boundaries = (2, 4, 8, 16, 32, 64, 128)
    config.schedule.lr_min = 1e-4
    return config


@oracle.needed
def test_cosine_and_restarts_of_every_epoch_are_those_intended():
    schedules = json.loads((oracle.FOLDER / "lr_schedules.json").read_text())
    np.testing.assert_allclose(
        learning_rates(wide_schedule()), schedules["wrn"][0]["intended_sgdr"], rtol=1e-14
    )
    config = default_config()
    config.epochs, config.schedule.name = 200, "cosine"
    np.testing.assert_allclose(
        learning_rates(config), schedules["s3"][0]["used_torch_1_0"], rtol=1e-12, atol=1e-16
    )


def test_a_cosine_starts_anew_at_each_boundary_and_ends_with_the_run():
    rates = learning_rates(wide_schedule())
    restarts = [0, 2, 4, 8, 16, 32, 64, 128]
    np.testing.assert_allclose(rates[restarts], 0.1)
    assert list(np.flatnonzero(np.diff(rates) > 0) + 1) == restarts[1:]
    # Half way down each wave: the mean of both ends.
    np.testing.assert_allclose(rates[[1, 3, 6, 12, 24, 48, 96, 192]], (0.1 + 1e-4) / 2)
    short = wide_schedule()
    short.epochs = 6  # boundaries beyond the end change nothing
    np.testing.assert_allclose(learning_rates(short)[4:], [0.1, (0.1 + 1e-4) / 2])


def test_a_cosine_falls_from_the_rate_towards_the_lowest():
    config = default_config()
    config.epochs, config.schedule.name, config.schedule.lr_min = 4, "cosine", 0.02
    half = 0.04 * np.sqrt(0.5)
    np.testing.assert_allclose(learning_rates(config), [0.1, 0.06 + half, 0.06, 0.06 - half])


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
