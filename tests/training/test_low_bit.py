"""What is logged of low-bit weights: levels, zeros, and which changed since the last epoch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet import models, quantizers
from shiftnet.errors import UserError
from shiftnet.training import engine, low_bit
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.low_bit import LevelWatch
from shiftnet.training.mesh import compiled_quickly, make_mesh
from shiftnet.training.step import Program
from tests.training.small import epochs, recipe


def program(**fields) -> Program:
    return engine.Program(
        recipe(**fields),
        num_classes=10,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        steps_per_epoch=11,
        mesh=make_mesh(),
    )


def test_fractions_count_weights_by_hand():
    watch = LevelWatch(program(model__weights="s3"))
    state = program(model__weights="s3").init(np.uint32(0))
    before = watch.codes(state.params, state.stats)
    assert len(before) == 3
    levels = np.array([-4, -2, -1, 0, 1, 2, 4])
    draw = np.random.default_rng(0)
    now = {name: draw.integers(0, 7, code.shape).astype(np.uint8) for name, code in before.items()}
    before = {name: np.asarray(code) for name, code in before.items()}
    found = watch.metrics(before, {name: jnp.asarray(code) for name, code in now.items()})
    assert list(found) == ["all", *before]
    every = {
        "all": tuple(np.concatenate([c.ravel() for c in codes.values()]) for codes in (before, now))
    }
    every |= {name: (before[name].ravel(), now[name].ravel()) for name in before}
    for name, (old, new) in every.items():
        old, new = levels[old], levels[new]
        assert found[name]["zeros"] == pytest.approx((new == 0).mean(), rel=1e-12)
        assert found[name]["level_changed"] == pytest.approx((old != new).mean(), rel=1e-12)
        assert found[name]["sign_changed"] == pytest.approx((old * new < 0).mean(), rel=1e-12)
        shares = {str(level): (new == level).mean() for level in levels}
        assert found[name]["levels"] == pytest.approx(shares, rel=1e-12)


def test_neighbouring_levels_of_8_bit_weights_are_counted_together():
    watched = program(model__weights="int", model__weights_of="layer1.*.conv2:ternary")
    watch = LevelWatch(watched)
    state = watched.init(np.uint32(0))
    codes = watch.codes(state.params, state.stats)
    found = watch.metrics(codes, codes)
    levels = np.asarray(codes["layer1.0.conv1"]).ravel().astype(int) - 128
    one = found["layer1.0.conv1"]
    assert one["zeros"] == (levels == 0).mean() > 0
    assert list(one["levels"]) == [str(level) for level in range(-121, 128, 8)]
    assert one["levels"]["-9"] == ((levels >= -16) & (levels <= -9)).mean()
    assert sum(one["levels"].values()) == pytest.approx(1)
    assert list(found["layer1.0.conv2"]["levels"]) == ["-1", "0", "1"]
    assert sum(found["all"]["levels"].values()) == pytest.approx(1)


@pytest.mark.core
def test_a_network_of_float_weights_is_not_watched():
    watch = LevelWatch(program())
    assert not watch
    state = program().init(np.uint32(0))
    assert watch.codes(state.params, state.stats) == {}


@pytest.mark.core
def test_the_table_adds_up():
    fields = {**recipe(model__weights="s3", model__weight_bits=2).model}
    network = nnx.eval_shape(lambda: models.build(fields, 10, rngs=nnx.Rngs(0)))
    zeros = {
        name: 0.25
        for name, weight in quantizers.of_layers(network).items()
        if isinstance(weight, quantizers.LowBitWeight)
    }
    head, *rows, total = low_bit.table(network, zeros).splitlines()
    assert head.split() == [
        "layer",
        "shape",
        "bits",
        "zeros",
        "float32",
        "bytes",
        "packed",
        "bytes",
    ]
    cells = {row.split()[0]: row.replace(",", "").split()[1:] for row in rows}
    assert cells["conv1"] == ["3x3x3x16", "32", str(4 * 432), str(4 * 432)]
    assert cells["layer1.0.conv1"] == ["1x1x16x16", "2", "25.0%", str(4 * 256), "64"]
    assert cells["layer1.0.shortcut.projection.0"] == ["1x1x16x32", "2", "25.0%", "2048", "128"]
    assert len(cells) == len(quantizers.of_layers(network))
    sums = [sum(int(row[column]) for row in cells.values()) for column in (-2, -1)]
    assert [int(n) for n in total.replace(",", "").split()[-2:]] == sums


# In a run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("low_bit")
    return workdir, engine.train(recipe(model__weights="s3", log__tensorboard=True), workdir)


def test_every_epoch_logs_what_became_of_the_weights(uninterrupted):
    workdir, summary = uninterrupted
    lines = epochs(workdir)
    assert len(lines) == 2
    for line in lines:
        found = line["weights"]
        assert set(found) > {"all", "layer1.0.conv1", "layer1.0.conv2"}
        assert "conv1" not in found
        assert sum(found["all"]["levels"].values()) == pytest.approx(1)
        assert found["all"]["zeros"] == found["all"]["levels"]["0"]
        # S3's weights start half at zero, and learn: some change in every epoch, most do not.
        assert 0.3 < found["all"]["zeros"] < 0.7
        assert found["all"]["sign_changed"] < found["all"]["level_changed"] < 0.9
    # Few signs change, and in an epoch at a small learning rate perhaps none.
    assert lines[0]["weights"]["all"]["sign_changed"] > 0
    assert summary.weights is not None
    assert "layer1.0.conv1" in summary.weights


def test_tensorboard_has_scalars_and_histograms_of_the_weights(uninterrupted):
    workdir, _ = uninterrupted
    # The event file names its charts in plain bytes.
    (events,) = (workdir / "tensorboard").iterdir()
    written = events.read_bytes()
    for name in ("train/loss", "weights/all/zeros", "weights/layer1.0.conv1/sign_changed"):
        assert name.encode() in written, name
    assert b"weights/all/levels" in written
    assert b"weights/all/levels/" not in written  # one histogram, not a chart a level


@pytest.mark.parametrize("step", [pytest.param(11, marks=pytest.mark.slow), 15])
def test_an_interrupted_run_logs_the_same_changes(uninterrupted, tmp_path, monkeypatch, step):
    workdir, summary = uninterrupted
    settings = recipe(model__weights="s3", log__tensorboard=False)
    with monkeypatch.context() as patched:
        calls = iter(range(1, 10**6))
        patched.setattr(Interrupt, "requested", lambda self: next(calls) == step)
        engine.train(settings, tmp_path)
    assert engine.train(settings, tmp_path) == summary
    assert json.dumps(epochs(tmp_path)) == json.dumps(epochs(workdir))


def test_another_form_of_weights_is_another_run(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(UserError, match=r"model\.weights: 's3' -> 'sign'"):
        engine.train(recipe(model__weights="sign"), workdir)


def test_the_regulariser_is_in_the_gradient_and_not_in_the_loss():
    images = np.zeros((4, 8, 8, 3), np.float32)
    labels = np.arange(4, dtype=np.int32)
    results = []
    for factor in (0.0, 10.0):
        trained = program(model__weights="s3", optimizer__regularizer=factor)
        state = trained.init(np.uint32(0))
        update = compiled_quickly(trained.update, trained.mesh)
        results.append(update(state, jnp.asarray(images), jnp.asarray(labels)))
    (plain, loss, _), (pulled, same_loss, _) = results
    assert loss == same_loss
    gate = plain.params["layer1"][0]["conv1"]["weight"]["gate"][...]
    start = program(model__weights="s3").init(np.uint32(0))
    first = start.params["layer1"][0]["conv1"]["weight"]["gate"][...]
    moved = np.asarray(pulled.params["layer1"][0]["conv1"]["weight"]["gate"][...] - gate)
    # Down the slope of 10 * max(-b, 0) at learning rate 0.1.
    np.testing.assert_allclose(moved, np.where(np.asarray(first) < 0, 1.0, 0.0), atol=1e-5)
