"""How many processes decode: as many as may run, pay, and find shared memory."""

import math
import os

import pytest

from shiftnet.data import workers


def test_a_number_that_is_given_is_taken():
    assert workers.num_workers(3, 10) == 3
    assert workers.num_workers(0, 10**6) == 0


def test_one_per_core_where_there_are_images_for_them(monkeypatch):
    monkeypatch.setattr(workers, "allowed_cores", lambda: 8)
    assert workers.num_workers(-1, 10**6) == 8
    assert workers.num_workers(-1, 3 * workers.IMAGES_PER_WORKER) == 3
    assert workers.num_workers(-1, 100) == 0


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"": "max 100000", "a": "max 100000", "a/b": "150000 100000"}, 1.5),
        ({"a": "400000 100000", "a/b": "max 100000"}, 4),
        ({"": "50000 100000", "a/b": "800000 100000"}, 0.5),
        ({"a/b": "nonsense"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_quota_of_a_container_is_the_lowest_of_its_groups(tmp_path, limits, cores):
    for group, text in limits.items():
        (tmp_path / "cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / group / "cpu.max").write_text(f"{text}\n")
    names = tmp_path / "self"
    names.write_text("1:name=systemd:/other\n0::/a/b\n")
    assert workers._quota(names, tmp_path / "cgroup") == cores
    assert workers._quota(tmp_path / "none", tmp_path / "cgroup") == math.inf


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.5, 2), (math.inf, 96), (200, 96)])
def test_a_quota_counts_as_cores_and_one_is_always_there(monkeypatch, quota, cores):
    monkeypatch.setattr(workers, "_quota", lambda *_: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    assert workers.allowed_cores() == cores


def test_a_system_without_affinities_counts_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(workers, "_quota", lambda *_: math.inf)
    assert workers.allowed_cores() == 10


@pytest.mark.parametrize(
    ("megabytes", "wanted", "found"),
    [
        (10_000, 4, (4, 2)),
        (64, 2, (0, 2)),  # Docker's default and an ImageNet batch of 128
        (80, 2, (1, 1)),
        (160, 2, (2, 1)),
        (200, 4, (2, 2)),
        (64, 0, (0, 2)),
    ],
)
def test_workers_are_as_many_as_shared_memory_has_room_for(monkeypatch, megabytes, wanted, found):
    usage = (megabytes << 20, 0, megabytes << 20)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    *numbers, message = workers.fit_shared_memory(wanted, 128 * 224 * 224 * 3)
    assert tuple(numbers) == found
    assert bool(message) == (found != (wanted, 2))
    if message:
        assert message.startswith(
            f"/dev/shm of {megabytes} MiB has too little room for {wanted} worker"
        )
        assert "data.workers" in message
