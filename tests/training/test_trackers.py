"""Numbers of a run where people watch them; the services themselves are stand-ins here."""

import json
import sys
import types

import numpy as np
import pytest

from shiftnet.errors import UserError
from shiftnet.training import metrics
from shiftnet.training.trackers import flat, make_trackers
from shiftnet.training.workdir import ENVIRONMENT, write_environment
from tests.training.small import recipe


class Service(types.ModuleType):
    """What Weights & Biases and trackio have in common."""

    def __init__(self):
        super().__init__("service")
        self.told = []

    def init(self, **about):
        self.told.append(("init", about))

    def log(self, numbers, step):
        self.told.append(("log", step, numbers))

    def finish(self):
        self.told.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_recipe_and_every_number_once(name, tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    config = recipe(log__tracker=name, log__project="shifts", epochs=7)
    (tracker,) = make_trackers(config, tmp_path / "run", step=0, environment={"commit": "abc"})
    tracker.log({"step": 11, "test_accuracy": 0.5, "weights": {"all": {"zeros": 0.25}}}, 11)
    tracker.close()
    (_, about), logged, end = service.told
    assert about["project"] == "shifts"
    assert about["resume"] == "allow"
    assert about["config"]["epochs"] == 7
    assert about["config"]["environment"] == {"commit": "abc"}
    assert about["name"].startswith("run-")
    assert ("id" in about) == (name == "wandb")
    assert logged == ("log", 11, {"test/accuracy": 0.5, "weights/all/zeros": 0.25})
    assert end == ("finish",)


def test_a_service_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="needs the package trackio: pip install trackio"):
        make_trackers(recipe(log__tracker="trackio"), tmp_path, step=0, environment={})


def test_a_service_that_refuses_is_a_sentence_and_one_that_fails_stops_no_run(
    tmp_path, monkeypatch, capsys
):
    def fails(*_, **__):
        raise ConnectionError("no\nroute")

    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    config = recipe(log__tracker="wandb")
    (tracker,) = make_trackers(config, tmp_path, step=0, environment={})
    monkeypatch.setattr(service, "log", fails)
    for step in (1, 2):
        tracker.log({"step": step}, step)
    tracker.close()
    assert capsys.readouterr().err == "wandb is told nothing from here on: no route\n"
    monkeypatch.setattr(service, "init", fails)
    with pytest.raises(UserError, match=r"log\.tracker=wandb cannot be used: no route"):
        make_trackers(config, tmp_path, step=0, environment={})


def test_nothing_is_sent_anywhere_by_default(tmp_path):
    assert make_trackers(recipe(), tmp_path, step=0, environment={}) == []


def test_names_are_grouped():
    numbers = {"train_loss": 1.0, "raw_test_top5": 2.0, "lr": 3.0, "steps": {"loss": 4.0}}
    names = ["train/loss", "raw_test/top5", "lr", "steps/loss"]
    assert [name for name, _ in flat(numbers)] == names


def steps_log(place, step):
    return metrics.StepsLog(
        place, every=3, batch_size=4, lrs=np.linspace(1, 0, 11), step=step, trackers=()
    )


def test_every_third_step_has_a_line_and_those_that_were_lost_are_written_once(tmp_path):
    losses, corrects = np.arange(1.0, 7.0, dtype=np.float32), np.array([0, 1, 2, 3, 4, 0])
    steps_log(tmp_path, 0).write(1, losses, corrects)
    steps_log(tmp_path, 4).write(5, losses[4:], corrects[4:])
    lines = [json.loads(line) for line in (tmp_path / metrics.STEPS).read_text().splitlines()]
    assert lines == [
        {"step": 3, "loss": 3.0, "accuracy": 0.5, "lr": 0.8},
        {"step": 6, "loss": 6.0, "accuracy": 0.0, "lr": 0.5},
    ]


def test_a_change_of_code_or_device_is_listed_with_the_step_where_it_came(tmp_path):
    for step, commit in ((0, "a"), (5, "a"), (9, "b")):
        write_environment(tmp_path, step, {"commit": commit})
    found = json.loads((tmp_path / ENVIRONMENT).read_text())
    assert found == [{"from_step": 0, "commit": "a"}, {"from_step": 9, "commit": "b"}]
