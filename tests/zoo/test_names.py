"""A trained network's name in place of a path, everywhere a checkpoint is named."""

import json
from pathlib import Path

import numpy as np
import pytest

import shiftnet
import shiftnet.data
from shiftnet import checkpoint, results, zoo
from shiftnet.cli import evaluate, train
from shiftnet.cli import models as command
from shiftnet.data import Split
from shiftnet.errors import UserError
from shiftnet.files import sha256_of
from shiftnet.zoo import cards, names, storage
from tests.loopback import Server

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "cifar"
NAME = "shiftresnet20_1c_c100"
ALL = [model.name for model in zoo.list_models()]
ROWS = [row.name for table in results.tables(storage.FOLDER) for row in table.rows]
UNTRAINED = next(name for name in ROWS if not any(one.startswith(name) for one in ALL))


def test_the_list_has_the_numbers_of_the_result_files_and_prints_as_a_table():
    found = shiftnet.list_models(NAME)
    (model,) = found
    result = json.loads((ROOT / "results" / f"{NAME}.json").read_text())
    assert (model.name, model.dataset) == (NAME, "cifar100")
    assert model.accuracy == 100 * result["checkpoint"]["test_accuracy"]
    assert model.over_seeds == tuple(100 * run["best_accuracy"] for run in result["runs"])
    assert model.bytes == (ROOT / "results" / f"{NAME}.safetensors").stat().st_size
    head, line = repr(found).splitlines()
    assert head.split()[0] == "name"
    assert line.startswith(NAME)
    assert f"{results.mean_and_spread(model.over_seeds)} (n={len(result['runs'])})" in line
    assert line.endswith("configs/shiftresnet20_c100.py:expansion=1")
    assert shiftnet.list_models("no*such") == []


def test_a_network_of_the_short_recipe_has_a_name_of_its_own():
    result = json.loads((ROOT / "results" / "short" / f"{NAME}.json").read_text())
    model = zoo.get(f"{NAME}_short")
    assert model.accuracy == 100 * result["checkpoint"]["test_accuracy"] != zoo.get(NAME).accuracy
    assert model.over_seeds == tuple(100 * run["final_accuracy"] for run in result["runs"])
    assert model.recipe == "configs/shiftresnet20_c100.py:expansion=1,recipe=short"
    network = shiftnet.load(model.name)
    assert network.config.epochs == 30
    card = cards.card(model.name, network, model.bytes, model)
    seeds = len(result["runs"])
    assert f"--only {NAME} --recipe short --seeds {seeds}" in card
    assert names.find_trainable(model.name, "--init").parent.name == "trainable"
    assert "points above" not in card  # a note on the row's own recipe
    low = zoo.get("shiftresnet20_1c_s3_all_c100")
    card = cards.card(low.name, shiftnet.load(low.name), low.bytes, low)
    assert "with 3-bit pot weights in 2 layers and 3-bit s3 weights in 20 layers." in card
    three = zoo.get("shiftresnet20_3c_c100")
    card = cards.card(three.name, shiftnet.load(three.name), three.bytes, three)
    assert "commits `5a92940a81-dirty`, `c24a655ad3`, `c731938ec1`, `b0643a1e0e`." in card


def test_the_command_lists_the_same(capsys):
    assert command.main(["*1c_c100", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["parameters"]) == (NAME, 40756)
    assert command.main([NAME]) == 0
    assert capsys.readouterr().out == f"{zoo.list_models(NAME)}\n"


@pytest.mark.parametrize("name", ALL)
def test_what_is_listed_is_there_unaltered(name):
    model = zoo.get(name)
    path = storage.FOLDER / model.stand_in / model.result["checkpoint"]["file"]
    if path.is_file():
        assert path.stat().st_size == model.bytes
        assert sha256_of(path) == model.result["checkpoint"]["sha256"]
    else:
        assert model.result["checkpoint"]["file"].startswith("large/")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real CIFAR images are not in ../shared/cifar")
@pytest.mark.parametrize(
    "name", [NAME, *(pytest.param(each, marks=pytest.mark.slow) for each in ALL if each != NAME)]
)
def test_evaluation_prints_the_number_of_the_list(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SHARED)
    import cifar as reference

    def load_test(dataset, **_):
        part = Split(*reference.load(dataset, "test"))
        return shiftnet.data.TestSet(dataset, part, shiftnet.data.class_names(dataset))

    monkeypatch.setattr(shiftnet.data, "load_test", load_test)
    assert evaluate.main(["--ckpt", name]) == 0
    out = capsys.readouterr().out
    assert f"10000 images: top-1 {zoo.get(name).accuracy:.2f}%" in out


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert zoo.find(NAME) == storage.FOLDER / f"{NAME}.safetensors"
    assert zoo.find_all("shiftresnet20_1c_c*00", "--ckpt") == [zoo.find(NAME)]
    (tmp_path / NAME).mkdir()
    assert zoo.find(NAME) == Path(NAME)
    assert zoo.find_all(NAME, "--ckpt") == [Path(NAME)]
    with pytest.raises(UserError, match=f"no checkpoint in .*{NAME}"):
        shiftnet.load(NAME)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("shiftresnet20_1c_c10O", f"and no trained network has that name; did you mean {NAME}?"),
        (f"{NAME.upper()}.safetensors", f"did you mean {NAME}?"),
        ("shiftresnet20_1c_c10", "not been trained yet; did you mean shiftresnet20_1c_c10_short?"),
        ("nonsense", "no trained network has that name; shiftnet models lists them"),
        ("n" * 300, "no trained network has that name; shiftnet models lists them"),
        (UNTRAINED, f"{UNTRAINED} has not been trained yet; shiftnet models lists what has"),
    ],
)
def test_a_name_that_there_is_not_is_answered_with_the_nearest(typed, message, capsys, tmp_path):
    with pytest.raises(UserError) as caught:
        shiftnet.load(typed)
    assert message in str(caught.value)
    assert evaluate.main(["--ckpt", typed]) == 2
    assert command.main([typed]) == 2
    arguments = ["--config", str(ROOT / "configs/quickstart.py"), "--init", typed]
    assert train.main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    arguments[-2:] = [f"--config.distill.teacher={typed}"]
    assert train.main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count(message) == 4
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_no_name_matches_is_refused(capsys):
    assert command.main(["*nosuch*"]) == 2
    assert "no trained network matches '*nosuch*'" in capsys.readouterr().err


def kept(tmp_path, monkeypatch, **more):
    """The folder of another place that has the network, and how its result describes it."""
    path = ROOT / "results" / f"{NAME}.safetensors"
    model = zoo.get(NAME)
    entry = {**model.result["checkpoint"], "file": "large/net.safetensors", **more}
    model.result["checkpoint"].update(entry)
    elsewhere = tmp_path / "mirror"
    (elsewhere / "large").mkdir(parents=True)
    (elsewhere / entry["file"]).write_bytes(path.read_bytes())
    monkeypatch.setattr(names, "get", lambda name: model if name == NAME else None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(storage.MIRROR, raising=False)
    return elsewhere


def test_a_mirror_is_a_folder(tmp_path, monkeypatch):
    elsewhere = kept(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"{NAME} is not part of the package .*; set SHIFTNET_ZOO"):
        zoo.find(NAME)
    monkeypatch.setenv(storage.MIRROR, str(elsewhere))
    assert zoo.find(NAME) == elsewhere / "large/net.safetensors"
    assert not (tmp_path / "cache").exists()
    (elsewhere / "large/net.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"has SHA-256 .*, expected"):
        zoo.find(NAME)
    monkeypatch.setenv(storage.MIRROR, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere/large/net.safetensors does not exist"):
        zoo.find(NAME)


@pytest.mark.parametrize("by", ["mirror", "url"])
def test_a_download_is_verified_kept_and_not_repeated(tmp_path, monkeypatch, by):
    elsewhere = kept(tmp_path, monkeypatch)
    good = (elsewhere / "large/net.safetensors").read_bytes()
    server = Server(elsewhere)
    try:
        if by == "mirror":
            monkeypatch.setenv(storage.MIRROR, f"{server.url}/")
        else:
            url = f"{server.url}/large/net.safetensors"
            names.get(NAME).result["checkpoint"]["url"] = url
        server.put(good[:-1], "large/net.safetensors")
        with pytest.raises(UserError, match=r"has SHA-256 .*, expected .*; nothing was kept"):
            zoo.find(NAME)
        assert not list((tmp_path / "cache").rglob("*"))
        server.put(good, "large/net.safetensors")
        path = zoo.find(NAME)
        assert path.parent == tmp_path / "cache/shiftnet/zoo"
        assert [each.name for each in path.parent.iterdir()] == [path.name]
    finally:
        server.close()
    assert zoo.find(NAME).read_bytes() == good  # without the server
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match="cannot be downloaded"):
        zoo.find(NAME)


def test_a_run_starts_from_the_network_that_can_be_trained(tmp_path, monkeypatch):
    arrays = {"conv1.weight.value": np.ones((3, 3, 3, 16), np.float32)}
    metadata = {"config": "{}", "class_names": ["a"], "mean": [0.0] * 3, "std": [1.0] * 3}
    path = tmp_path / "net.safetensors"
    checkpoint.write_file(path, arrays, metadata)
    model = zoo.get(NAME)
    monkeypatch.setattr(names, "get", lambda name: model)
    model.result["checkpoint"].pop("trainable", None)
    assert zoo.find_trainable(NAME, "--init") == zoo.find(NAME)  # the packed one, then
    entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    model.result["checkpoint"]["trainable"] = entry
    assert zoo.find_trainable(NAME, "--init") == zoo.find(NAME)  # as in a wheel without a mirror
    monkeypatch.setenv(storage.MIRROR, str(tmp_path))
    assert zoo.find_trainable(NAME, "--init") == path
    assert zoo.find_trainable(path, "--init") == path
    saved = checkpoint.read(path)
    np.testing.assert_array_equal(saved.arrays["conv1.weight.value"], arrays["conv1.weight.value"])
    assert saved.metadata == metadata
