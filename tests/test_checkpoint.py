"""A damaged checkpoint is noticed before it is loaded, and a good one outlives its successor."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet import checkpoint
from shiftnet.checkpoint import DIGESTS, Series
from shiftnet.errors import RunFailed, UserError


def save(series, *steps):
    for step in steps:
        series.save(step, {"step": step}, model={"x": jnp.arange(1000.0) + step})
    series.close()


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
NOTE = {"config": "{}", "class_names": ["a"], "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    save(Series(tmp_path, keep=2), 1, 2)
    damage(tmp_path / "2")
    series = Series(tmp_path, keep=2)
    step, (sentence,) = series.newest_good()
    assert step == 1
    assert sentence.startswith(f"skipped {tmp_path / '2'}: it")
    parts, note = series.restore(1, model={"x": jnp.zeros(1000)})
    np.testing.assert_array_equal(parts["model"]["x"], np.arange(1000.0) + 1)
    assert note == {"step": 1}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path, damage):
    save(Series(tmp_path), 1)
    damage(tmp_path / "1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be continued from \(skipped"):
        Series(tmp_path).newest_good()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["1.unsealed", "1.unsealed.orbax-checkpoint-tmp-0"])
def test_a_first_checkpoint_that_was_cut_off_counts_as_none(tmp_path, name):
    save(Series(tmp_path), 1)
    (tmp_path / "1").rename(tmp_path / name)
    assert Series(tmp_path).newest_good() == (None, [])
    assert not any(tmp_path.iterdir())


def test_the_newest_few_are_kept(tmp_path):
    save(Series(tmp_path, keep=2), 1, 2, 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "3"]


def test_what_lies_beyond_a_restored_step_goes_only_after_a_good_save(tmp_path):
    save(Series(tmp_path, keep=2), 1, 5)
    flip(tmp_path / "5")
    save(Series(tmp_path, keep=2), 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "3"]


def test_a_save_that_fails_keeps_what_there_is_and_says_so(tmp_path, monkeypatch):
    save(Series(tmp_path), 1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_seal", full)
    with pytest.raises(
        RunFailed, match=r"/2: .*No space left on device; the last good one is .*/1"
    ):
        save(Series(tmp_path), 2)
    assert Series(tmp_path).newest_good()[0] == 1


def test_a_save_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    """As Orbax's does where the clock jumps meanwhile."""
    seal, failures = checkpoint._seal, [TimeoutError("Timeout waiting for key")]

    def fails_once(path):
        if failures:
            raise failures.pop()
        seal(path)

    monkeypatch.setattr(checkpoint, "_seal", fails_once)
    save(Series(tmp_path), 1)
    assert not failures
    assert Series(tmp_path).newest_good() == (1, [])


def test_a_good_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    save(Series(tmp_path), 1)
    before = (tmp_path / "1" / DIGESTS).stat().st_mtime_ns
    save(Series(tmp_path), 1)
    assert (tmp_path / "1" / DIGESTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_network_is_read(tmp_path, damage):
    path = tmp_path / "network"
    checkpoint.write(path, {"x": jnp.zeros(1000)}, NOTE)
    assert checkpoint.read(path).note == NOTE
    damage(path)
    with pytest.raises(UserError, match=r"damaged|cannot be read|has no digests"):
        checkpoint.read(path)


def test_a_copied_checkpoint_is_as_good(tmp_path):
    checkpoint.write(tmp_path / "a", {"x": jnp.zeros(10)}, NOTE)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert checkpoint.flaw(tmp_path / "b") is None
