"""Sweeps: what is searched, what is chosen, what is continued. Training is a stand-in here."""

import itertools
import json
from pathlib import Path

import pytest

from shiftnet import zoo
from shiftnet.cli import sweep as command
from shiftnet.errors import NotTrainable, RunFailed, UserError
from shiftnet.models import own
from shiftnet.training import metrics, sweep
from shiftnet.training.engine import Outcome
from shiftnet.training.sweep import Values

RECIPE = """
from shiftnet.config import default_config


def get_config(argument=""):
    config = default_config()
    config.epochs = 4
    config.data.name = "digits"
    return config
"""


class Training:
    """Trains in no time, better the closer the rate is to 0.2; accuracies on the test set mislead.

    Attributes:
      trained: the rate and the first epoch of each call.
      inits: the network that each call starts from.
      teachers: the file of the one that it learns from.
      interrupted: the number of the call that is interrupted after two epochs.
      full: whether there is no room for a rate of 0.9.
    """

    def __init__(self):
        self.trained = []
        self.inits = []
        self.teachers = []
        self.interrupted = None
        self.full = True

    def __call__(self, config, workdir, *, init, seeds, deadline, stop, find):
        places = [workdir] if seeds is None else [workdir / f"seed{seed}" for seed in seeds]
        rate = config.optimizer.lr
        done = len(metrics.read(places[0]))
        self.trained.append((rate, done + 1))
        self.inits.append(init)
        if teacher := config.distill.teacher:
            self.teachers.append(find(teacher, "distill.teacher"))
        if rate > 0.9:
            raise NotTrainable("the loss became nan")
        if rate == 0.9 and self.full:
            raise RunFailed("cannot write x: No space left on device")
        if config.batch_size > 1000:
            raise UserError("batch_size must be at most the 1000 training images")
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        for epoch in range(done + 1, config.epochs + 1):
            lines = []
            for number, place in enumerate(places):
                accuracy = 0.5 - abs(rate - 0.2) + epoch / 100 + number / 1000
                lines.append(
                    {"step": epoch, "epoch": epoch, "validation_accuracy": accuracy}
                    | {"test_accuracy": rate}
                )
                with (place / metrics.FILE).open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
            if stop(lines):
                return Outcome(False, epoch, [None], [None], "validation")
            if len(self.trained) == self.interrupted and epoch == 2:
                return Outcome(False, epoch, [None], [None], "validation", signal=2)
        return Outcome(True, config.epochs, [0.5], [None], "validation")


@pytest.fixture
def place(tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def training(monkeypatch):
    stand_in = Training()
    monkeypatch.setattr(sweep, "train", stand_in)
    monkeypatch.setattr(command, "set_up", lambda: None)
    return stand_in


def run(place: Path, *arguments: str, validation: int = 100) -> int:
    config = ["--config", str(place / "recipe.py"), f"--config.data.validation={validation}"]
    return command.main([*config, "--workdir", str(place / "sweep"), *arguments])


def trials(place):
    return json.loads((place / "sweep" / sweep.TRIALS).read_text())


def test_the_best_trial_is_the_one_with_the_best_validation_accuracy(place, training, capsys):
    assert run(place, "--over", "optimizer.lr=0.1..0.4", "--trials", "9", "--seeds", "2") == 0
    found = trials(place)
    assert len(found) == 9
    nearest = min((rate for rate, _ in training.trained), key=lambda rate: abs(rate - 0.2))
    assert found[0]["params"] == {"optimizer.lr": pytest.approx(nearest)}
    assert found[0]["validation_accuracy"] == pytest.approx(0.5405 - abs(nearest - 0.2))
    assert (place / "sweep" / found[0]["folder"] / "seed1" / metrics.FILE).exists()
    table = capsys.readouterr().out.splitlines()[-9:]
    percent = f"{found[0]['validation_accuracy']:.2%}"
    assert table[0].split() == [found[0]["folder"], percent, f"optimizer.lr={nearest!r}"]


def test_of_lists_every_combination_is_tried_once_also_after_an_interruption(place, training):
    lists = ("--over", "optimizer.lr=0.1,0.2,0.4", "--over", "batch_size=32,64", "--no-prune")
    training.interrupted = 3
    assert run(place, *lists) == 130
    assert run(place, *lists) == 0
    found = [tuple(one["params"].values()) for one in trials(place)]
    assert sorted(found) == sorted(itertools.product(("0.1", "0.2", "0.4"), ("32", "64")))


def test_an_interrupted_trial_is_the_next_one(place, training, capsys):
    lists = ("--over", "optimizer.lr=0.1,0.15,0.2,0.25", "--trials", "2", "--no-prune")
    training.interrupted = 2
    assert run(place, *lists) == 130
    assert run(place, *lists) == 0
    assert training.trained == [(0.1, 1), (0.15, 1), (0.15, 3)]
    assert "trial0001: optimizer.lr=0.15" in capsys.readouterr().out
    assert {one["folder"] for one in trials(place)} == {"trial0000", "trial0001"}


def test_a_network_of_ones_own_is_searched_too(place, training, monkeypatch):
    monkeypatch.setattr(own, "_allowed", [])
    (place / "net.py").write_text("from flax import nnx\n\n\nclass Net(nnx.Module): pass\n")
    arch = f"--config.model.arch={place / 'net.py'}:Net"
    assert run(place, arch, "--over", "optimizer.lr=0.1") == 0
    assert own._allowed[-1].__name__ == "Net"


def test_several_seeds_are_those_from_the_recipes_on(place, training):
    lists = ("--over", "optimizer.lr=0.1", "--config.seed=7", "--seeds", "2")
    assert run(place, *lists) == 0
    assert sorted(one.name for one in (place / "sweep/trial0000").iterdir()) == ["seed7", "seed8"]


def test_every_trial_starts_from_the_network_that_init_names(place, training):
    network = zoo.list_models()[0].name
    assert run(place, "--over", "optimizer.lr=0.1,0.2", "--init", network) == 0
    assert [init.path for init in training.inits] == 2 * [zoo.find_trainable(network, "--init")]


def test_trials_learn_from_the_networks_that_are_named(place, training):
    names = [model.name for model in zoo.list_models()[:2]]
    assert run(place, "--over", f"distill.teacher={','.join(names)}") == 0
    assert training.teachers == [zoo.find(name) for name in names]


def test_a_trial_that_falls_behind_ends_early(place, training):
    assert run(place, "--over", "optimizer.lr=0.01..0.8:log", "--trials", "20") == 0
    states = [one["state"] for one in trials(place)]
    assert "pruned" in states
    assert states[0] == "complete"
    assert all(0.01 <= rate <= 0.8 for rate, _ in training.trained)


def test_an_interrupted_trial_goes_on_where_it_was_and_no_session_repeats_another(place, training):
    arguments = ("--over", "optimizer.lr=0.01..0.8", "--trials", "4", "--no-prune")
    training.interrupted = 2
    assert run(place, *arguments) == 130
    assert len(trials(place)) == 1
    assert run(place, *arguments) == 0
    (_, second, third, *_), first_epochs = training.trained, [e for _, e in training.trained]
    assert first_epochs == [1, 1, 3, 1, 1]
    assert second[0] == third[0]
    found = trials(place)
    assert len(found) == 4
    assert len({one["params"]["optimizer.lr"] for one in found}) == 4
    assert run(place, *arguments) == 0
    assert len(training.trained) == 5, "a finished sweep trains nothing"


def test_a_run_that_fails_costs_one_trial(place, training, capsys):
    assert run(place, "--over", "optimizer.lr=0.95,0.99", "--trials", "2") == 0
    assert [one["state"] for one in trials(place)] == ["pruned", "pruned"]
    assert "the loss became nan" in capsys.readouterr().err


def test_a_full_disk_ends_the_sweep_and_costs_no_trial(place, training, capsys, monkeypatch):
    over = ("--over", "optimizer.lr=0.9,0.2")
    assert run(place, *over) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(training, "full", False)
    assert run(place, *over) == 0
    assert [one["state"] for one in trials(place)] == ["complete", "complete"]


def test_a_value_that_is_impossible_costs_one_trial_unless_none_is_possible(
    place, training, capsys
):
    assert run(place, "--over", "batch_size=100,2000,50") == 0
    assert sorted(one["state"] for one in trials(place)) == ["complete", "complete", "pruned"]
    assert "trial0001: batch_size must be at most" in capsys.readouterr().err
    assert run(place, "--over", "batch_size=2000,100", "--workdir", str(place / "new")) == 2
    assert "error: batch_size must be at most" in capsys.readouterr().err
    # Nothing was trained there, so other values are no other sweep.
    assert run(place, "--over", "batch_size=200,100", "--workdir", str(place / "new")) == 0


@pytest.mark.parametrize("over", ["data.name=cifar10,cifar100", "data.dir=a,b", "seed=1,2"])
def test_accuracies_of_different_images_are_not_compared(place, training, capsys, over):
    assert run(place, "--over", over) == 2
    assert "would compare accuracies of different images" in capsys.readouterr().err


def test_another_sweep_in_the_same_place_is_refused(place, training, capsys):
    assert run(place, "--over", "optimizer.lr=0.1,0.2", "--trials", "1") == 0
    assert run(place, "--over", "optimizer.lr=0.1,0.3", "--trials", "1") == 2
    assert "has another sweep" in capsys.readouterr().err


def test_nothing_is_ever_chosen_on_the_test_set(place, training, capsys):
    assert run(place, "--over", "optimizer.lr=0.1,0.2", validation=0) == 2
    assert "a sweep chooses on held-out images, never on the test set" in capsys.readouterr().err
    assert not (place / "sweep").exists()


def test_a_setting_that_no_trial_would_use_is_refused(place, training, capsys):
    assert run(place, "--over", "optimizer.muon_lr=0.02,0.3") == 2
    assert "optimizer.muon_lr=0.02 would be ignored" in capsys.readouterr().err
    assert not training.trained
    names = ("--over", "optimizer.name=sgd,muon")
    assert run(place, "--over", "optimizer.muon_lr=0.02,0.3", *names) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.pad=0, 2,4", Values("data.pad", ("0", "2", "4"))),
        ("data.pad=0..4", Values("data.pad", (), 0, 4)),
        ("optimizer.lr=1e-3..0.5:log", Values("optimizer.lr", (), 1e-3, 0.5, True)),
        ("optimizer.lr=.5..1.5", Values("optimizer.lr", (), 0.5, 1.5)),
        (
            "schedule.boundaries=(5,8),(6,9)",
            Values("schedule.boundaries", ("(5,8)", "(6,9)")),
        ),
        ("optimizer.name=sgd,muon", Values("optimizer.name", ("sgd", "muon"))),
    ],
)
def test_lists_and_ranges_are_read(text, expected):
    assert Values.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optimizer.lr", "--over must be FIELD=VALUES"),
        ("optimizer.rate=1", "unknown field 'optimizer.rate'"),
        ("optimizer.lr=-1,1", "optimizer.lr must be above 0"),
        ("optimizer.lr=1..0.5", "a range must rise, found 1..0.5"),
        ("optimizer.momentum=0..0.5:log", "a range must rise, from above 0"),
        ("optimizer.name=adamw..sgd", "a range is one of numbers"),
        ("data.pad=1,1", "has a value twice"),
        ("optimizer.lr=0.1,0.10", "has a value twice"),
    ],
)
def test_values_that_cannot_be_are_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        Values.parse(text)
