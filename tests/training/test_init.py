"""Starting from a checkpoint: what fits is taken, the rest is fresh, and both are said."""

import numpy as np
import pytest
from flax import nnx

from shiftnet import checkpoint
from shiftnet.errors import UserError
from shiftnet.training import engine
from shiftnet.training.interrupt import Interrupt
from tests import networks
from tests.test_packing import note
from tests.training.small import recipe


def saved(path, classes=10, **model):
    """A checkpoint of the small recipe's network with other numbers; its arrays."""
    settings = recipe(**{f"model__{name}": value for name, value in model.items()})
    network = networks.random(settings.model, classes)
    arrays = checkpoint.to_arrays(*nnx.split(network, nnx.Param, nnx.BatchStat)[1:])
    checkpoint.write(path, arrays, note(settings, classes))
    return {name: np.asarray(array) for name, array in arrays.items()}


def first_state(monkeypatch, settings, workdir, init):
    """The arrays after one step at a learning rate too small to move float32 numbers."""
    settings.optimizer.lr = 1e-30
    with monkeypatch.context() as patched:
        patched.setattr(Interrupt, "requested", lambda self: True)
        engine.train(settings, workdir, init=init)
    arrays = checkpoint.read(workdir).arrays
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_parameters_are_taken_and_the_rest_of_the_run_is_its_own(tmp_path, monkeypatch, capsys):
    given = saved(tmp_path / "ckpt")
    found = first_state(monkeypatch, recipe(), tmp_path / "run", tmp_path / "ckpt")
    for name, array in given.items():
        if not name.endswith((".mean", ".var")):  # the step moved those
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert f"{len(given)} arrays taken\n" in capsys.readouterr().out


def test_a_head_for_other_classes_starts_fresh_and_is_named(tmp_path, monkeypatch, capsys):
    given = saved(tmp_path / "ckpt", classes=100)
    found = first_state(monkeypatch, recipe(), tmp_path / "run", tmp_path / "ckpt")
    np.testing.assert_array_equal(found["conv1.weight.value"], given["conv1.weight.value"])
    assert found["linear.bias"].shape == (10,)
    assert "; fresh: linear.bias, linear.weight.value\n" in capsys.readouterr().out


def test_latents_of_another_form_start_fresh_and_are_named(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "ckpt")
    settings = recipe(model__weights="sign")
    found = first_state(monkeypatch, settings, tmp_path / "run", tmp_path / "ckpt")
    assert "layer1.0.conv1.weight.latent" in found
    assert "layer1.0.conv1.weight.latent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"expansion": 2.0},
            r"'layer1\.0\.bn1\.bias' has shape \(32,\), the network needs \(16,\)",
        ),
        ({"arch": "wrn8"}, "has none of the network's arrays"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(model, sentence, tmp_path):
    saved(tmp_path / "ckpt", **model)
    with pytest.raises(UserError, match=sentence):
        engine.train(recipe(), tmp_path / "run", init=tmp_path / "ckpt")
    with pytest.raises(UserError, match="does not exist"):
        engine.train(recipe(), tmp_path / "other", init=tmp_path / "nowhere")


def test_a_continued_run_is_not_started_again(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "ckpt")
    first_state(monkeypatch, recipe(), tmp_path / "run", tmp_path / "ckpt")
    capsys.readouterr()
    settings = recipe()
    settings.optimizer.lr = 1e-30
    with monkeypatch.context() as patched:
        patched.setattr(Interrupt, "requested", lambda self: True)
        engine.train(settings, tmp_path / "run", init=tmp_path / "nowhere")
    printed = capsys.readouterr().out
    assert "continuing after step 1" in printed
    assert "started from" not in printed
