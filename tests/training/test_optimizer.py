"""Gradient descent as PyTorch's, with the originals' learning rates."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shiftnet.config import default_config
from shiftnet.errors import UserError
from shiftnet.training.optimizer import make_optimizer, parse_groups, takes_muon
from shiftnet.training.schedules import learning_rate, learning_rates, rates_of_steps
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


NUMBERS = json.loads((oracle.GOLDEN / "torch.json").read_text())


@jax.numpy_dtype_promotion("standard")  # optax's bias correction is float32
def trajectory(config):
    """A [4, 3] weight after each of PyTorch's gradients."""
    optimizer = make_optimizer(config, steps_per_epoch=len(NUMBERS["gradients"]))
    params = {"inner": {"weight": jnp.asarray(NUMBERS["start"])}}
    state = optimizer.init(params)
    values = []
    for gradient in NUMBERS["gradients"]:
        gradients = {"inner": {"weight": jnp.asarray(gradient)}}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        values.append(params["inner"]["weight"])
    return np.asarray(values)


def optimizer_config(**settings):
    config = default_config()
    config.optimizer.weight_decay = 0.01
    for name, value in settings.items():
        config.optimizer[name] = value
    return config


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "settings", "rtol"),
    [
        ("sgd", {}, 1e-12),
        ("sgd_nesterov", {"nesterov": True}, 1e-12),
        ("adamw", {"name": "adamw"}, 1e-12),
        ("clipped", {"clip_norm": 0.5}, 1e-5),  # PyTorch adds 1e-6 to the norm
        ("accumulated", {"accumulate": 2}, 1e-6),  # optax's mean is of float32
    ],
)
def test_optimizers_take_pytorchs_steps(name, settings, rtol):
    expected = np.asarray(NUMBERS["optimizers"][name])
    np.testing.assert_allclose(trajectory(optimizer_config(**settings)), expected, rtol=rtol)


@pytest.mark.usefixtures("float64")
def test_muon_takes_pytorchs_steps_as_far_as_its_bfloat16_goes():
    ours = trajectory(optimizer_config(name="muon", muon_lr=0.1, momentum=0.0))
    expected = np.asarray(NUMBERS["optimizers"]["muon"])
    np.testing.assert_allclose(np.diff(ours, axis=0), np.diff(expected, axis=0), atol=6e-3)


@pytest.mark.usefixtures("float64")
def test_lion_follows_the_sign_of_its_papers_interpolation():
    config = optimizer_config(name="lion", momentum=0.9, beta2=0.99)
    weight, momentum, expected = np.asarray(NUMBERS["start"]), 0.0, []
    for gradient in np.asarray(NUMBERS["gradients"]):  # arXiv:2302.06675, algorithm 2
        direction = np.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
        weight = weight - 0.1 * (direction + 0.01 * weight)
        expected.append(weight)
    np.testing.assert_allclose(trajectory(config), expected, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_lamb_scales_adams_step_to_the_weights_norm():
    config = optimizer_config(name="lamb")
    weight, first, second, expected = np.asarray(NUMBERS["start"]), 0.0, 0.0, []
    for step, gradient in enumerate(np.asarray(NUMBERS["gradients"]), 1):  # arXiv:1904.00962
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        update = mean / (np.sqrt(square) + 1e-8) + 0.01 * weight
        weight = weight - 0.1 * update * np.linalg.norm(weight) / np.linalg.norm(update)
        expected.append(weight)
    np.testing.assert_allclose(trajectory(config), expected, rtol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("step", {"name": "step", "boundaries": (2, 5)}),
        ("cosine", {"name": "cosine", "lr_min": 0.01}),
        ("linear", {"name": "linear", "lr_min": 0.01}),
        ("onecycle", {"name": "onecycle"}),
        ("warmup_cosine", {"name": "cosine", "warmup": 2.0}),
    ],
)
def test_schedules_by_step_are_pytorchs(name, settings):
    config = default_config()
    config.epochs, config.optimizer.lr, config.schedule.by = 8, 0.2, "step"
    for field, value in settings.items():
        config.schedule[field] = value
    rate = learning_rate(config, steps_per_epoch=5)
    with jax.numpy_dtype_promotion("standard"):  # as outside of these tests
        rates = [float(rate(jnp.float64(step))) for step in range(40)]
    np.testing.assert_allclose(rates, NUMBERS["schedules"][name][:40], rtol=1e-9)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(rates_of_steps(config, 5), rates, rtol=1e-9)
        np.testing.assert_allclose(learning_rates(config, 5), rates[::5], rtol=1e-9)


def test_a_stable_rate_decays_over_the_share_at_the_end():
    config = default_config()
    config.epochs, config.schedule.name, config.schedule.decay = 10, "wsd", 0.4
    config.schedule.warmup = 2.0
    expected = [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025]
    np.testing.assert_allclose(learning_rates(config, 7), expected, rtol=1e-6)


@pytest.mark.parametrize(("steps", "epochs", "warmup"), [(5, 11, 3), (390, 39, 5), (22, 39, 5)])
def test_one_cycle_has_its_highest_rate_right_after_the_warm_up(steps, epochs, warmup):
    config = default_config()
    config.epochs, config.schedule.name, config.schedule.warmup = epochs, "onecycle", float(warmup)
    with jax.numpy_dtype_promotion("standard"):  # as outside of these tests
        assert learning_rates(config, steps).max() == pytest.approx(0.1, rel=1e-6)
        config.schedule.by = "step"
        assert np.argmax(rates_of_steps(config, steps)) == warmup * steps


def test_a_warm_up_of_a_part_of_an_epoch_never_exceeds_the_rate():
    config = default_config()
    config.epochs, config.schedule.name, config.schedule.warmup = 4, "linear", 1.5
    expected = [0.1 / 1.5, 0.1, 0.08, 0.04]
    np.testing.assert_allclose(learning_rates(config, 10), expected, rtol=1e-6)


def test_more_batches_an_update_than_the_run_has_are_refused():
    config = default_config()
    config.epochs, config.optimizer.accumulate = 2, 21
    with pytest.raises(UserError, match=r"at most the run's 20 steps.*found 21"):
        make_optimizer(config, 10)


def test_of_a_repeated_pattern_the_last_counts_and_has_the_last_place():
    assert list(parse_groups("linear:10,*:0.1,linear:5").items()) == [("*", 0.1), ("linear", 5.0)]


def test_a_warm_up_longer_than_the_run_is_refused():
    config = default_config()
    config.epochs, config.schedule.warmup = 3, 3.0
    with pytest.raises(UserError, match=r"schedule\.warmup must be shorter than the 3 epochs"):
        make_optimizer(config, 10)


def network_params(arch="depthwiseresnet8"):
    model = networks.random({**default_config().model, "arch": arch}, 10)
    return nnx.state(model, nnx.Param)


def test_muon_takes_the_kernels_between_the_first_and_the_last_layer():
    taken = nnx.to_flat_state(takes_muon(network_params(), ("conv1", "linear")))
    names = {".".join(map(str, path)) for path, is_taken in taken if is_taken.get_value()}
    kinds = {name.split(".", 2)[-1] for name in names}
    assert kinds == {
        "conv1.weight.value",
        "conv3.weight.value",
        "shortcut.projection.0.weight.value",
    }, "not the depthwise kernels, batch norms, stem and classifier"
    assert not any(name.startswith(("conv1.", "linear.")) for name in names)


def one_update(config, params):
    optimizer = make_optimizer(config, steps_per_epoch=1, first_and_last=("conv1", "linear"))
    ones = jax.tree.map(jnp.ones_like, params)
    updates = optimizer.update(ones, optimizer.init(params), params)[0]
    return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(updates)}


def test_groups_multiply_the_rate_and_freezing_stops_it():
    config = optimizer_config(
        weight_decay=0.0, groups="layer1.*:0.5,linear:10", freeze="bn1,layer2.*"
    )
    updates = one_update(config, network_params("shiftresnet8"))
    expected = {"layer1": -0.05, "linear": -1.0, "bn1": 0.0, "layer2": 0.0}
    for name, update in updates.items():
        np.testing.assert_allclose(update, expected.get(name.split(".")[0], -0.1), rtol=1e-6)


def test_decay_of_kernels_leaves_out_batch_norms_and_biases():
    params = network_params("shiftresnet8")
    params = jax.tree.map(jnp.ones_like, params)
    updates = one_update(optimizer_config(weight_decay=0.5, decay="kernels"), params)
    for update in updates.values():
        np.testing.assert_allclose(update, -0.15 if update.ndim >= 2 else -0.1, rtol=1e-6)


@jax.numpy_dtype_promotion("standard")  # of optax: Muon counts its steps
def test_muons_kernels_decay_by_their_own_rate_and_no_other_array_does():
    params = network_params("shiftresnet8")
    settings = {"name": "muon", "muon_lr": 0.3, "weight_decay": 0.5}
    plain = one_update(optimizer_config(**settings), params)
    more = one_update(optimizer_config(**settings, muon_weight_decay=0.75), params)
    values = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(params)}
    for name, value in values.items():
        taken = value.ndim == 4 and not name.startswith("conv1.")
        difference = -0.3 * (0.75 - 0.5) * value if taken else 0
        np.testing.assert_allclose(more[name] - plain[name], difference, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"groups": "layer9.*:2"}, "optimizer.groups: no trained parameter's path matches 'layer9"),
        ({"freeze": "bn7"}, "optimizer.freeze: no parameter's path matches 'bn7'"),
        (
            {"groups": "conv1:2", "freeze": "conv1"},
            "optimizer.groups: no trained parameter's path matches 'conv1'",
        ),
        ({"groups": "linear"}, "optimizer.groups must be PATTERN:MULTIPLIER pairs"),
        ({"groups": "linear:-1"}, "found 'linear:-1'"),
    ],
)
def test_patterns_that_match_nothing_are_refused(settings, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        one_update(optimizer_config(**settings), network_params("shiftresnet8"))
