"""evaluate.py on images other than those that a network was trained on."""

import csv
import json
import shutil
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import shiftnet
from shiftnet import config, data
from shiftnet.cli import evaluate, prepare
from shiftnet.inference import Preprocessing
from shiftnet.training.restore import facts

COLOURS = {"ant": (230, 20, 20), "bee": (20, 230, 20), "cat": (20, 20, 230)}
NAMES = tuple(COLOURS)


class Colours(nnx.Module):
    """Tells images by their mean colour; only of one size."""

    def __init__(self, size, classes, bias):
        self.size = size
        colours = np.full((classes, 3), 10.0, np.float32)
        colours[: len(COLOURS)] = np.array(list(COLOURS.values())) / 255
        self.colours = nnx.Param(jnp.asarray(colours))
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def __call__(self, x):
        assert x.shape[1:] == (self.size, self.size, 3)
        distance = x.mean((1, 2))[:, None] - self.colours.get_value()
        return self.bias.get_value() - jnp.square(distance).sum(-1)


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys):
    """Calls evaluate.py with a network as described; returns its row, or its error."""

    def call(*arguments, names=NAMES, arch="shiftresnet8", side=32, bias=0.0, known=(), **fields):
        recipe = config.default_config()
        recipe.model.arch = arch
        for field, value in ({"name": "unknown", "workers": 0} | fields).items():
            recipe.data[field] = value
        network = Colours(side, len(names), bias)
        graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
        model = types.SimpleNamespace(
            config=recipe,
            class_names=tuple(names),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            preprocess=Preprocessing.of(recipe, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
            path=Path("run"),
            metadata={"step": 7, **dict(known)},
            graphdef=graphdef,
            params=params,
            stats=stats,
        )
        monkeypatch.setattr(shiftnet, "load", lambda _: model)
        code = evaluate.main(["--ckpt", str(tmp_path), "--json", *map(str, arguments)])
        printed = capsys.readouterr()
        if code:
            assert code == 2
            assert printed.err.count("\n") == 1
            return printed.err
        (row,) = json.loads(printed.out, parse_constant=pytest.fail)
        return row

    return call


def write(root, classes, size=(40, 48), count=2):
    """Images of each class's colour: {folder's name: class}."""
    for name, colour in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, COLOURS[colour]).save(root / name / f"{number}.png")
    return root


def test_a_network_is_evaluated_on_a_folder_whose_classes_it_knows(evaluated, tmp_path):
    write(tmp_path / "photos" / "val", {name: name for name in NAMES})
    row = evaluated("--data-dir", tmp_path / "photos", "--per-class")
    assert (row["images"], row["top1"]) == (6, 1.0)
    assert {name: score["accuracy"] for name, score in row["per_class"].items()} == dict.fromkeys(
        NAMES, 1.0
    )
    assert "classes" not in row
    assert evaluated("--data-dir", tmp_path / "photos" / "val")["top1"] == 1.0


def test_classes_are_matched_by_name_in_whatever_order(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    row = evaluated("--data-dir", photos, names=("cat", "ant", "bee"), bias=[0, 0, 0])
    # The network's first class looks like ants and is called cat, and so on: all are wrong.
    assert row["top1"] == 0.0
    assert row["classes"] == "classes in another order, matched by name"
    renamed = write(tmp_path / "renamed", {"cat": "ant", "ant": "bee", "bee": "cat"})
    assert evaluated("--data-dir", renamed, names=("cat", "ant", "bee"))["top1"] == 1.0


def test_a_part_of_the_classes_is_evaluated_and_said(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {"bee": "bee", "cat": "ant"})
    row = evaluated("--data-dir", photos, "--per-class")
    assert row["classes"] == "2 of the network's 3 classes"
    assert row["top1"] == 0.5
    ant, bee, cat = row["per_class"].values()
    assert (ant["images"], ant["recall"], ant["precision"], ant["f1"]) == (0, None, 0.0, None)
    assert bee == {"images": 2, "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert (cat["accuracy"], cat["precision"], cat["f1"]) == (0.0, None, 0.0)


def test_renamed_classes_are_refused_and_not_zero_per_cent(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {"Ameise": "ant", "Biene": "bee", "cat": "cat"})
    error = evaluated("--data-dir", photos)
    assert f"run does not know 2 of the 3 classes of {photos} (Ameise, Biene); it knows" in error


def test_numbers_for_names_are_matched_by_position_and_that_is_said(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    row = evaluated("--data-dir", photos, names=("0", "1", "2"), name="unknown")
    assert row["top1"] == 1.0
    assert "by position" in row["classes"]
    # As folders they are names.
    error = evaluated("--data-dir", photos, names=("0", "1", "2"), source="folder", size=32)
    assert "does not know 3 of the 3 classes" in error


def test_a_network_of_the_digits_is_not_evaluated_on_other_images(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    digits = tuple("0123456789")
    assert "does not know 3 of the 3" in evaluated(
        "--data-dir", photos, names=digits, name="digits"
    )
    assert evaluated(names=digits, name="digits")["images"] == 355
    error = evaluated("--dataset", "digits", name="cifar10")
    assert "does not know 10 of the 10 classes of digits (0, 1, 2," in error
    # Without downloading the images.
    (tmp_path / "new").mkdir()
    arguments = ("--dataset", "cifar10", "--data-dir", tmp_path / "new")
    error = evaluated(*arguments, names=digits, name="digits")
    assert "does not know 10 of the 10 classes of cifar10 (airplane, automobile," in error


@pytest.mark.parametrize(
    ("arch", "side", "fields"),
    [
        ("shiftresnet8", 32, {"name": "cifar10"}),
        ("shiftresnet8", 32, {"name": "unknown"}),
        ("imagenet_resnet18", 32, {"name": "cifar100"}),
        ("imagenet_resnet18", 224, {"name": "imagenet2012"}),
        ("imagenet_resnet18", 224, {"name": "unknown"}),
        ("shiftresnet8", 24, {"name": "", "source": "folder", "size": 24}),
    ],
)
def test_images_are_brought_to_the_size_of_the_network(evaluated, tmp_path, arch, side, fields):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    row = evaluated("--data-dir", photos, arch=arch, side=side, **fields)
    assert row["top1"] == 1.0
    assert row["dataset"] == str(photos)


@pytest.fixture
def photos(tmp_path):
    """A folder from which three images are held out for the test, and those images' files."""
    photos = write(tmp_path / "photos", {name: name for name in NAMES}, count=10)
    dataset = data.load("", source="folder", data_dir=str(photos))
    return photos, dataset, sorted(map(dataset.test.name, range(len(dataset.test))))


def test_copies_of_the_folder_of_training_are_known_and_their_held_out_images_taken(
    evaluated, photos, tmp_path, capsys
):
    photos, dataset, files = photos
    shutil.copytree(photos, tmp_path / "copy")
    assert prepare.main([str(photos), str(tmp_path / "prepared"), "--side", "40"]) == 0
    capsys.readouterr()
    here, there = ({"source": "folder", "dir": str(one)} for one in (photos, tmp_path / "copy"))
    known = {"undivided": dataset.undivided, "images": dataset.images}
    for trained in (here, there):
        for place in (photos, tmp_path / "copy", tmp_path / "prepared"):
            out = tmp_path / "out.csv"
            row = evaluated("--data-dir", place, "--predictions", out, known=known, **trained)
            assert row["images"] == 3
            names = [line["image"] for line in csv.DictReader(out.read_text().splitlines())]
            assert [Path(name).parts[-2:] for name in names] == [Path(f).parts[-2:] for f in files]
    # Of other images all are.
    (tmp_path / "copy" / "ant" / "0.png").rename(tmp_path / "copy" / "ant" / "new.png")
    assert evaluated("--data-dir", tmp_path / "copy", known=known, **here)["images"] == 30


@pytest.mark.parametrize("change", ["added", "renamed", "moved"])
def test_a_folder_that_has_changed_since_training_is_refused(evaluated, photos, change):
    photos, dataset, _ = photos
    file = photos / "ant" / "0.png"
    if change == "added":
        (photos / "ant" / "one more.png").write_bytes(file.read_bytes())
    else:
        file.rename(photos / ("ant" if change == "renamed" else "bee") / "new.png")
    fields = {"source": "folder", "dir": str(photos)}
    known = {"undivided": dataset.undivided, "images": dataset.images}
    sentence = "photos is not as it was when run was trained: the 3 of its images that would be"
    assert sentence in evaluated(known=known, **fields)
    assert sentence in evaluated("--data-dir", photos, known=known, **fields)
    # Older checkpoints know how many were held out.
    assert evaluated(known={"images": dataset.images}, **fields)["images"] == 3
    assert sentence in evaluated(known={"images": {"test": 2}}, **fields)


def test_training_images_do_not_stand_in_for_test_images_that_are_gone(evaluated, tmp_path):
    photos = write(tmp_path / "photos" / "train", {name: name for name in NAMES}, count=10).parent
    write(photos / "val", {name: name for name in NAMES}, count=1)
    fields = {"source": "folder", "dir": str(photos)}
    known = facts(data.load("", source="folder", data_dir=str(photos)), steps_per_epoch=1)
    assert evaluated(known=known, **fields)["images"] == 3
    shutil.rmtree(photos / "val")  # as many images would be held out now
    assert "photos is not as it was when run was trained" in evaluated(known=known, **fields)


def test_images_prepared_smaller_than_the_network_takes_are_refused(evaluated, photos, tmp_path):
    assert prepare.main([str(photos[0]), str(tmp_path / "small"), "--side", "16"]) == 0
    assert prepare.main([str(tmp_path / "small"), str(tmp_path / "again"), "--side", "64"]) == 0
    for place in ("small", "again"):
        error = evaluated("--data-dir", tmp_path / place)
        assert f"more than the 16 pixels that {tmp_path / place} was prepared with" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confused", "-5"], "--confused must be at least 0, found -5"),
        (["--wrong", "-1"], "--wrong must be at least 0, found -1"),
        (["--data-dir", "x", "--labels", "y", "--dataset", "cifar10"], "--dataset does not apply"),
        (["--dataset", "digits", "--data-dir", "x"], "--data-dir does not apply to the digits"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "--data-dir nowhere cannot be read"),
        (["--predictions", "net.safetensors"], "--predictions net.safetensors must end in .csv"),
        (["--predictions", "/no/where.csv"], "must lie in a directory that exists"),
        (["--predictions", "/"], "is a directory"),
    ],
)
def test_options_without_effect_or_sense_are_refused(evaluated, arguments, message):
    assert message in evaluated(*arguments)


def test_a_network_of_unknown_images_asks_for_them(evaluated):
    error = evaluated()
    assert "run does not say which images its network was trained on; name them by --da" in error


def test_a_folder_of_photos_is_not_filled_with_a_download(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {"otter": "ant"})
    before = sorted(photos.rglob("*"))
    assert "does not know 1 of the 1 classes" in evaluated("--data-dir", photos, name="cifar10")
    error = evaluated("--data-dir", photos / "otter", name="cifar10")
    assert "has no class folders with images; move its 2 images into one folder per cl" in error
    assert sorted(photos.rglob("*")) == before


def test_a_directory_of_prepared_data_sets_is_told_from_photos(evaluated, tmp_path):
    other = tmp_path / "tfds" / "mnist" / "3.0.1"
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text("{}")
    error = evaluated("--data-dir", tmp_path / "tfds", name="imagenet2012")
    assert f"{tmp_path / 'tfds'}/imagenet2012 holds no 5.*.*" in error


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "unknown"])
def test_a_mistyped_folder_is_said_and_nothing_is_downloaded_to_it(evaluated, tmp_path, name):
    error = evaluated("--data-dir", tmp_path / "fotos", name=name)
    assert f"--data-dir {tmp_path / 'fotos'} cannot be read: No such file or directory" in error
    (tmp_path / "fotos").mkdir()
    assert "is empty; expected images" in evaluated("--data-dir", tmp_path / "fotos", name=name)
    assert not list((tmp_path / "fotos").iterdir())


def test_every_image_s_prediction_is_written_and_the_worst_are_named(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {"ant": "ant", "bee": "cat", "cat": "cat"})
    out = tmp_path / "predictions.csv"
    row = evaluated("--data-dir", photos, "--predictions", out, "--wrong", 1, "--confused", 3)
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [line["image"] for line in lines] == sorted(map(str, photos.rglob("*.png")))
    assert [line["prediction"] for line in lines] == ["ant"] * 2 + ["cat"] * 4
    assert row["confused"] == [{"class": "bee", "prediction": "cat", "images": 2}]
    (wrong,) = row["wrong"]
    assert (wrong["class"], wrong["prediction"]) == ("bee", "cat")
    assert wrong["image"].startswith(str(photos / "bee"))
    # All are equally sure, so the calibration error is how far that is from the accuracy.
    sure = float(lines[0]["confidence"])
    assert row["calibration_error"] == pytest.approx(abs(4 / 6 - sure), abs=2e-3)


def test_the_images_of_a_flat_folder_are_scored_by_a_list_of_labels(
    evaluated, tmp_path, monkeypatch
):
    photos = write(tmp_path / "photos", {"ant": "ant", "bee": "cat"})
    listing = tmp_path / "labels.csv"
    listing.write_text("file,label\nant/0.png,ant\nbee/1.png,cat\n")
    row = evaluated("--data-dir", photos, "--labels", listing)
    assert (row["images"], row["top1"]) == (2, 1.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluated("--data-dir", "~/photos", "--labels", listing)["images"] == 2
    assert "--labels needs --data-dir" in evaluated("--labels", listing)
    listing.write_text("ant/9.png, ant\nant/0.png, ant\nbee/1.png, cat\n")
    error = evaluated("--data-dir", photos, "--labels", listing)
    assert "'ant/9.png' is not a file" in error, "it was taken for a heading"
    listing.write_text("ant/0.png,ant\nant/0,cat\n")
    assert "'ant/0' is listed twice" in evaluated("--data-dir", photos, "--labels", listing)
    (tmp_path / "link.csv").symlink_to(listing)
    options = ("--data-dir", photos, "--labels", tmp_path / "link.csv", "--predictions", listing)
    assert "is the list of --labels" in evaluated(*options)
    assert listing.read_text().startswith("ant/0.png")


def test_a_corrupt_file_is_skipped_where_that_is_asked_for(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    broken = photos / "bee" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert f"{broken} cannot be decoded" in evaluated("--data-dir", photos)
    row = evaluated("--data-dir", photos, "--on-corrupt", "skip")
    assert (row["images"], row["skipped"]) == (5, [str(broken)])
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    error = evaluated("--data-dir", photos, "--on-corrupt=skip")
    assert "none of the images to evaluate on can be decoded" in error


def test_a_loss_that_is_no_number_is_null_in_json(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    assert evaluated("--data-dir", photos, bias=np.nan)["loss"] is None


def test_what_is_left_out_of_a_folder_is_said(evaluated, tmp_path):
    photos = write(tmp_path / "photos", {name: name for name in NAMES})
    (photos / "ant" / "notes.txt").write_text("")
    row = evaluated("--data-dir", photos)
    assert f"left out of {photos}: 1 file ending in .txt" in row["found"]
