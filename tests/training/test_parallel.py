"""More devices or processes must not change what is learned, only how fast."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def _start(
    out: Path, devices: int, *job: str, state: str = "copied", **variables: str
) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    environment |= variables
    command = [sys.executable, "-m", "tests.training.parallel_worker", str(out), state, *job]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _finish(processes: list[subprocess.Popen], out: Path) -> dict[str, np.ndarray]:
    for process in processes:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed.decode()
    with np.load(out) as arrays:
        return dict(arrays)


def _assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want.keys() - {"devices"}:
        # Sums over the batch are added up in another order; float64 keeps that below 1e-11 here.
        np.testing.assert_allclose(got[name], want[name], rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel") / "one.npz"
    return _finish([_start(out, 1)], out)


@pytest.mark.slow
def test_eight_devices_and_a_divided_state_learn_what_one_learns(one_device, tmp_path):
    out = tmp_path / "eight.npz"
    eight = _finish([_start(out, 8, state="divided")], out)
    assert one_device["devices"] == 1
    assert eight["devices"] == 8
    _assert_same(eight, one_device)


def test_two_processes_learn_what_one_process_of_as_many_devices_learns(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    out, four = tmp_path / "two.npz", tmp_path / "four.npz"
    single = _finish([_start(four, 4)], four)
    arguments = [(coordinator, "2", str(number)) for number in range(2)]
    two = _finish([_start(out, 2, *job, state="divided") for job in arguments], out)
    assert two["devices"] == single["devices"] == 4
    _assert_same(two, single)


@pytest.mark.slow
def test_the_processes_of_a_slurm_step_find_each_other(one_device, tmp_path):
    job = {
        "SLURM_JOB_ID": str(os.getpid()),  # JAX takes the port from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
    }
    out = tmp_path / "slurm.npz"
    numbers = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    two = _finish([_start(out, 1, **job, **number) for number in numbers], out)
    assert two["devices"] == 2
    _assert_same(two, one_device)
