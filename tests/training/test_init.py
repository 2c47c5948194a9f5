"""Starting from a checkpoint: what fits is taken, the rest is fresh, and both are said."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from shiftnet import checkpoint, data, packing, quantizers
from shiftnet.errors import UserError
from shiftnet.quantizers import LowBitWeight
from shiftnet.training import engine
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.mesh import make_mesh
from shiftnet.training.restore import Init, start_from
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


def started(config, path, dataset, **options):
    """The program and the state that a run starts from, and the message."""
    program = engine.Program(
        config,
        num_classes=len(dataset.class_names),
        mean=dataset.mean,
        std=dataset.std,
        steps_per_epoch=11,
        mesh=make_mesh(config.batch_size),
    )
    state = program.init(np.uint32(0))
    return program, *start_from(program, state, Init(path, **options), config, dataset)


def arrays_of(state):
    arrays = checkpoint.to_arrays(state.params, state.stats)
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_parameters_are_taken_and_the_rest_of_the_run_is_its_own(tmp_path, monkeypatch, capsys):
    given = saved(tmp_path / "ckpt")
    found = first_state(monkeypatch, recipe(), tmp_path / "run", tmp_path / "ckpt")
    for name, array in given.items():
        if not name.endswith((".mean", ".var")):  # the step moved those
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert f"{len(given)} arrays taken\n" in capsys.readouterr().out


def test_one_file_is_as_good_as_a_directory(tmp_path, monkeypatch):
    given = saved(tmp_path / "ckpt")
    read = checkpoint.read(tmp_path / "ckpt")
    checkpoint.write_file(tmp_path / "net.safetensors", read.arrays, read.metadata)
    found = first_state(monkeypatch, recipe(), tmp_path / "run", tmp_path / "net.safetensors")
    for name, array in given.items():
        if not name.endswith((".mean", ".var")):  # the step moved those
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_head_for_other_classes_starts_fresh_and_is_named(tmp_path):
    given = saved(tmp_path / "ckpt", classes=100)
    _, state, message = started(recipe(), tmp_path / "ckpt", data.load("digits"))
    found = arrays_of(state)
    np.testing.assert_array_equal(found["conv1.weight.value"], given["conv1.weight.value"])
    assert found["linear.bias"].shape == (10,)
    assert message.endswith("; fresh: linear.bias, linear.weight.value")


@pytest.mark.parametrize(
    ("weights", "bits"),
    [("sign", 0), pytest.param("s3", 3, marks=pytest.mark.slow), ("denseshift", 3)],
)
def test_low_bit_weights_start_at_the_nearest_levels_of_the_float_ones(tmp_path, weights, bits):
    given = saved(tmp_path / "ckpt")
    config = recipe(model__weights=weights, model__weight_bits=bits)
    dataset = data.load("digits")
    program, state, message = started(config, tmp_path / "ckpt", dataset)
    found = checkpoint.to_arrays(state.params, state.stats)
    network = nnx.merge(program.graphdef, state.params, state.stats)
    layers = quantizers.of_layers(network)
    low_bit = [name for name, layer in layers.items() if isinstance(layer, LowBitWeight)]
    assert len(low_bit) == 3
    for layer in low_bit:
        value, weight = given[f"{layer}.weight.value"], np.asarray(layers[layer]())
        factor = (value * weight).sum() / np.square(weight).sum()
        every_level = factor * layers[layer].scale * np.asarray(layers[layer].levels)
        distance = np.abs(value[..., None] - every_level).min(-1)
        np.testing.assert_allclose(np.abs(value - factor * weight), distance, rtol=1e-3, atol=1e-6)
        norm = layer.replace("projection.0", "projection.1").replace("conv", "bn")
        np.testing.assert_allclose(found[f"{norm}.mean"] * factor, given[f"{norm}.mean"], rtol=1e-4)
        np.testing.assert_allclose(
            found[f"{norm}.var"] * factor**2, given[f"{norm}.var"], rtol=1e-4
        )
    np.testing.assert_array_equal(found["conv1.weight.value"], given["conv1.weight.value"])
    assert f"the weights of 3 layers became the nearest float -> {weights}" in message
    assert "fresh" not in message


def test_rounded_weights_start_from_the_float_ones_with_a_step_of_their_own(tmp_path):
    given = saved(tmp_path / "ckpt")
    settings = recipe(model__weights="int", model__weight_bits=4, model__weights_first_last="int")
    _, state, message = started(settings, tmp_path / "ckpt", data.load("digits"))
    found = arrays_of(state)
    for layer in ("conv1", "layer1.0.conv1", "linear"):
        value = given[f"{layer}.weight.value"]
        np.testing.assert_array_equal(found[f"{layer}.weight.unrounded"], value, err_msg=layer)
        reach = 127 if layer in ("conv1", "linear") else 7
        assert 0.3 < found[f"{layer}.weight.step"] * reach / np.abs(value).max() < 1.01
    assert "the weights of 5 layers became the nearest float -> int 8-bit, float -> int 4-bit" in (
        message
    )
    assert "is lost" not in message


def test_fewer_bits_start_at_the_nearest_levels_of_more(tmp_path):
    saved(tmp_path / "ckpt", weights="s3", weight_bits=4)
    settings = recipe(model__weights="s3", model__weight_bits=2)
    _, _, message = started(settings, tmp_path / "ckpt", data.load("digits"))
    assert "became the nearest s3 4-bit -> s3 2-bit ones" in message


def test_a_factor_that_no_batch_norm_takes_up_is_said(tmp_path):
    saved(tmp_path / "ckpt", arch="wrn8", width=0.5)
    settings = recipe(model__arch="wrn8", model__width=0.5, model__weights="sign")
    _, _, message = started(settings, tmp_path / "ckpt", data.load("digits"))
    assert "no batch norm takes up the factor of group0.0.conv1 (" in message


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"expansion": 2.0},
            r"'layer1\.0\.bn1\.bias' has shape \(32,\), the network needs \(16,\)",
        ),
        ({"arch": "wrn8"}, "has none of the network's arrays"),
        (
            {"arch": "shiftresnet14"},
            r"of another architecture, which has 'layer1\.1\.bn1'; --init-partial takes what fits",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(model, sentence, tmp_path):
    saved(tmp_path / "ckpt", **model)
    with pytest.raises(UserError, match=sentence):
        engine.train(recipe(), tmp_path / "run", init=tmp_path / "ckpt")
    assert not (tmp_path / "run" / "config.json").exists()  # it would refuse a better recipe
    with pytest.raises(UserError, match="does not exist"):
        engine.train(recipe(), tmp_path / "other", init=tmp_path / "nowhere")


@pytest.mark.parametrize(("given", "wanted"), [("float", "rsign"), ("rsign", "int4")])
def test_other_activations_make_no_other_architecture(given, wanted, tmp_path):
    arrays = saved(tmp_path / "ckpt", activations=given)
    config = recipe(model__activations=wanted)
    found = arrays_of(started(config, tmp_path / "ckpt", data.load("digits"))[1])
    name = "layer1.0.conv1.weight.value"
    np.testing.assert_array_equal(found[name], arrays[name])


def test_a_part_of_another_architecture_is_taken_where_that_is_asked_for(tmp_path):
    given = saved(tmp_path / "ckpt", arch="shiftresnet14", expansion=2.0)
    _, state, message = started(recipe(), tmp_path / "ckpt", data.load("digits"), partial=True)
    found = arrays_of(state)
    fits = [name for name in found if name in given and given[name].shape == found[name].shape]
    assert 0 < len(fits) < len(found)
    for name in fits:
        np.testing.assert_array_equal(found[name], given[name], err_msg=name)
    assert f"{len(fits)} arrays taken; fresh: layer1.0.bn1.bias, " in message


def test_the_last_layer_starts_fresh_on_request(tmp_path):
    given = saved(tmp_path / "ckpt")
    _, state, message = started(recipe(), tmp_path / "ckpt", data.load("digits"), fresh_head=True)
    found = arrays_of(state)
    assert not np.allclose(found["linear.weight.value"], given["linear.weight.value"])
    np.testing.assert_array_equal(found["conv1.weight.value"], given["conv1.weight.value"])
    assert message.endswith("; fresh: linear.bias, linear.weight.value")


def test_classes_are_matched_by_name(tmp_path):
    given = saved(tmp_path / "ckpt")  # of "class 0" to "class 9"
    digits = data.load("digits")
    names = (*(f"class {9 - i}" for i in range(5)), "zebra", "yak")
    digits = dataclasses.replace(digits, class_names=names)
    _, state, message = started(recipe(), tmp_path / "ckpt", digits)
    found = arrays_of(state)
    for name in ("linear.bias", "linear.weight.value"):
        np.testing.assert_array_equal(found[name][..., :5], given[name][..., 9:4:-1])
        assert np.isfinite(found[name]).all()
    assert "the last layer has 5 of 7 classes from there" in message


@pytest.mark.parametrize(("fresh_head", "names"), [(False, range(9, 2, -1)), (True, range(10))])
@pytest.mark.parametrize("form", ["int/8", "float"])
def test_a_head_with_a_scale_of_its_own_is_matched_too(tmp_path, form, fresh_head, names):
    given = saved(tmp_path / "ckpt", weights_first_last=form)
    config = recipe(model__weights_first_last="int/8")
    digits = dataclasses.replace(
        data.load("digits"), class_names=tuple(f"class {i}" for i in names)
    )
    found = arrays_of(started(config, tmp_path / "ckpt", digits, fresh_head=fresh_head)[1])
    if fresh_head:
        assert not np.allclose(found["linear.bias"], given["linear.bias"])
        return
    np.testing.assert_array_equal(found["linear.bias"], given["linear.bias"][list(names)])
    if form == "int/8":
        assert found["linear.weight.step"] == given["linear.weight.step"]
        latent = "linear.weight.unrounded"
        np.testing.assert_array_equal(found[latent], given[latent][:, list(names)])


@pytest.mark.parametrize("names", [range(9, 6, -1), range(12), range(9, -1, -1)])
def test_the_weights_of_classes_are_matched_where_the_head_becomes_a_low_bit_one(tmp_path, names):
    given = saved(tmp_path / "ckpt")["linear.weight.value"]
    digits = dataclasses.replace(
        data.load("digits"), class_names=tuple(f"class {i}" for i in names)
    )
    config = recipe(model__weights_first_last="pot/3")
    program, state, message = started(config, tmp_path / "ckpt", digits)
    found = np.asarray(nnx.merge(program.graphdef, state.params, state.stats).linear.weight())
    for column, name in enumerate(names):
        if name < 10:
            lengths = np.linalg.norm(found[:, column]) * np.linalg.norm(given[:, name])
            assert found[:, column] @ given[:, name] / lengths > 0.9
    assert f"{min(10, len(names))} of {len(names)} classes from there" in message


def test_a_packed_file_is_started_from_as_it_computes(tmp_path):
    settings = recipe(model__weights="s3")
    network, digits = networks.random(settings.model, 10), data.load("digits")
    packing.write(tmp_path / "net.safetensors", network, note(settings))
    packed, _ = packing.read(tmp_path / "net.safetensors")
    program, state, message = started(settings, tmp_path / "net.safetensors", digits)
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    ours = networks.evaluate(nnx.merge(program.graphdef, state.params, state.stats), x)
    np.testing.assert_allclose(ours, networks.evaluate(packed, x), rtol=1e-3, atol=1e-4)
    assert "fresh" not in message
    assert "statistics are estimated on 1442 training images" in message


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
