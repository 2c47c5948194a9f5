"""Training from image files: end to end, resumed to the bit, with files that cannot be decoded."""

import json

import jax
import numpy as np
import pytest

import shiftnet
from shiftnet import checkpoint, data
from shiftnet.cli import evaluate
from shiftnet.cli import train as train_door
from shiftnet.data.folder import FolderSource
from shiftnet.errors import UserError
from shiftnet.training import data_iterator, engine
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.times import Times
from tests.data.image_files import wnid, write_folder
from tests.training.small import epochs, recipe

IMAGES = (9, 8, 7, 10)  # of each class in train; 34 in all, 4 steps of 8 an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), IMAGES, (3, 2, 3, 3))


@pytest.fixture(autouse=True, scope="module")
def in_files():
    """Leaves images of 24 pixels in their files, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SMALL", 16)
        yield


def files(folder, **overrides):
    return recipe(
        **{
            "batch_size": 8,
            "model__arch": "wrn8",
            "model__width": 0.25,
            "data__source": "folder",
            "data__dir": str(folder),
            "data__size": 24,
            "data__workers": 0,
            "data__flip": True,
            **overrides,
        }
    )


def arrays(workdir):
    saved = checkpoint.read(workdir)
    return {name: np.asarray(value) for name, value in saved.arrays.items()}


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, engine.train(files(folder), workdir)


def test_a_run_from_files_trains_and_is_evaluated_on_all_of_val(uninterrupted, folder):
    workdir, summary = uninterrupted
    assert summary.finished
    assert summary.step == 2 * 4
    found = epochs(workdir)
    assert [line["step"] for line in found] == [4, 8]
    assert found[0]["train_loss"] != found[1]["train_loss"]
    model = shiftnet.load(workdir)
    assert model.class_names == tuple(wnid(label) for label in range(4))
    assert (model.mean, model.std) == data.IMAGENET_NORMALIZATION


def test_the_commands_print_the_number_that_training_logged(uninterrupted, folder, capsys):
    workdir, summary = uninterrupted
    assert evaluate.main(["--ckpt", str(workdir), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["images"] == 11
    assert row["top1"] == summary.final[0]


# A step of a later epoch, within one; with worker processes once, which may change nothing.
@pytest.mark.parametrize(
    ("step", "workers"),
    [
        pytest.param(3, 0, marks=pytest.mark.slow),
        (4, 2),
        pytest.param(6, 0, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(
    uninterrupted, folder, tmp_path, monkeypatch, step, workers
):
    reference, summary = uninterrupted
    with monkeypatch.context() as patched:
        calls = iter(range(1, 10**6))
        patched.setattr(Interrupt, "requested", lambda self: next(calls) == step)
        first = engine.train(files(folder), tmp_path)
    assert (first.finished, first.step) == (False, step)
    assert engine.train(files(folder, data__workers=workers), tmp_path) == summary
    expected = arrays(reference)
    found = arrays(tmp_path)
    assert len(found) == len(expected) > 10
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert epochs(tmp_path) == epochs(reference)


@pytest.fixture
def damaged(tmp_path):
    root = write_folder(tmp_path / "images", IMAGES, (3, 2, 3, 3))
    (root / "train" / wnid(1) / f"{wnid(1)}_0.JPEG").write_bytes(b"\xff\xd8 no more than this")
    (root / "val" / wnid(2) / f"{wnid(2)}_1.JPEG").write_bytes(b"")
    return root


def test_a_corrupt_file_stops_the_run_with_its_name(damaged, tmp_path, capsys):
    argv = ["--config.data.on_corrupt=error"]
    code = train_door.main([*_door(damaged, tmp_path), *argv])
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{wnid(1)}_0.JPEG" in error or f"{wnid(2)}_1.JPEG" in error


def test_corrupt_files_are_skipped_named_and_counted_when_told_so(damaged, tmp_path, capsys):
    # All 34 images, so that every epoch meets the damaged one.
    argv = ["--config.data.on_corrupt=skip", "--config.batch_size=34"]
    assert train_door.main([*_door(damaged, tmp_path), *argv]) == 0
    printed = capsys.readouterr().out
    assert f"skipped 1 corrupt training files: {damaged / 'train' / wnid(1)}" in printed
    assert f"skipped 1 corrupt test files: {damaged / 'val' / wnid(2)}" in printed
    for line in epochs(tmp_path / "run"):
        assert (line["train_skipped"], line["test_skipped"]) == (1, 1)
    assert evaluate.main(["--ckpt", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "10 images" in printed
    assert f"left out, corrupt: {damaged / 'val' / wnid(2)}" in printed


def test_of_several_processes_the_first_alone_reports_what_was_skipped_before(damaged, monkeypatch):
    def made(state):
        source = FolderSource(damaged / "train")
        return data_iterator.FileData(files(damaged), None, source, 4, None, state, Times())

    state = {**made({}).get_state(), "skipped": ["a.png"]}
    assert made(state).skipped() == ["a.png"]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert made(state)._skipped == []


@pytest.mark.slow
def test_an_interrupted_epoch_still_counts_what_it_skipped_before(damaged, tmp_path, monkeypatch):
    settings = files(damaged, data__on_corrupt="skip", epochs=1, batch_size=2)  # all 34 images
    engine.train(settings, tmp_path / "whole")
    with monkeypatch.context() as patched:
        # Stops as soon as the damaged file was met.
        patched.setattr(Interrupt, "requested", lambda self: bool(seen))
        seen: list[str] = []
        advance = data_iterator.FileData.advance

        def watched(self, *arguments):
            taken = advance(self, *arguments)
            seen.extend(self._skipped)
            return taken

        patched.setattr(data_iterator.FileData, "advance", watched)
        assert not engine.train(settings, tmp_path / "broken").finished
    assert engine.train(settings, tmp_path / "broken").finished
    assert epochs(tmp_path / "broken") == epochs(tmp_path / "whole")
    assert epochs(tmp_path / "whole")[0]["train_skipped"] == 1


def _door(folder, tmp_path) -> list[str]:
    file = tmp_path / "recipe.py"
    file.write_text(
        "from shiftnet.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.epochs, config.batch_size = 2, 8\n"
        "    config.model.arch, config.model.width = 'wrn8', 0.25\n"
        f"    config.data.source, config.data.dir = 'folder', {str(folder)!r}\n"
        "    config.data.size, config.data.workers = 24, 0\n"
        "    return config\n"
    )
    return ["--config", str(file), "--workdir", str(tmp_path / "run")]


@pytest.mark.slow
def test_an_imagenet_shaped_set_of_1000_classes_trains_a_low_bit_network(tmp_path):
    root = write_folder(tmp_path / "images", (1,) * 1000, (1,) * 1000)
    settings = files(
        root,
        model__weights="s3",
        data__workers=2,
        epochs=1,
        batch_size=250,
        eval__batch_size=500,
    )
    summary = engine.train(settings, tmp_path / "run")
    assert summary.step == 4
    (line,) = epochs(tmp_path / "run")
    assert abs(line["train_loss"] - np.log(1000)) < 1.5
    assert 0.2 < line["weights"]["all"]["zeros"] < 0.8
    model = shiftnet.load(tmp_path / "run")
    assert len(model.class_names) == 1000


# Data sets of files


def test_held_out_files_come_from_train_and_are_no_longer_in_it(folder):
    whole = data.load("", source="folder", data_dir=str(folder))
    held = data.load("", source="folder", data_dir=str(folder), validation=5)
    assert (len(held.train), len(held.validation), len(held.test)) == (29, 5, 11)
    names = [{part[i].name for i in range(len(part))} for part in (held.train, held.validation)]
    assert len(names[0] | names[1]) == 34
    assert names[0] | names[1] == {whole.train[i].name for i in range(34)}
    assert whole.test[0].name.startswith(str(folder / "val"))


def test_a_folder_needs_its_directory_and_a_known_source():
    with pytest.raises(UserError, match=r"data\.dir is empty; expected the folder that holds"):
        data.load("", source="folder")
    with pytest.raises(UserError, match=r"unknown data\.source 'foldr'; did you mean 'folder'"):
        data.load("", source="foldr")
    with pytest.raises(UserError, match="imagenet2012 holds no 5"):
        data.load("imagenet2012", data_dir="/nowhere")
