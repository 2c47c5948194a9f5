"""Runs with quantized activations: they resume to the bit, log their shares, start from others."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet import checkpoint, quantizers
from shiftnet.training import engine
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.optimizer import keep_frozen
from tests.training.small import epochs, recipe
from tests.training.test_init import first_state, saved

FIELDS = {"model__weights": "s3", "model__activations": "int4"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("activations")
    return workdir, engine.train(recipe(**FIELDS), workdir)


def test_every_epoch_logs_clipped_values_and_dead_channels_of_every_layer(uninterrupted):
    workdir, outcome = uninterrupted
    layers = set(quantizers.activations_of_layers(outcome.network))
    for line in epochs(workdir):
        found = line["activations"]
        assert set(found) == {"all", *layers}
        clipped = [found[layer]["clipped"] for layer in layers]
        assert found["all"]["clipped"] == pytest.approx(np.mean(clipped), rel=1e-5)
        # The first step clips a few percent of normal values, and channels live.
        assert 0 < found["all"]["clipped"] < 0.3
        assert found["all"]["dead"] < 0.5
    assert epochs(workdir)[-1]["train_accuracy"] > 0.5


def test_an_interrupted_run_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch):
    workdir, outcome = uninterrupted
    with monkeypatch.context() as patched:
        calls = iter(range(1, 10**6))
        patched.setattr(Interrupt, "requested", lambda self: next(calls) == 15)
        engine.train(recipe(**FIELDS), tmp_path)
    assert engine.train(recipe(**FIELDS), tmp_path) == outcome
    assert json.dumps(epochs(tmp_path)) == json.dumps(epochs(workdir))
    ours, theirs = (checkpoint.read(path).arrays for path in (tmp_path, workdir))
    assert set(ours) == set(theirs)
    assert any(name.endswith("activation.unit") for name in ours)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("before", ["float", "int8"])
def test_a_network_starts_from_one_of_other_activations(before, tmp_path, monkeypatch, capsys):
    given = saved(tmp_path / "ckpt", activations=before)
    settings = recipe(model__activations="int4")
    found = first_state(monkeypatch, settings, tmp_path / "run", tmp_path / "ckpt")
    kernel = "layer1.0.conv1.weight.value"
    np.testing.assert_array_equal(found[kernel], given[kernel])
    assert "fresh: layer1.0.conv1.activation." in capsys.readouterr().out
    for name, array in found.items():
        if name.endswith("activation.step"):
            assert array == 1, name
        if name.endswith("activation.unit"):
            assert array > 0, name


def test_frozen_layers_have_the_step_of_the_first_batch_too():
    def stats(mean, unit):
        layer = {"activation": {"unit": nnx.BatchStat(jnp.float32(unit))}}
        return nnx.State({"conv1": layer, "bn1": {"mean": nnx.BatchStat(jnp.float32(mean))}})

    kept = keep_frozen(stats(1, 0), stats(2, 3), "conv1,bn1")
    assert kept["bn1"]["mean"][...] == 1
    assert kept["conv1"]["activation"]["unit"][...] == 3
