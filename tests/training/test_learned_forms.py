"""Runs with quantized activations and learned shifts: resumed, logged, frozen, started, drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shiftnet
from shiftnet import checkpoint, data, packing, quantizers
from shiftnet.cli import shifts
from shiftnet.layers import LearnedShift
from shiftnet.training import engine
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.mesh import make_mesh
from shiftnet.training.optimizer import keep_frozen, make_optimizer
from shiftnet.training.restore import Init, start_from
from tests.test_packing import images, note
from tests.training.small import epochs, recipe
from tests.training.test_init import saved

# Three steps per epoch.
FIELDS = {"model__shift": "sparse", "model__activations": "int4", "data__validation": 1000}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("learned_forms")
    return workdir, engine.train(recipe(**FIELDS), workdir)


def test_an_interrupted_run_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch):
    workdir, outcome = uninterrupted
    with monkeypatch.context() as patched:
        calls = iter(range(1, 10**6))
        patched.setattr(Interrupt, "requested", lambda self: next(calls) == 4)
        engine.train(recipe(**FIELDS), tmp_path)
    assert engine.train(recipe(**FIELDS), tmp_path) == outcome
    assert json.dumps(epochs(tmp_path)) == json.dumps(epochs(workdir))
    ours, theirs = (checkpoint.read(path).arrays for path in (tmp_path, workdir))
    assert set(ours) == set(theirs)
    assert any(name.endswith("activation.unit") for name in ours)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_every_epoch_logs_clipped_values_and_dead_channels_of_every_layer(uninterrupted):
    workdir, outcome = uninterrupted
    layers = set(quantizers.activations_of_layers(outcome.network))
    for line in epochs(workdir):
        found = line["activations"]
        assert set(found) == {"all", *layers}
        for share in ("clipped", "dead"):
            assert all(0 <= found[layer][share] < 0.5 for layer in found)
        clipped = [found[layer]["clipped"] for layer in layers]
        assert found["all"]["clipped"] == pytest.approx(np.mean(clipped), rel=1e-5)
        assert found["all"]["clipped"] > 0


def test_offsets_are_learned_in_their_share_of_the_run_and_then_stay(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    model = {name.removeprefix("model__"): value for name, value in FIELDS.items()}
    del model["data__validation"]
    offsets = [name for name in saved(tmp_path / "ckpt", **model) if ".shift." in name]
    assert len(offsets) == 2
    half, end = (checkpoint.read(workdir / "checkpoints" / step).arrays for step in ("3", "6"))
    for name in offsets:
        np.testing.assert_array_equal(half[name], end[name], err_msg=name)
    kernel = "layer1.0.conv1.weight.value"
    assert not np.array_equal(half[kernel], end[kernel])


@pytest.mark.parametrize("decay", ["all", "kernels"])
def test_sparse_offsets_change_until_their_share_of_the_run_and_never_decay(decay):
    config = recipe(
        model__shift="sparse",
        optimizer__shift_share=0.75,
        optimizer__decay=decay,
        optimizer__weight_decay=0.5,
    )
    params = {
        "layer1": [{"shift": {"rows": jnp.ones(3), "columns": jnp.ones(3)}, "scale": jnp.ones(3)}]
    }
    optimizer = make_optimizer(config, 4)
    state = optimizer.init(params)
    moved = []
    for step in range(8):
        # A gradient in the first step, momentum after it.
        grads = jax.tree.map(lambda p, size=float(step == 0): jnp.full_like(p, size), params)
        updates, state = optimizer.update(grads, state, params)
        (block,) = updates["layer1"]
        moved.append(float(block["shift"]["rows"][0]))
        assert np.array_equal(block["shift"]["rows"], block["shift"]["columns"])
        assert (block["scale"] != 0).all()
    rates = np.array([0.1] * 4 + [0.01] * 4)
    expected = np.where(np.arange(8) < 6, -rates * 0.9 ** np.arange(8), 0)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_a_trained_network_computes_with_constant_offsets_and_packs(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    model = shiftnet.load(workdir)
    network = model.network
    found = [m for _, m in nnx.iter_modules(network) if isinstance(m, LearnedShift)]
    assert len(found) == 1
    assert all(module.offsets is not None for module in found)
    packing.write(tmp_path / "net.safetensors", network, note(model.config), rest="float16")
    packed = shiftnet.load(tmp_path / "net.safetensors")
    for _, module in nnx.iter_modules(packed.network):
        if isinstance(module, LearnedShift):
            assert module.offsets == found.pop(0).offsets
    assert not found
    assert np.isfinite(packed(images())).all()


def test_a_figure_shows_where_every_channel_went(uninterrupted, tmp_path, capsys):
    workdir, _ = uninterrupted
    assert shifts.main([str(workdir), str(tmp_path / "shifts.svg")]) == 0
    figure = (tmp_path / "shifts.svg").read_text()
    printed = capsys.readouterr().out
    for path, module in nnx.iter_modules(shiftnet.load(workdir).network):
        if isinstance(module, LearnedShift):
            name = ".".join(map(str, path))
            _, panel = figure.split(f"<title>{name}</title>")
            places = set(zip(*module.offsets, strict=True))
            assert panel.split("</g>")[0].count("<circle") == len(places)
            assert name in printed
    saved(tmp_path / "ckpt")
    assert shifts.main([str(tmp_path / "ckpt"), str(tmp_path / "other.svg")]) == 2
    assert "no learned shifts, only fixed ones or none" in capsys.readouterr().err
    assert not (tmp_path / "other.svg").exists()


@pytest.mark.parametrize("before", ["float", "int8"])
def test_a_network_starts_from_one_of_other_activations(before, tmp_path):
    given = saved(tmp_path / "ckpt", activations=before)
    dataset = data.load("digits")
    settings = recipe(model__activations="int4")
    program = engine.Program(
        settings,
        num_classes=10,
        mean=dataset.mean,
        std=dataset.std,
        steps_per_epoch=11,
        mesh=make_mesh(),
    )
    state, message = start_from(
        program, program.init(np.uint32(0)), Init(tmp_path / "ckpt"), settings, dataset
    )
    found = checkpoint.to_arrays(state.params, state.stats)
    kernel = "layer1.0.conv1.weight.value"
    np.testing.assert_array_equal(found[kernel], given[kernel])
    assert "fresh: layer1.0.conv1.activation.step, " in message
    fresh = {name: float(a) for name, a in found.items() if name.endswith((".step", ".unit"))}
    assert len(fresh) == 2 * 3
    assert all(value == name.endswith(".step") for name, value in fresh.items())


def test_frozen_layers_have_the_step_of_the_first_batch_too():
    def stats(mean, unit):
        layer = {"activation": {"unit": nnx.BatchStat(jnp.float32(unit))}}
        return nnx.State({"conv1": layer, "bn1": {"mean": nnx.BatchStat(jnp.float32(mean))}})

    kept = keep_frozen(stats(1, 0), stats(2, 3), "conv1,bn1")
    assert kept["bn1"]["mean"][...] == 1
    assert kept["conv1"]["activation"]["unit"][...] == 3
