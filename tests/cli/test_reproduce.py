"""The rows of the results: from the table to a file that `evaluate.py` takes."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import shiftnet
import shiftnet.data
from shiftnet import checkpoint, config, results
from shiftnet.checkpoint import DIGESTS, LATEST
from shiftnet.cli import evaluate
from shiftnet.cli import reproduce as command
from shiftnet.data import Split
from shiftnet.errors import RunFailed, UserError
from shiftnet.models import build
from shiftnet.models.counting import count
from shiftnet.results import reproduce
from shiftnet.training import environment
from shiftnet.training.deadline import Deadline
from shiftnet.training.engine import Outcome
from tests.training import small

ROOT = Path(__file__).parents[2]

RECIPE = """
from shiftnet.config import apply_argument, default_config


def get_config(argument=""):
    config = default_config()
    config.epochs = 2
    config.model.arch, config.model.expansion = "small", 1.0
    config.data.name = "digits"
    config.data.flip = False
    config.schedule.boundaries = (1,)
    apply_argument(config, argument, {"weights": "model.weights"})
    return config
"""

TABLE = """
[[tables]]
name = "digits"
title = "Networks on digits"
source = "nothing"
epoch = "best"
note = ""

[[tables.rows]]
name = "dear"
recipe = "RECIPE:weights=sign"
parameters = 2
multiply_adds = 2000
bytes = 8

[[tables.rows]]
name = "cheap"
recipe = "RECIPE"
parameters = 1
multiply_adds = 1000
bytes = 4
reported = 50.0
"""


@pytest.fixture(autouse=True, scope="module")
def _small_network():
    with small.known():
        yield


def furnished(place):
    (place / "recipe.py").write_text(RECIPE)
    (place / "results").mkdir()
    table = TABLE.replace("RECIPE", str(place / "recipe.py"))
    (place / "results" / results.TABLE).write_text(table)
    return place


@pytest.fixture
def place(tmp_path):
    return furnished(tmp_path)


def folders_of(place):
    return ("--results", str(place / "results"), "--workdir", str(place / "runs"))


def options_of(place, **more):
    folders = {"results": place / "results", "workdir": place / "runs"}
    return reproduce.Options(**folders, pattern="cheap", **more)


def run(place, *arguments):
    return command.main([*arguments, *folders_of(place)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = furnished(tmp_path_factory.mktemp("reproduce"))
    assert run(place, "--only", "cheap", "--seeds", "2", "--together", "1") == 0
    return place


def test_a_finished_row_is_a_file_with_all_there_is_to_know(trained):
    result = results.read(trained / "results", "cheap")
    assert [one["seed"] for one in result["runs"]] == [0, 1]
    assert result["epochs"] == result["full_epochs"] == 2
    assert result["config"]["model"]["arch"] == "small"
    assert result["config"]["data"]["dir"] == ""
    for one in result["runs"]:
        accuracies = [line["test_accuracy"] for line in one["epochs"]]
        assert one["final_accuracy"] == accuracies[-1]
        assert one["best_accuracy"] == max(accuracies)
        assert accuracies[one["best_epoch"] - 1] == max(accuracies)
        assert one["seconds"] > 0
        assert one["images_per_second"] > 0
        assert one["together"] == 1
        assert one["versions"]["jax"]
        assert one["fraction_of_peak"] is None
    assert sum(images for _, _, images in result["checkpoint"]["confusion"]) == 355
    assert not list((trained / "results").glob("*.tmp"))
    assert not list((trained / "runs").iterdir())


def test_evaluate_prints_the_number_of_the_kept_network(trained, capsys):
    result = results.read(trained / "results", "cheap")
    kept = result["checkpoint"]
    path = trained / "results" / kept["file"]
    assert path.stat().st_size == kept["bytes"]
    assert evaluate.main(["--ckpt", str(path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["top1"] == kept["test_accuracy"]
    assert row["step"] == kept["epoch"] * (1442 // 128)
    # Numbers of 16 bits: a few images near a border may fall to the other side.
    assert abs(row["top1"] - result["runs"][0]["best_accuracy"]) < 0.01


def test_the_kept_network_can_be_trained_further(trained):
    kept = results.read(trained / "results", "cheap")["checkpoint"]
    path = trained / "results" / kept["trainable"]["file"]
    assert path == trained / "results/trainable/cheap.safetensors"
    for entry in (kept, kept["trainable"]):
        content = (trained / "results" / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    whole, packed = (
        shiftnet.load(trained / "results" / e["file"]) for e in (kept["trainable"], kept)
    )
    images = shiftnet.data.load("digits").test.images[:50]
    np.testing.assert_allclose(  # the packed numbers have 16 bits
        whole.predict(images).probabilities, packed.predict(images).probabilities, atol=0.02
    )
    saved = checkpoint.read(path)
    assert saved.arrays["bn1.var"].dtype == np.float32
    assert saved.metadata["step"] == packed.metadata["step"]
    with pytest.raises(UserError, match="is a packed network, whose batch norms are folded"):
        checkpoint.read(trained / "results" / kept["file"])


def test_a_number_of_another_device_is_replaced_by_one_of_this(trained, tmp_path, capsys):
    place = tmp_path / "copy"
    shutil.copytree(trained, place)
    before = results.read(place / "results", "cheap")
    kept = before["checkpoint"]
    old = {name: kept[name] for name in ("file", "bytes", "seed", "epoch", "confusion")}
    results.write(place / "results", {**before, "checkpoint": {**old, "test_accuracy": 0.25}})
    assert run(place, "--reevaluate") == 0
    assert capsys.readouterr().out == (
        f"cheap: {kept['test_accuracy']:.2%}, where its file had 25.00%\n"
    )
    after = results.read(place / "results", "cheap")
    assert after == {**before, "checkpoint": {k: v for k, v in kept.items() if k != "trainable"}}


def test_a_row_starts_from_another_rows_network(trained, place, capsys, monkeypatch):
    starts = []

    def train(*_, init, seeds, **__):
        starts.append((init, seeds))
        return Outcome(False, 0, [None], [None], "test")

    monkeypatch.setattr(reproduce, "train", train)
    path = place / "results" / results.TABLE
    path.write_text(path.read_text().replace('name = "dear"', 'name = "dear"\ninit = "cheap"'))
    assert run(place, "--only", "dear") == 1
    assert "it starts from cheap, of which there is no trainable" in capsys.readouterr().err
    shutil.copytree(trained / "results", place / "results", dirs_exist_ok=True)
    path.write_text(path.read_text().replace('name = "dear"', 'name = "dear"\ninit = "cheap"'))
    assert run(place, "--only", "dear", "--seeds", "2", "--together", "2") == 0
    assert run(place, "--only", "cheap", "--seeds", "3") == 0
    assert starts == [(place / "results/trainable/cheap.safetensors", [0]), (None, [2])]
    # A network to start from belongs to the row's own recipe.
    monkeypatch.setattr(reproduce, "_by_recipe", lambda row, _: config.load(row.recipe))
    assert run(place, "--only", "dear", "--recipe", "short") == 0
    assert starts[2:] == [(None, [0])]


def test_a_row_learns_from_another_rows_network(trained, place, capsys, monkeypatch):
    fields = '{"teacher": "distill.teacher", "weights": '
    (place / "recipe.py").write_text(RECIPE.replace('{"weights": ', fields))
    path = place / "results" / results.TABLE
    table = path.read_text().replace("weights=sign", "weights=sign,teacher=cheap")
    path.write_text(table)
    assert run(place, "--only", "dear") == 1
    assert "it learns from cheap, of which there is no network yet" in capsys.readouterr().err
    shutil.copytree(trained / "results", place / "results", dirs_exist_ok=True)
    path.write_text(table)
    assert run(place, "--only", "dear") == 0
    found, teacher = results.read(place / "results", "dear"), place / "results/cheap.safetensors"
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert found["teacher"] == {"network": "cheap", "sha256": digest}
    assert found["config"]["distill"]["teacher"] == "cheap"


def test_the_list_says_what_is_done(trained, capsys):
    assert run(trained, "--list", "--seeds", "2") == 0
    table = capsys.readouterr().out
    cheap, dear = (
        next(line for line in table.splitlines() if line.startswith(name))
        for name in ("cheap", "dear")
    )
    assert "50.00" in cheap
    assert "±" in cheap
    assert "2 of 2" in cheap
    assert "done" in cheap
    assert "0 of 2" in dear
    assert "missing" in dear
    assert "about" in dear  # by what the other took here


def test_outside_of_a_checkout_the_packages_table_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    assert "shiftresnet20_1c_c100" in capsys.readouterr().out
    assert command.main(["--only", "no_such_row"]) == 2
    assert "matches 'no_such_row'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        reproduce, "run", lambda options, *_, **__: len(list(options.results.iterdir()))
    )
    assert command.main(["--only", "shiftresnet20_1c_c100"]) == 1
    table = (tmp_path / "results/table.toml").read_bytes()
    assert table == (ROOT / "results/table.toml").read_bytes()


def test_what_is_done_is_not_done_again(trained, capsys):
    before = results.path_of(trained / "results", "cheap").read_bytes()
    assert run(trained, "--only", "cheap", "--seeds", "2") == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert results.path_of(trained / "results", "cheap").read_bytes() == before


@pytest.fixture
def stale(trained, tmp_path):
    """A copy of `trained` whose result is of another recipe."""
    place = tmp_path / "copy"
    shutil.copytree(trained, place)
    path = results.path_of(place / "results", "cheap")
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2', 1))
    return place


def test_a_result_of_another_recipe_is_left_alone(stale, capsys):
    before = results.path_of(stale / "results", "cheap").read_bytes()
    assert run(stale, "--only", "cheap", "--seeds", "3") == 2
    assert "is of another recipe, with optimizer.lr: 0.2 -> 0.1" in capsys.readouterr().err
    assert results.path_of(stale / "results", "cheap").read_bytes() == before


def test_a_result_of_another_recipe_keeps_nothing_else_from_being_listed(stale, capsys):
    assert run(stale, "--list") == 0
    dear, cheap = capsys.readouterr().out.splitlines()[-2:]
    assert "another recipe's" in cheap
    assert "missing" in dear


def test_rows_that_do_not_fit_are_passed_over(place, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr(reproduce, "_train_row", lambda job, *_: trained.append(job.row.name))

    def seconds(job, jobs):
        return 1000.0 if job.row.name == "cheap" else 1.0

    monkeypatch.setattr(reproduce, "_estimate", seconds)
    assert run(place, "--next", "--budget", "9m") == 0
    assert trained == ["dear"]
    assert "cheap would take about 17 min: it does not fit" in capsys.readouterr().out


def test_next_takes_the_cheapest_and_a_budget_stops_in_time(place, capsys, monkeypatch):
    stop_after(monkeypatch, 5)
    assert command.seconds_of("9m") == 540
    assert run(place, "--next", "--budget", "9m") == 0
    assert "cheap: stopped after step 3, saved" in capsys.readouterr().out
    assert results.read(place / "results", "cheap") is None
    monkeypatch.undo()
    assert run(place, "--only", "cheap") == 0
    assert "dear" not in capsys.readouterr().out
    assert len(results.read(place / "results", "cheap")["runs"]) == 1


def stop_after(monkeypatch, questions):
    """Lets time run out at the so-manieth question whether there is any."""

    class Short(Deadline):
        def __init__(self, seconds):
            super().__init__(None)
            self.questions = questions

        @property
        def left(self):
            self.questions -= 1
            return self.questions

    monkeypatch.setattr(command, "Deadline", Short)


@pytest.mark.slow
def test_what_was_begun_goes_on_when_more_seeds_are_asked_for(place, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        patched.setattr(environment, "describe", lambda: {"device": "another", "commit": "1"})
        assert run(place, "--only", "cheap", "--seeds", "1") == 0
    assert "cheap: stopped after step 3, saved" in capsys.readouterr().out
    assert run(place, "--only", "cheap", "--seeds", "3", "--together", "2") == 0
    told = capsys.readouterr().out
    assert "cheap, seeds 0, in" in told
    assert "cheap, seeds 1, 2, in" in told
    runs = results.read(place / "results", "cheap")["runs"]
    assert [one["seed"] for one in runs] == [0, 1, 2]
    assert [one["together"] for one in runs] == [1, 2, 2]
    assert [results.devices(one)[:-1] for one in runs] == [["another"], [], []]
    assert runs[0]["earlier"] == [{"device": "another", "commit": "1"}]
    assert not list((place / "runs").iterdir())


def test_a_begun_group_is_left_where_fewer_are_asked_to_train_together(place):
    saved = place / "runs" / "cheap_seeds0-1" / LATEST / "3"
    saved.mkdir(parents=True)
    (saved / DIGESTS).touch()
    row = next(row for row in results.tables(place / "results")[0].rows if row.name == "cheap")

    def groups(together):
        return [seeds for seeds, _ in reproduce._groups(row, [0, 1], together, place / "runs")]

    assert groups(None) == groups(2) == [[0, 1]]
    assert groups(1) == [[0], [1]]


def test_a_seed_that_another_process_finished_counts_once(trained, tmp_path, monkeypatch):
    place = tmp_path / "copy"
    shutil.copytree(trained, place)
    before = results.read(place / "results", "cheap")
    monkeypatch.setattr(reproduce.results, "read", lambda *_: None)
    options = options_of(place)
    (job,) = reproduce.find(options)
    monkeypatch.undo()
    assert job.groups[0][0] == [0]
    assert reproduce._train_row(job, options, Deadline(None)) is None  # nothing to do
    assert results.read(place / "results", "cheap") == before
    outcome = reproduce._train(job, *job.groups[0], options, Deadline(None))
    assert outcome.finished
    after = results.read(place / "results", "cheap")
    assert [one["seed"] for one in after["runs"]] == [0, 1]
    assert after["runs"][0]["finished"] > before["runs"][0]["finished"]


def test_two_seeds_that_end_at_the_same_time_are_both_kept(trained, tmp_path, monkeypatch):
    place = tmp_path / "copy"
    shutil.copytree(trained, place)
    options = options_of(place, seeds=4, together=1)
    (job,) = reproduce.find(options)
    assert [seeds for seeds, _ in job.groups] == [[2], [3]]

    def slowly(job, before, seeds, *_):
        time.sleep(0.2)
        return before | {"runs": [*before["runs"], before["runs"][0] | {"seed": seeds[0]}]}

    monkeypatch.setattr(
        reproduce, "train", lambda *_, **__: Outcome(True, 22, [0.5], [None], "test")
    )
    monkeypatch.setattr(reproduce, "_result", slowly)
    monkeypatch.setattr(reproduce, "_summary", lambda *_: "")
    for _, workdir in job.groups:
        workdir.mkdir()
    with ThreadPoolExecutor() as threads:
        ends = [
            threads.submit(reproduce._train, job, *group, options, Deadline(None))
            for group in job.groups
        ]
    assert all(end.result().finished for end in ends)
    runs = results.read(place / "results", "cheap")["runs"]
    assert sorted(one["seed"] for one in runs) == [0, 1, 2, 3]


def test_seeds_that_another_process_trains_are_left_to_it(trained, tmp_path, capsys, monkeypatch):
    place = tmp_path / "copy"
    shutil.copytree(trained, place)
    tried = []

    def train(job, seeds, *_):
        tried.append(seeds)
        return Outcome(True, 22, [0.5], [None], "test")

    monkeypatch.setattr(reproduce, "_train", train)
    with reproduce._alone_with(place / "runs" / "cheap_seeds2"):
        assert run(place, "--only", "cheap", "--seeds", "4", "--together", "1") == 0
    assert tried == [[3]]
    message = rf"cheap, seeds 2, left out: .*cheap_seeds2 is in use .*process {os.getpid()}"
    assert re.search(message, capsys.readouterr().out)
    assert not list((place / "runs").iterdir())


def test_a_data_set_of_another_size_makes_no_row(place, capsys, monkeypatch):
    digits = shiftnet.data.load("digits")
    few = Split(digits.train.images[:100], digits.train.labels[:100])
    fewer = dataclasses.replace(digits, train=few)
    monkeypatch.setattr(shiftnet.data, "load", lambda *_, **__: fewer)
    assert run(place, "--only", "cheap") == 2
    message = "cheap needs digits with 1442 training images, found 100"
    assert message in capsys.readouterr().err
    assert not list((place / "runs").iterdir())


def test_a_row_that_fails_does_not_keep_the_next_from_training(place, capsys, monkeypatch):
    tried = []

    def fails(job, *arguments):
        tried.append(job.row.name)
        if job.row.name == "cheap":
            raise RunFailed("the loss of seed 0 became nan at step 3")

    monkeypatch.setattr(reproduce, "_train_row", fails)
    assert run(place, "--next") == 1
    assert "error: cheap: the loss of seed 0 became nan" in capsys.readouterr().err
    assert tried == ["cheap", "dear"]


def test_a_short_schedule_is_kept_apart_and_a_large_network_where_git_does_not_look(
    place, capsys, monkeypatch
):
    monkeypatch.setattr(reproduce, "LARGE_BYTES", 1000)
    assert run(place, "--only", "cheap", "--epochs", "1") == 0
    told = capsys.readouterr().out
    assert "on 1 of 2 epochs" in told
    assert results.read(place / "results", "cheap") is None
    folder = place / "results" / "smoke"
    result = results.read(folder, "cheap")
    kept = folder / result["checkpoint"]["file"]
    assert str(kept) in told
    trainable = folder / result["checkpoint"]["trainable"]["file"]
    assert kept == folder / "large/cheap.safetensors"
    assert trainable == folder / "large/trainable/cheap.safetensors"
    assert {*folder.glob("**/*.safetensors")} == {kept, trainable}
    assert evaluate.main(["--ckpt", str(kept)]) == 0
    assert (result["epochs"], result["full_epochs"]) == (1, 2)
    assert result["config"]["schedule"]["boundaries"] == []


def test_another_recipe_is_kept_apart_and_counts_after_the_last_epoch(place, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = TABLE.replace('"RECIPE"', '"configs/shiftresnet20_c100.py"')
    (place / "results" / results.TABLE).write_text(table.replace("RECIPE", "configs/quickstart.py"))
    (job,) = reproduce.find(options_of(place, recipe="short"))
    assert job.folder == place / "results" / "short"
    assert (job.config.epochs, job.full_epochs, job.epoch) == (30, 164, "final")
    assert [workdir.parent.name for _, workdir in job.groups] == ["short"]
    (job,) = reproduce.find(options_of(place, recipe="short", epochs=3))
    assert (job.folder.name, job.config.epochs) == ("short-smoke", 3)


@pytest.mark.parametrize(
    ("name", "boundaries", "expected"),
    [("step", (82, 123), (4, 5)), ("sgdr", (2, 4, 8, 16), (2, 4)), ("cosine", (), ())],
)
def test_a_shortened_schedule_keeps_its_form(name, boundaries, expected):
    recipe = config.default_config()
    recipe.schedule.name, recipe.schedule.boundaries = name, boundaries
    recipe.epochs, recipe.schedule.warmup = 164, 82
    reproduce.shorten(recipe, 7)
    assert (recipe.epochs, recipe.schedule.boundaries) == (7, expected)
    assert recipe.schedule.warmup == pytest.approx(3.5)
    reproduce.shorten(recipe, 100)
    assert recipe.epochs == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nosuch*"], "no row and no table of"),
        (["--budget", "9"], "--budget must be a time such as 90s, 9m or 2h, found '9'"),
        (["--budget", "0m"], "--budget must be a time"),
        (["--seeds", "0"], "--seeds must be at least 1, found 0"),
        (["--seeds", "9999999999"], "--seeds must be at most 1000, found 9999999999"),
        (["--only", "cheap", "--next"], "--only and --next exclude each other"),
        (["--next", "--reevaluate"], "--reevaluate excludes --list and --next"),
    ],
)
def test_bad_input_is_a_sentence(place, arguments, message, capsys):
    before = sorted(place.rglob("*"))
    assert run(place, *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("[[tables", "is damaged"),
        (TABLE.replace('"best"', '"worst"'), "epoch must be best or final, found 'worst'"),
        (TABLE.replace('"dear"', '"cheap"'), "two rows named cheap"),
        (TABLE.replace("bytes = 8", "byte = 8"), "is damaged"),
        (TABLE.replace("bytes = 8", "bytes = '8'"), "bytes is '8"),
        (TABLE.replace('"dear"', '"../dear"'), "'../dear' is no name for a row"),
        (
            TABLE.replace('"dear"', '"dear"\ninit = "none"'),
            "dear starts from 'none', which is no row",
        ),
    ],
)
def test_a_damaged_table_is_a_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / results.TABLE).write_text(content)
    with pytest.raises(UserError, match=message):
        results.tables(tmp_path)


def test_a_damaged_result_is_a_sentence(tmp_path):
    for content in ("{", "[]", '{"row": "other", "runs": [1]}'):
        results.path_of(tmp_path, "row").write_text(content)
        with pytest.raises(UserError, match=r"cannot read|is not the result of row row"):
            results.read(tmp_path, "row")


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("config", None, "config is missing"),
        ("runs", [1], "there are no fields"),
        ("runs.seed", None, "seed is missing"),
        ("runs.best_accuracy", "0.5", "best_accuracy is '0.5'"),
        ("runs.best_accuracy", math.inf, "best_accuracy is inf"),
        ("runs.seconds", -1.0, "seconds is -1.0"),
        ("runs.seconds", 0, "seconds is 0"),
        ("runs.together", 0, "together is 0"),
        ("runs.final_accuracy", 1.5, "final_accuracy is 1.5"),
        ("runs.earlier", ["x"], r"earlier is \['x'\]"),
        ("checkpoint", {}, "in checkpoint file is missing"),
    ],
)
def test_a_result_with_a_wrong_field_is_a_sentence(tmp_path, place, value, sentence):
    path = next((ROOT / "results" / "smoke").glob("*.json"))
    result = json.loads(path.read_text())
    owner, name = (result["runs"][0], place[5:]) if "." in place else (result, place)
    owner[name] = value
    if value is None:
        del owner[name]
    results.path_of(tmp_path, path.stem).write_text(json.dumps(result))
    with pytest.raises(UserError, match=f"{path.name} is damaged: {sentence}"):
        results.read(tmp_path, path.stem)


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys; from shiftnet.errors import reported; sys.exit(reported(print)('row'))"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


ROWS = [row for table in results.tables(ROOT / "results") for row in table.rows]


def test_a_seed_that_is_twice_in_a_result_and_an_unknown_setting_are_a_sentence(tmp_path, capsys):
    path = next((ROOT / "results" / "smoke").glob("*.json"))
    result = json.loads(path.read_text())
    twice = result | {"runs": result["runs"][:1] * 2}
    results.path_of(tmp_path, path.stem).write_text(json.dumps(twice))
    with pytest.raises(UserError, match=f"{path.name} is damaged: two runs have the same seed"):
        results.read(tmp_path, path.stem)
    (tmp_path / results.TABLE).write_text((ROOT / "results" / results.TABLE).read_text())
    result["config"]["epochs"] = "x"
    results.path_of(tmp_path, path.stem).write_text(json.dumps(result))
    arguments = ["--results", str(tmp_path), "--only", path.stem, "--list"]
    assert command.main(arguments) == 2
    assert f"{path.name} is damaged: in config epochs must be a whole" in capsys.readouterr().err


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_table_is_of_the_recipes_that_it_names(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = config.load(row.recipe)
    assert ("c100" in row.name) == (recipe.data.name == "cifar100")
    if "20" in row.name:  # the deeper ones differ in depth alone
        classes = 100 if recipe.data.name == "cifar100" else 10
        network = nnx.eval_shape(lambda: build(recipe.model, classes, rngs=nnx.Rngs(0)))
        counts = count(network)
        assert row.parameters == counts.parameters
        assert row.multiply_adds == counts.multiply_adds
        assert row.bytes == counts.weight_bytes
