"""Several seeds in one program: each the run that it would be alone, and exact over sessions."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

import shiftnet.data
from shiftnet import checkpoint
from shiftnet.checkpoint import AVERAGED, BEST, LATEST, CheckpointManager
from shiftnet.data import Split
from shiftnet.errors import UserError
from shiftnet.kernels.implementations import lowered_for
from shiftnet.kernels.operation import choices
from shiftnet.training import deadline as deadline_module
from shiftnet.training import engine, metrics
from shiftnet.training.deadline import Deadline
from shiftnet.training.engine import train
from shiftnet.training.mesh import make_mesh
from shiftnet.training.step import Program, StackedProgram
from tests.training.small import epochs, recipe, taught

SEEDS = (3, 1)


class StopsAfter(Deadline):
    """Time runs out at the so-manieth question whether there is any left."""

    def __init__(self, questions):
        super().__init__(None)
        self._questions = questions

    @property
    def left(self):
        self._questions -= 1
        return float(self._questions)


@pytest.fixture(scope="module")
def digits():
    return shiftnet.data.load("digits")


@pytest.fixture(scope="module")
def few(digits):
    """Two steps per epoch."""
    part = Split(digits.train.images[:128], digits.train.labels[:128])
    return dataclasses.replace(digits, train=part)


def settings_of(**overrides):
    return recipe(model__weights="sign", batch_size=64, **overrides)


def one_device(*_, **__):
    return make_mesh(devices=jax.local_devices()[:1])


@pytest.fixture
def on_one_device(monkeypatch):
    monkeypatch.setattr(engine, "make_mesh", one_device)


@pytest.mark.usefixtures("on_one_device")
def test_one_seed_is_the_run_that_train_gives(few, tmp_path):
    alone = train(settings_of(seed=5), tmp_path / "alone", dataset=few)
    outcome = train(settings_of(), tmp_path / "together", seeds=[5], dataset=few)
    assert epochs(tmp_path / "together" / "seed5") == epochs(tmp_path / "alone")
    assert outcome == alone
    assert outcome.finished
    confusion = tmp_path / "together" / "seed5" / metrics.CONFUSION
    assert confusion.read_text() == (tmp_path / "alone" / metrics.CONFUSION).read_text()


def widened(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf, tree
    )


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_each_of_several_runs_takes_the_steps_that_it_takes_alone(digits):
    part = digits.train
    program = Program(
        recipe(batch_size=32),
        num_classes=10,
        mean=digits.mean,
        std=digits.std,
        steps_per_epoch=len(part) // 32,
        mesh=one_device(),
    )
    stacked = StackedProgram(program, len(SEEDS))
    seeds = np.asarray(SEEDS, np.uint32)
    orders = stacked.order(seeds, 0, len(part))
    states = widened(stacked.init(seeds))
    states, losses, corrects = stacked.train(
        states, seeds, part.images, part.labels, orders, length=3
    )
    assert losses.shape == corrects.shape == (2, 3)
    for run, seed in enumerate(seeds):
        order = program.order(seed, 0, len(part))
        np.testing.assert_array_equal(orders[run], order)
        state, alone, correct = program.train(
            widened(program.init(seed)), seed, part.images, part.labels, order, length=3
        )
        np.testing.assert_allclose(losses[run], alone, rtol=1e-9)
        np.testing.assert_array_equal(corrects[run], correct)
        jax.tree.map(
            lambda ours, alone: np.testing.assert_allclose(ours, alone, rtol=1e-7, atol=1e-9),
            stacked.of(states, run),
            state,
        )
    assert not np.allclose(losses[0], losses[1], rtol=1e-2)


def test_on_a_gpu_the_blocks_of_several_seeds_are_kernels(digits):
    settings = recipe(batch_size=32, model__arch="shiftresnet8", model__dtype="bfloat16")
    part = digits.train
    program = Program(
        settings,
        num_classes=10,
        mean=digits.mean,
        std=digits.std,
        steps_per_epoch=4,
        mesh=one_device(),
    )
    stacked = StackedProgram(program, len(SEEDS))
    seeds = np.asarray(SEEDS, np.uint32)
    orders = jax.ShapeDtypeStruct((len(SEEDS), len(part)), np.int32)
    states = jax.eval_shape(stacked.init, seeds)
    with lowered_for("gpu"), choices() as seen:  # a kernel that could not be mapped would raise
        stacked.train.trace(states, seeds, part.images, part.labels, orders, length=2)
    assert [line for line in seen if line.startswith("shift_block")] == ["shift_block: gpu"]


def test_sessions_add_up_to_the_run_that_was_never_stopped(digits, tmp_path):
    settings = recipe(
        model__weights="sign",
        model__drop_path=0.2,
        batch_size=64,
        epochs=3,
        ema__decay=0.5,
        distill__teacher=str(taught(tmp_path / "teacher")),
        eval__every_epochs=2,
        checkpoint__every_steps=3,
        checkpoint__every_epochs=5,
    )
    few, held = (
        Split(digits.train.images[part], digits.train.labels[part])
        for part in (slice(128), slice(128, 160))
    )
    digits = dataclasses.replace(digits, train=few, validation=held)
    options = {"seeds": SEEDS, "dataset": digits}
    whole = train(settings, tmp_path / "whole", **options)
    assert whole.finished
    assert whole.chosen_on == "validation"
    saved = tmp_path / "whole" / LATEST
    assert sorted(path.name for path in saved.iterdir()) == ["3", "6"]
    place = tmp_path / "sessions"
    for questions, step in ((6, 5), (100, 6)):  # in the middle of an epoch, and the end
        deadline = StopsAfter(questions)
        outcome = train(settings, place, **options, deadline=deadline, session={"device": step})
        assert outcome.step == step
        assert outcome.finished == (step == 6)
    for seed in SEEDS:
        assert epochs(place / f"seed{seed}") == epochs(tmp_path / f"whole/seed{seed}")
        assert ["test_loss" in line for line in epochs(place / f"seed{seed}")] == [
            False,
            True,
            True,
        ]
    assert outcome == whole
    assert list(outcome.sessions) == [{"device": 5}, {"device": 6}]
    for part in (BEST, AVERAGED):
        ours, theirs = (checkpoint.read(one / part) for one in (place, tmp_path / "whole"))
        assert ours.metadata["step"] == (outcome.best[0]["epoch"] * 2 if part == BEST else 6)
        for name, array in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(outcome.network(x), whole.network(x))


def as_of_old(save):
    """Makes `CheckpointManager.save` write a row's only seed as it was written until 2026-11.

    A first axis on all arrays, and the best network inside instead of beside the checkpoints.
    """
    best = {}

    def saved(self, step, metadata, **parts):
        if "optimizer" not in parts:
            best.update({name: np.array(array) for name, array in parts["model"].items()})
            return
        new = ("stacked", "images", "steps_per_epoch", "final", "feed")
        metadata = {key: value for key, value in metadata.items() if key not in new}
        metadata["best"] = [{k: metadata["best"][0][k] for k in ("epoch", "accuracy")}]
        save(self, step, metadata, **jax.tree.map(lambda array: array[None], parts), best=best)

    return saved


@pytest.mark.usefixtures("on_one_device")
def test_a_seed_that_was_saved_as_one_of_several_is_continued(few, tmp_path, monkeypatch):
    settings, options = settings_of(), {"seeds": [1], "dataset": few}
    whole = train(settings, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointManager, "save", as_of_old(CheckpointManager.save))
        train(settings, tmp_path / "old", **options, deadline=StopsAfter(4))
    assert not (tmp_path / "old" / BEST).exists()
    outcome = train(settings, tmp_path / "old", **options)
    assert outcome == whole
    assert epochs(tmp_path / "old" / "seed1") == epochs(tmp_path / "whole" / "seed1")
    for part in ("", BEST):
        ours, theirs = (checkpoint.read(tmp_path / place / part) for place in ("old", "whole"))
        assert ours.path.name == theirs.path.name
        for name, array in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)


@pytest.mark.usefixtures("on_one_device")
def test_a_place_belongs_to_its_seeds_and_schedule(few, tmp_path):
    settings = settings_of()
    train(settings, tmp_path, seeds=[0], dataset=few, deadline=StopsAfter(2))
    with pytest.raises(UserError, match=r"has the seeds \[0\], not \[1\]"):
        train(settings, tmp_path, seeds=[1], dataset=few)
    settings.epochs = 3
    with pytest.raises(UserError, match="epochs: 2 -> 3"):
        train(settings, tmp_path, seeds=[0], dataset=few)


@pytest.mark.slow
def test_the_end_of_an_epoch_is_kept_room_for_from_the_first_step_on(digits, tmp_path):
    settings = recipe(epochs=3, schedule__boundaries=())
    few = Split(digits.train.images[:128], digits.train.labels[:128])
    digits = dataclasses.replace(digits, train=few)
    worked = []

    class Notes(StopsAfter):
        def worked(self, seconds):
            worked.append(seconds)

    train(settings, tmp_path, seeds=[0], dataset=digits, deadline=Notes(2))
    first, _, longest = worked
    assert first == 0 < longest
    train(settings, tmp_path, seeds=[0], dataset=digits, deadline=Notes(2))
    assert worked[3] == longest


@pytest.mark.usefixtures("on_one_device")
def test_a_signal_in_the_last_epoch_is_not_lost(few, tmp_path, monkeypatch):
    printed = engine.epoch_line

    def interrupted(lines, epochs):
        if lines[0]["epoch"] == epochs:
            os.kill(os.getpid(), signal.SIGTERM)
        return printed(lines, epochs)

    monkeypatch.setattr(engine, "epoch_line", interrupted)
    outcome = train(settings_of(), tmp_path, seeds=[0], dataset=few)
    assert outcome.finished
    assert outcome.signal == signal.SIGTERM


@pytest.mark.parametrize("overrides", [{"parallel__fsdp": True}, {"batch_size": 5000}])
def test_what_cannot_be_trained_together_is_said(digits, tmp_path, overrides):
    with pytest.raises(UserError, match=r"together: parallel\.fsdp divides|more than the"):
        train(recipe(**overrides), tmp_path / "run", seeds=SEEDS, dataset=digits)
    assert not (tmp_path / "run").exists()


def test_a_deadline_keeps_room_for_the_step_under_way_and_for_saving(monkeypatch):
    now = 100.0
    monkeypatch.setattr(deadline_module.time, "monotonic", lambda: now)
    deadline = Deadline(60)
    assert deadline.left == 50  # ten for a save, until one was timed
    deadline.worked(4)
    deadline.worked(3)
    deadline.saved(2)
    assert deadline.left == 60 - 2 * 4 - 2 * 2
    deadline.compiled(7)
    deadline.compiled(5)
    assert deadline.left_for_another == deadline.left - 7
    now = 150.0
    assert deadline.left < 0
    assert Deadline(None).left == float("inf")
