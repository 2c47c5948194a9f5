"""A damaged checkpoint is noticed before it is loaded, and a good one outlives its successor."""

import contextlib
import json
import logging
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet import checkpoint
from shiftnet.checkpoint import DIGESTS, CheckpointManager
from shiftnet.errors import RunFailed, UserError


def save(manager, *steps):
    for step in steps:
        manager.save(step, {"step": step}, model={"x": jnp.arange(1000.0) + step})
    manager.close()


def largest(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)


def flip(path):
    file = largest(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(path):
    file = largest(path)
    file.write_bytes(file.read_bytes()[:-1])


def lose(path):
    largest(path).unlink()


def spoil_digests(path):
    (path / DIGESTS).write_text('{"sha256"')


def swap_digest(path):
    digests = json.loads((path / DIGESTS).read_text())
    first = next(iter(digests["sha256"]))
    digests["sha256"][first] = "0" * 64
    (path / DIGESTS).write_text(json.dumps(digests))


def lose_digests(path):
    (path / DIGESTS).unlink()


DAMAGES = [flip, truncate, lose, spoil_digests, swap_digest, lose_digests]
METADATA = {"config": "{}", "class_names": ["a"], "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    save(CheckpointManager(tmp_path, keep=2), 1, 2)
    damage(tmp_path / "2")
    manager = CheckpointManager(tmp_path, keep=2)
    step, (sentence,) = manager.newest_good()
    assert step == 1
    assert sentence.startswith(f"skipped {tmp_path / '2'}: it")
    parts, metadata = manager.restore(1, model={"x": jnp.zeros(1000)})
    np.testing.assert_array_equal(parts["model"]["x"], np.arange(1000.0) + 1)
    assert metadata == {"step": 1}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path, damage):
    save(CheckpointManager(tmp_path), 1)
    damage(tmp_path / "1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be continued from \(skipped"):
        CheckpointManager(tmp_path).newest_good()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["1.unsealed", "1.unsealed.orbax-checkpoint-tmp-0"])
def test_a_first_checkpoint_that_was_cut_off_counts_as_none(tmp_path, name):
    save(CheckpointManager(tmp_path), 1)
    (tmp_path / "1").rename(tmp_path / name)
    assert CheckpointManager(tmp_path).newest_good() == (None, [])
    assert not any(tmp_path.iterdir())


def test_the_newest_few_are_kept(tmp_path):
    save(CheckpointManager(tmp_path, keep=2), 1, 2, 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "3"]


def test_the_checkpoints_of_other_steps_are_deleted(tmp_path):
    manager = CheckpointManager(tmp_path, keep=4)
    save(manager, 1, 2, 3, 4)
    manager.delete(before=2, after=3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "3"]
    assert manager.metadata(3) == {"step": 3}


def test_what_lies_beyond_a_restored_step_goes_only_after_a_good_save(tmp_path):
    save(CheckpointManager(tmp_path, keep=2), 1, 5)
    flip(tmp_path / "5")
    save(CheckpointManager(tmp_path, keep=2), 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "3"]


def test_a_save_that_fails_keeps_what_there_is_and_says_so(tmp_path, monkeypatch):
    save(CheckpointManager(tmp_path), 1)

    def full(path, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_seal", full)
    with pytest.raises(
        RunFailed, match=r"/2: .*No space left on device; the last good one is .*/1"
    ):
        save(CheckpointManager(tmp_path), 2)
    assert CheckpointManager(tmp_path).newest_good()[0] == 1


def test_a_save_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    """As Orbax's does where the clock jumps meanwhile."""
    seal, failures = checkpoint._seal, [TimeoutError("Timeout waiting for key")]

    def fails_once(path, arrays):
        if failures:
            raise failures.pop()
        seal(path, arrays)

    monkeypatch.setattr(checkpoint, "_seal", fails_once)
    save(CheckpointManager(tmp_path), 1)
    assert not failures
    assert CheckpointManager(tmp_path).newest_good() == (1, [])


def test_a_good_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    save(CheckpointManager(tmp_path), 1)
    before = (tmp_path / "1" / DIGESTS).stat().st_mtime_ns
    save(CheckpointManager(tmp_path), 1)
    assert (tmp_path / "1" / DIGESTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_network_is_read(tmp_path, damage):
    path = tmp_path / "network"
    checkpoint.write(path, {"x": jnp.zeros(1000)}, METADATA)
    assert checkpoint.read(path).metadata == METADATA
    damage(path)
    with pytest.raises(UserError, match=r"damaged|cannot be read|has no digests"):
        checkpoint.read(path)


def test_a_copied_checkpoint_is_as_good(tmp_path):
    checkpoint.write(tmp_path / "a", {"x": jnp.zeros(10)}, METADATA)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert checkpoint.verify(tmp_path / "b") is None


SPECIAL = ["[a]b", "a*", "**", "a?", "a\\b", "gs:", os.fsdecode(b"\xff")]


@pytest.mark.parametrize("name", SPECIAL)
def test_any_path_holds_checkpoints(tmp_path, name):
    """Orbax takes some for patterns or URLs, TensorStore a backslash for a slash."""
    folder = tmp_path / name / "checkpoints"
    save(CheckpointManager(folder), 1)
    parts, metadata = CheckpointManager(folder).restore(1, model={"x": jnp.zeros(1000)})
    np.testing.assert_array_equal(parts["model"]["x"], np.arange(1000.0) + 1)
    assert metadata == {"step": 1}
    saved = checkpoint.write(tmp_path / name / name, {"x": jnp.arange(3.0)}, METADATA)
    np.testing.assert_array_equal(checkpoint.read(saved).arrays["x"], np.arange(3.0))
    assert os.listdir(tmp_path) == [name]


def test_a_checkpoint_that_cannot_be_read_back_is_never_called_good(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_safe", contextlib.nullcontext)
    folder = tmp_path / "[a]b"
    with pytest.raises(RunFailed, match="arrays of model cannot be opened after they were written"):
        save(CheckpointManager(folder), 1)
    assert CheckpointManager(folder).newest_good() == (None, [])
    with pytest.raises(UserError, match=r"cannot write .*arrays of model cannot be opened"):
        checkpoint.write(folder / "net", {"x": jnp.zeros(3)}, METADATA)
    assert not (folder / "net").exists()


def networks(directory, *steps):
    """A run's checkpoints of these steps, each with the number of its step as its array."""
    manager = CheckpointManager(directory / checkpoint.LATEST, keep=len(steps))
    for step in steps:
        manager.save(step, METADATA, model={"x": jnp.full(1000, step)})
    manager.close()
    return directory / checkpoint.LATEST


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_network_is_read_and_that_is_said(tmp_path, damage, caplog):
    steps = networks(tmp_path, 1, 2)
    damage(steps / "2")
    with caplog.at_level(logging.WARNING, "shiftnet"):
        saved = checkpoint.read(tmp_path)
    assert (saved.path, saved.arrays["x"][0]) == (steps / "1", 1)
    (message,) = caplog.messages
    assert message.startswith(f"checkpoint {steps / '2'} ")
    assert message.endswith(f"; reading {steps / '1'}")
    damage(steps / "1")
    with pytest.raises(UserError, match=r"checkpoints/2 .*; checkpoint .*checkpoints/1 "):
        checkpoint.read(tmp_path)


def test_a_checkpoint_that_is_about_to_be_renamed_is_not_read(tmp_path):
    steps = networks(tmp_path, 1, 2)
    (steps / "2").rename(steps / "2.unsealed")
    assert checkpoint.find(tmp_path) == checkpoint.read(tmp_path).path == steps / "1"
    (steps / "1").rename(steps / "1.unsealed")
    with pytest.raises(UserError, match="no checkpoint in "):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("function", ["checkpointables_metadata", "load_checkpointables"])
def test_a_checkpoint_that_its_run_replaces_while_it_is_read_gives_the_newer(
    tmp_path, monkeypatch, function
):
    steps, original = networks(tmp_path, 1), getattr(checkpoint.ocp, function)

    def replaced_before(path, *args):
        if path.name == "1":
            monkeypatch.undo()
            networks(tmp_path, 2)
            assert os.listdir(steps) == ["2"]
        return original(path, *args)

    monkeypatch.setattr(checkpoint.ocp, function, replaced_before)
    saved = checkpoint.read(tmp_path)
    assert (saved.path, saved.arrays["x"][0]) == (steps / "2", 2)


def test_a_checkpoint_that_vanishes_while_its_digests_are_compared_is_not_damaged(
    tmp_path, monkeypatch
):
    steps, digest = networks(tmp_path, 1), checkpoint.sha256_of

    def replaced_before(file):
        if "1" in file.parts:
            monkeypatch.undo()
            networks(tmp_path, 2)
        return digest(file)

    monkeypatch.setattr(checkpoint, "sha256_of", replaced_before)
    assert checkpoint.read(tmp_path).path == steps / "2"


@pytest.mark.parametrize("name", ["net.pth", "net.t7", "nets.zip", "net.safetensors"])
def test_a_file_in_place_of_a_checkpoint_is_pointed_to_its_converter(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=f"python -m shiftnet.convert_torch .*{name}"):
        checkpoint.read(tmp_path / name)


def test_urls_are_refused_and_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = checkpoint.write("~/net", {"x": jnp.zeros(3)}, METADATA)
    assert saved == checkpoint.read("~/net").path == tmp_path / "net"
    for use in (checkpoint.read, lambda url: checkpoint.write(url, {}, METADATA)):
        with pytest.raises(UserError, match="the checkpoint must be a local path, found the URL"):
            use("gs://bucket/net")


def test_several_processes_refuse_a_path_before_they_train(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    CheckpointManager(tmp_path / "run")
    with pytest.raises(UserError, match=r"contains '\[': several processes cannot write"):
        CheckpointManager(tmp_path / "[a]b")
