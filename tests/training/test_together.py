"""Several seeds in one program: each the run that it would be alone, and exact over visits."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

import shiftnet.data
from shiftnet.data import Split
from shiftnet.errors import UserError
from shiftnet.training import loop, metrics, together
from shiftnet.training.mesh import make_mesh
from shiftnet.training.step import Program, StackedProgram, run_of
from shiftnet.training.together import Deadline, train_together
from tests.training.small import epochs, recipe

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


def one_device(*_):
    return make_mesh(devices=jax.local_devices()[:1])


def test_one_seed_is_the_run_that_train_gives(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", one_device)
    summary = loop.train(recipe(seed=5), tmp_path / "alone")
    outcome = train_together(recipe(), [5], digits, tmp_path / "together", keep="final")
    assert epochs(tmp_path / "together" / "seed5") == epochs(tmp_path / "alone")
    assert outcome.finished
    assert outcome.lines == [metrics.read(tmp_path / "together" / "seed5")]
    assert outcome.lines[0][-1]["test_accuracy"] == summary.final
    assert outcome.best == [{k: summary.best[k] for k in ("epoch", "accuracy")}]
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
            run_of(states, run),
            state,
        )
    assert not np.allclose(losses[0], losses[1], rtol=1e-2)


def test_visits_add_up_to_the_run_that_was_never_stopped(digits, tmp_path):
    settings = recipe(model__weights="sign", batch_size=64)
    few = Split(digits.train.images[:128], digits.train.labels[:128])
    digits = dataclasses.replace(digits, train=few)
    whole = train_together(settings, SEEDS, digits, tmp_path / "whole", keep="best")
    assert whole.finished
    place = tmp_path / "visits"
    for questions, step in ((4, 3), (100, 4)):  # in the middle of the second epoch, and the end
        outcome = train_together(
            *(settings, SEEDS, digits, place),
            keep="best",
            deadline=StopsAfter(questions),
            visit={"device": step},
        )
        assert outcome.step == step
        assert outcome.finished == (step == 4) == (outcome.kept is not None)
    for seed in SEEDS:
        assert epochs(place / f"seed{seed}") == epochs(tmp_path / f"whole/seed{seed}")
    assert outcome.best == whole.best
    assert list(outcome.visits) == [{"device": 3}, {"device": 4}]
    ours, theirs = (jax.tree.leaves(one.note["best"]) for one in (outcome, whole))
    assert ours == theirs
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(outcome.kept(x), whole.kept(x))


def test_a_place_belongs_to_its_seeds_and_schedule(digits, tmp_path):
    settings = recipe(epochs=1, schedule__boundaries=())
    train_together(settings, [0], digits, tmp_path, keep="best", deadline=StopsAfter(2))
    with pytest.raises(UserError, match=r"is of the seeds \[0\], not of \[1\]"):
        train_together(settings, [1], digits, tmp_path, keep="best")
    settings.epochs = 2
    with pytest.raises(UserError, match="epochs: 1 -> 2"):
        train_together(settings, [0], digits, tmp_path, keep="best")


@pytest.mark.slow
def test_the_end_of_an_epoch_is_kept_room_for_from_the_first_step_on(digits, tmp_path):
    settings = recipe(epochs=3, schedule__boundaries=())
    few = Split(digits.train.images[:128], digits.train.labels[:128])
    digits = dataclasses.replace(digits, train=few)
    worked = []

    class Notes(StopsAfter):
        def worked(self, seconds):
            worked.append(seconds)

    train_together(settings, [0], digits, tmp_path, keep="best", deadline=Notes(2))
    first, _, longest = worked
    assert first == 0 < longest
    train_together(settings, [0], digits, tmp_path, keep="best", deadline=Notes(2))
    assert worked[3] == longest


def test_a_signal_in_the_last_epoch_is_not_lost(digits, tmp_path, monkeypatch):
    settings = recipe(epochs=1, schedule__boundaries=())
    evaluated = together._Runs._epoch_ends

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluated(*arguments)

    monkeypatch.setattr(together._Runs, "_epoch_ends", interrupted)
    outcome = train_together(settings, [0], digits, tmp_path, keep="best")
    assert outcome.finished
    assert outcome.signal == signal.SIGTERM


@pytest.mark.parametrize(
    "overrides", [{"parallel__fsdp": True}, {"data__validation": 10}, {"batch_size": 5000}]
)
def test_what_cannot_be_trained_together_is_said(digits, tmp_path, overrides):
    with pytest.raises(UserError, match=r"together|more than the"):
        train_together(recipe(**overrides), [0], digits, tmp_path / "run", keep="best")
    assert not (tmp_path / "run").exists()


def test_a_deadline_keeps_room_for_the_step_under_way_and_for_saving(monkeypatch):
    now = 100.0
    monkeypatch.setattr(together.time, "monotonic", lambda: now)
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
