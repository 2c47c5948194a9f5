"""What a run leaves behind, and that stopping it loses nothing."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from shiftnet import checkpoint, data
from shiftnet.data import Split
from shiftnet.errors import RunFailed, UserError
from shiftnet.training import data_iterator, engine, metrics, workdir
from shiftnet.training.data_iterator import ResidentData
from shiftnet.training.deadline import Deadline
from shiftnet.training.evaluation import Evaluation
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.mesh import make_mesh, replicate
from shiftnet.training.restore import Record, check_same_data, restore
from shiftnet.training.step import Program, steps_per_dispatch
from tests.training.small import epochs, recipe, taught

STEPS_PER_EPOCH = 11  # 1442 training digits in batches of 128


def _stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Lets the loop see a Ctrl-C after its `call`-th step."""
    calls = iter(range(1, 10**6))
    monkeypatch.setattr(Interrupt, "requested", lambda self: next(calls) == call)


def _program(config) -> Program:
    dataset = data.load("digits")
    return engine.Program(
        config,
        num_classes=10,
        mean=dataset.mean,
        std=dataset.std,
        steps_per_epoch=len(dataset.train) // config.batch_size,
        mesh=make_mesh(config.batch_size),
    )


def _everything(workdir: Path, config=None) -> dict[str, np.ndarray]:
    """All arrays of a run's newest checkpoint, the optimizer's included."""
    series = checkpoint.CheckpointManager(workdir / checkpoint.LATEST)
    program = _program(config or recipe())
    step, skipped = series.newest_good()
    state, codes, _ = restore(
        program, engine.LevelWatch(program), np.uint32(0), series, step, series.metadata(step)
    )
    series.close()
    assert not skipped
    return {
        jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path((state, codes))
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, engine.train(recipe(log__tensorboard=True), workdir)


def test_a_run_says_how_it_ended_and_logs_every_epoch_once(uninterrupted):
    workdir, summary = uninterrupted
    lines = epochs(workdir)
    assert [line["step"] for line in lines] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.01])
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert summary.finished
    assert summary.step == 2 * STEPS_PER_EPOCH
    assert summary.final[0] == lines[-1]["test_accuracy"]
    assert summary.best[0]["accuracy"] == max(line["test_accuracy"] for line in lines)
    assert summary.chosen_on == "test"


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, marks=pytest.mark.slow),
        STEPS_PER_EPOCH,
        pytest.param(STEPS_PER_EPOCH + 4, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch, step
):
    reference, reference_summary = uninterrupted
    with monkeypatch.context() as patched:
        _stop_at(patched, step)
        first = engine.train(recipe(), tmp_path)
    assert (first.finished, first.step) == (False, step)
    assert checkpoint.find(tmp_path).name == str(step)

    assert engine.train(recipe(), tmp_path) == reference_summary
    want, got = _everything(reference), _everything(tmp_path)
    assert want.keys() == got.keys()
    assert len(want) > 30
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert epochs(tmp_path) == epochs(reference)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_another_teacher_is_no_continuation(tmp_path):
    now = {"images": {}, "steps_per_epoch": 11}
    check_same_data({"teacher": "abc"}, now | {"teacher": "abc"}, tmp_path)
    for teacher in ({}, {"teacher": "xyz"}):
        with pytest.raises(UserError, match=r"trained on other data \(the teacher\)"):
            check_same_data({"teacher": "abc"}, now | teacher, tmp_path)


# Each setting that draws random numbers, or adds to the optimizer's state.
MODERN = {
    "epochs": 1,
    "optimizer__name": "muon",
    "optimizer__accumulate": 2,
    "optimizer__clip_norm": 1.0,
    "optimizer__groups": "linear:2",
    "optimizer__freeze": "layer1.0.bn1",
    "schedule__name": "linear",
    "schedule__boundaries": (82, 123),
    "schedule__by": "step",
    "schedule__warmup": 0.3,
    "loss__label_smoothing": 0.1,
    "data__mixup": 0.4,
    "data__cutmix": 1.0,
    "data__erase": 0.3,
    "data__policy": "trivial",
    "data__flip": True,
    "data__flip_by": "turns",
    "model__drop_path": 0.2,
    "ema__decay": 0.8,
    "ema__estimate": 2,
    "log__every_steps": 4,
}


@jax.numpy_dtype_promotion("standard")  # which optax is written for
def test_all_that_is_newer_than_the_originals_continues_bit_for_bit(tmp_path, monkeypatch):
    teacher = taught(tmp_path / "teacher")
    config = recipe(**MODERN, distill__teacher=str(teacher), distill__weight=0.5)
    reference = engine.train(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        _stop_at(patched, 5)  # between the two batches of an update
        assert not engine.train(config, tmp_path / "stopped").finished
    assert engine.train(config, tmp_path / "stopped") == reference
    want, got = (_everything(tmp_path / name, config) for name in ("whole", "stopped"))
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert any(".ema" in name for name in want)
    for name in ("steps.jsonl", "environment.json"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_text() == stopped.read_text()
    ours, averaged = (checkpoint.read(tmp_path / run) for run in ("stopped", "whole/ema"))
    assert ours.path == tmp_path / "stopped/ema/11", "the network of a run is the averaged one"
    assert_same(ours.arrays, averaged.arrays)
    kept = averaged.arrays["layer1.0.bn1.mean"]
    assert not kept.any(), "a frozen batch norm was estimated"
    line = epochs(tmp_path / "whole")[-1]
    assert line["test_accuracy"] == reference.final[0]
    assert line["test_loss"] != line["raw_test_loss"]
    frozen = {name: value for name, value in want.items() if "'layer1'][0]['bn1']" in name}
    states = [v for k, v in frozen.items() if ".params" in k or ".stats" in k]
    assert len(states) == 4
    for value in states:
        assert np.isin(value, (0.0, 1.0)).all(), "a frozen batch norm has changed"


def test_a_run_ends_when_the_validation_accuracy_does_not_rise_any_more(
    tmp_path, monkeypatch, capsys
):
    accuracies = {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.9}  # of each epoch; the last is not reached

    def make_evaluator(*_, **__):
        def evaluate(params, stats):
            del params, stats
            epoch = len(metrics.read(tmp_path)) + 1
            nothing = np.zeros(1, np.int32)
            return Evaluation(
                1.0, accuracies[epoch], 1.0, nothing, nothing, np.ones(1, np.float32), nothing
            )

        return evaluate

    class Still:
        """Takes steps of one an epoch that change nothing."""

        def advance(self, state, step):
            del step
            return state, np.ones(1, np.float32), np.zeros(1, np.int32)

        def get_state(self):
            return {}

        def skipped(self):
            return []

        def close(self):
            pass

    monkeypatch.setattr(engine, "make_evaluator", make_evaluator)
    monkeypatch.setattr(engine, "make_data_iterator", lambda *_, **__: Still())
    digits = data.load("digits", validation=20)
    few = Split(digits.train.images[:128], digits.train.labels[:128])
    digits = dataclasses.replace(digits, train=few)
    config = recipe(epochs=5, patience=2, data__validation=20)
    with monkeypatch.context() as patched:
        _stop_at(patched, 3)
        assert not engine.train(config, tmp_path, dataset=digits).finished
    outcome = engine.train(config, tmp_path, dataset=digits)
    assert outcome.finished
    assert (outcome.step, outcome.best[0]["epoch"], outcome.final) == (4, 2, [0.5])
    assert "ended early: no higher validation accuracy since epoch 2" in capsys.readouterr().out
    assert engine.train(config, tmp_path, dataset=digits) == outcome
    assert "already finished, after step 4" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "best")
    assert engine.train(config, tmp_path, dataset=digits) == outcome
    printed = capsys.readouterr().out
    assert "already finished, after step 4" in printed
    assert "the best network, of epoch 2, is lost\n" in printed
    with pytest.raises(UserError, match="with patience each of them ends at an epoch of its own"):
        engine.train(config, tmp_path / "several", seeds=[0, 1], dataset=digits)


def test_a_finished_run_is_not_trained_again(uninterrupted, monkeypatch, capsys):
    workdir, summary = uninterrupted
    monkeypatch.setattr(Program, "update", None)
    assert engine.train(recipe(), workdir) == summary
    assert "already finished, after step 22" in capsys.readouterr().out


def test_a_run_without_a_step_has_the_network_that_it_started_with(tmp_path):
    outcome = engine.train(recipe(ema__decay=0.9), tmp_path, deadline=Deadline(1e-9))
    assert outcome.step == 0
    assert np.asarray(outcome.network.conv1.weight()).any()


def test_another_recipe_in_the_same_place_is_refused_by_its_fields(uninterrupted):
    workdir, _ = uninterrupted
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.1 -> 0\.2"):
        engine.train(recipe(optimizer__lr=0.2), workdir)
    assert (workdir / "config.json").read_text() == before


def _files(workdir: Path) -> dict[str, bytes]:
    files = (file for file in workdir.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(workdir)): file.read_bytes() for file in files}


def test_fewer_epochs_than_are_done_are_refused_and_nothing_is_rewritten(uninterrupted):
    place, _ = uninterrupted
    before = _files(place)
    message = r"has already taken 22 steps, and epochs 1 means 11: give --config\.epochs=2 or more"
    with pytest.raises(UserError, match=message):
        engine.train(recipe(epochs=1, schedule__boundaries=(1,)), place)
    assert _files(place) == before


def _fewer(digits):
    return dataclasses.replace(
        digits, train=Split(digits.train.images[9:], digits.train.labels[9:])
    )


def _other_classes(digits, names):
    return dataclasses.replace(digits, class_names=names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_fewer, "train images: 1442 -> 1433"),
        (lambda d: dataclasses.replace(d, validation=d.test), "validation images: 0 -> 355"),
        (
            lambda d: _other_classes(d, ("zero", *d.class_names[1:])),
            "class names: '0' -> 'zero'",
        ),
        (lambda d: _other_classes(d, d.class_names[::-1]), "the order of the classes"),
        (lambda d: _other_classes(d, (*d.class_names, "ten")), "classes: 10 -> 11"),
    ],
)
def test_a_run_is_not_continued_on_other_data(uninterrupted, change, message):
    place, _ = uninterrupted
    before = _files(place)
    with pytest.raises(UserError, match=f"checkpoints/22 was trained on other data.*{message}"):
        engine.train(recipe(epochs=3), place, dataset=change(data.load("digits")))
    assert _files(place) == before


def test_a_lengthened_run_keeps_its_own_best_network_not_one_left_behind(tmp_path):
    # Better with every epoch.
    steady = {"batch_size": 32, "optimizer__lr": 0.03, "schedule__boundaries": (9,)}
    first = engine.train(recipe(epochs=1, **steady), tmp_path)
    best = tmp_path / checkpoint.BEST
    # A run of other epochs was killed after it had found a better network and before it saved.
    shutil.move(best / "45", best / "90")
    summary = engine.train(recipe(epochs=2, **steady), tmp_path)
    assert summary.best[0]["epoch"] == 2
    assert summary.best[0]["accuracy"] > first.best[0]["accuracy"]
    kept, newest = checkpoint.read(best), checkpoint.read(tmp_path)
    assert kept.path.name == newest.path.name == "90"
    assert len(kept.arrays) > 15
    for name, array in newest.arrays.items():
        np.testing.assert_array_equal(kept.arrays[name], array, err_msg=name)


@pytest.mark.core
def test_the_metadata_of_older_checkpoints_are_understood():
    best = {"epoch": 3, "accuracy": 0.5, "test_accuracy": 0.4}
    sums = {"loss": 1.0, "correct": 2, "steps": 3}
    single = {"step": 7, "tally": sums, "feed": {"a": 1}, "best": best, "final": 0.25}
    record = Record.of_metadata(single, 1)
    assert (record.step, record.sums, record.data) == (7, [sums], {"a": 1})
    assert (record.best, record.final, record.sessions) == ([best], [0.25], [])
    several = {
        "step": 7,
        "seeds": [0, 1],
        "tallies": [sums, sums],
        "best": [{"epoch": 3, "accuracy": 0.4}, None],
        "seconds": 9.0,
        "epoch_end": 2.0,
        "visits": [{"device": "cpu"}],
    }
    record = Record.of_metadata(several, 2)
    assert record.best == [{"epoch": 3, "accuracy": 0.4, "test_accuracy": 0.4}, None]
    assert record.final == [None, None]
    assert record.sessions == [{"device": "cpu"}]
    assert Record.of_metadata(json.loads(json.dumps(record.metadata())), 2) == record


@pytest.mark.slow
def test_a_run_may_be_lengthened_and_then_chooses_on_held_out_images(tmp_path):
    options = {"data__validation": 300, "batch_size": 256}
    engine.train(recipe(epochs=1, **options), tmp_path)
    summary = engine.train(recipe(epochs=2, eval__batch_size=64, **options), tmp_path)
    lines = epochs(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [4, 8]  # 1142 images are left
    assert summary.chosen_on == "validation"
    best = max(lines, key=lambda line: line["validation_accuracy"])
    assert summary.best[0] == {
        "epoch": best["epoch"],
        "accuracy": best["validation_accuracy"],
        "test_accuracy": best["test_accuracy"],
    }


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(
    uninterrupted, tmp_path, monkeypatch
):
    advance = ResidentData.advance

    def diverging(self, state, step):
        state, losses, corrects = advance(self, state, step)
        return state, losses * (np.nan if step >= STEPS_PER_EPOCH + 2 else 1), corrects

    monkeypatch.setattr(ResidentData, "advance", diverging)
    with pytest.raises(RunFailed) as error:
        engine.train(recipe(), tmp_path)
    kept = tmp_path / checkpoint.LATEST / str(STEPS_PER_EPOCH)
    sentence = str(error.value)
    assert f"step {STEPS_PER_EPOCH + 3} (learning rate 0.01)" in sentence
    assert sentence.endswith(f"the last good one is {kept}")
    assert kept.is_dir()
    assert checkpoint.find(tmp_path) == kept


def test_numbers_that_give_no_finite_loss_are_no_good_checkpoint(tmp_path):
    """The first update ruins the network; its checkpoint has what the second step's loss is of."""
    settings = recipe(optimizer__lr=1e25, checkpoint__every_steps=1)
    for _ in "ab":
        with pytest.raises(RunFailed) as error:
            engine.train(settings, tmp_path)
        kept = tmp_path / checkpoint.LATEST / "1"
        assert "at step 2 (learning rate 1e+25)" in str(error.value)
        assert str(error.value).endswith(
            f"; {kept} has the numbers that gave it: remove it to continue from an earlier state"
        )


def test_a_network_that_the_last_step_ruined_is_no_result(tmp_path, monkeypatch):
    right = Evaluation.metrics
    monkeypatch.setattr(
        Evaluation, "metrics", lambda self, name: right(self, name) | {f"{name}_loss": np.nan}
    )
    with pytest.raises(RunFailed, match=r"after the last step the loss on the test images is nan"):
        engine.train(recipe(epochs=1), tmp_path)


def test_too_little_memory_names_a_batch_size_to_try(tmp_path, monkeypatch):
    def update(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(Program, "update", update)
    with pytest.raises(RunFailed, match=r"batch_size 128; try --config\.batch_size=64"):
        engine.train(recipe(), tmp_path)


@pytest.mark.parametrize(
    ("batch_size", "sentence"),
    [(2048, "more than the 1442 training images"), (127, "does not divide over 2 devices")],
)
def test_a_batch_size_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path, batch_size, sentence
):
    with pytest.raises(UserError, match=sentence):
        engine.train(recipe(batch_size=batch_size), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_working_directory_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write to --workdir .*file: "):
        engine.train(recipe(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_working_directory_is_one_runs_at_a_time(tmp_path):
    with workdir.locked(tmp_path, recipe()):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()} on"):
            engine.train(recipe(), tmp_path)
        assert sorted(tmp_path.iterdir()) == before
    with workdir.locked(tmp_path, recipe()):
        pass  # it is free again


def test_a_damaged_checkpoint_is_said_and_the_run_ends_the_same(uninterrupted, tmp_path, capsys):
    reference, summary = uninterrupted
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    newest = checkpoint.find(tmp_path)
    (newest / "_CHECKPOINT_METADATA").write_text("{}")
    assert engine.train(recipe(), tmp_path) == summary
    assert f"skipped {newest}: its file _CHECKPOINT_METADATA is damaged" in capsys.readouterr().out
    want, got = _everything(reference), _everything(tmp_path)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert epochs(tmp_path) == epochs(reference)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    reference, summary = uninterrupted
    clock, save, ahead = time.time, checkpoint.CheckpointManager.save, [0.0]

    def save_and_jump(self, *args, **kwargs):
        save(self, *args, **kwargs)
        ahead[0] = 86400.0 - ahead[0]  # a day ahead, and back after the next

    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    monkeypatch.setattr(checkpoint.CheckpointManager, "save", save_and_jump)
    assert engine.train(recipe(), tmp_path) == summary
    assert epochs(tmp_path) == epochs(reference)


@pytest.mark.slow  # test_parallel has the step in numbers
def test_batch_norm_of_each_devices_share_is_another_run(uninterrupted, tmp_path):
    reference, _ = uninterrupted
    engine.train(recipe(epochs=1, parallel__batch_norm="per_device"), tmp_path)
    mine, whole = epochs(tmp_path)[0], epochs(reference)[0]
    assert mine["train_loss"] != whole["train_loss"]
    assert mine["train_loss"] == pytest.approx(whole["train_loss"], rel=0.3)


def test_a_profile_is_where_tensorboard_looks(tmp_path):
    engine.train(recipe(), tmp_path, profile=True)
    assert list(tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb"))


def test_the_time_that_did_not_go_into_steps_is_in_the_log(uninterrupted):
    workdir, _ = uninterrupted
    *_, last = metrics.read(workdir)
    assert {"compilation", "checkpoints", "evaluation"} <= last["time"].keys()
    assert 0 < sum(last["time"].values()) < 1


def test_tensorboard_shows_the_accuracy_of_every_epoch(uninterrupted):
    (events,) = (uninterrupted[0] / "tensorboard").iterdir()
    assert b"test/accuracy" in events.read_bytes()


def test_lines_of_steps_that_were_lost_are_dropped_on_resuming(tmp_path):
    rows = [{"step": 10, "a": 1.0}, {"step": 20, "a": 2.0}, {"step": 30, "a": 3.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "a"'
    (tmp_path / metrics.FILE).write_text(text)
    log = metrics.MetricsLog(tmp_path, step=20)
    log.write({"step": 30, "a": 4.0})
    assert metrics.read(tmp_path) == [*rows[:2], {"step": 30, "a": 4.0}]


@pytest.mark.parametrize("end", [b"\0" * 900 + b"\n", b'{"step": 20, "a"', b"[1]\n", b"\xff\n"])
def test_a_damaged_end_of_the_log_is_cut_off_and_said(tmp_path, end):
    (tmp_path / metrics.FILE).write_bytes(b'{"step": 10, "a": 1.0}\n' + end)
    log = metrics.MetricsLog(tmp_path, step=20)
    assert log.damage == f"cut off the damaged end of {tmp_path / metrics.FILE}, from line 2 on"
    log.write({"step": 20})
    assert metrics.read(tmp_path) == [{"step": 10, "a": 1.0}, {"step": 20}]
    assert metrics.MetricsLog(tmp_path, step=20).damage is None


def test_a_disk_that_is_full_for_the_log_is_a_sentence(tmp_path):
    log = metrics.MetricsLog(tmp_path, step=0)
    (tmp_path / metrics.FILE).unlink()
    (tmp_path / metrics.FILE).symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.write({"step": 1})


@pytest.mark.parametrize(
    ("steps", "expected"), [(390, 39), (22, 22), (50, 50), (97, 50), (781, 50), (5004, 36), (1, 1)]
)
def test_a_call_takes_many_steps_whatever_their_number(steps, expected):
    assert steps_per_dispatch(steps, "gpu") == expected
    assert steps_per_dispatch(steps, "cpu") == 1


def test_a_prime_number_of_steps_is_taken_in_few_calls_the_same_after_a_resume(monkeypatch):
    monkeypatch.setattr(
        data_iterator, "steps_per_dispatch", lambda *_: steps_per_dispatch(97, "gpu")
    )

    class Calls:
        teacher = None
        lengths: tuple[int, ...] = ()

        def order(self, *_):
            return None

        def train(self, *_, length):
            self.lengths += (length,)

    def calls(step):
        program, part = Calls(), data.load("digits").train
        iterator = ResidentData(np.uint32(0), program, part, 97, make_mesh())
        while step < 2 * 97:
            iterator.advance(None, step)
            step += program.lengths[-1]
        return program.lengths

    assert calls(0) == (50, 47, 50, 47)
    assert calls(50) == (47, 50, 47)
    assert calls(97 + 30) == (20, 47)  # of a run that a CPU began: its calls end at any step


def test_several_steps_in_one_call_are_the_steps_one_by_one(uninterrupted):
    dataset = data.load("digits")
    program = _program(recipe())  # whose single step is compiled
    seed = np.uint32(0)
    images = replicate(dataset.train.images, make_mesh())
    labels = replicate(dataset.train.labels, make_mesh())
    order = program.order(seed, 0, len(dataset.train))
    together = program.train(program.init(seed), seed, images, labels, order, length=3)
    state, losses = program.init(seed), []
    for _ in range(3):
        state, loss, _ = program.train(state, seed, images, labels, order, length=1)
        losses.append(loss[0])
    assert int(together[0].step) == int(state.step) == 3
    np.testing.assert_allclose(together[1], np.stack(losses), rtol=1e-3)
