"""More devices or processes must not change what is learned, only how fast."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.training.mesh import make_mesh
from shiftnet.training.step import Program
from tests.training.small import recipe

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


@pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("float64")
def test_batch_norm_per_device_is_a_step_on_each_devices_images_averaged(fsdp, monkeypatch):
    monkeypatch.setattr("shiftnet.training.mesh.FSDP_SIZE", 64)  # the network is small
    rng = np.random.default_rng(0)
    images = rng.normal(1, 2, (8, 16, 16, 3)) * np.arange(1, 9).reshape(8, 1, 1, 1)
    labels = rng.integers(0, 10, 8).astype(np.int32)

    def step(devices, images, labels):
        """Parameters and statistics after one step, and the loss and correct images before it."""
        program = Program(
            recipe(batch_size=len(images), parallel__batch_norm="per_device", parallel__fsdp=fsdp),
            num_classes=10,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            steps_per_epoch=1,
            mesh=make_mesh(len(images), devices),
        )
        state = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf,
            program.init(np.uint32(0)),
        )
        state, loss, correct = jax.device_get(jax.jit(program.update)(state, images, labels))
        return state.params, state.stats, loss, correct

    together = step(jax.devices()[:2], images, labels)
    first, second = (step(jax.devices()[:1], images[s], labels[s]) for s in (slice(4), slice(4, 8)))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    # A step of gradient descent is linear in the gradient.
    jax.tree.map(lambda ours, a, b: compare(ours, (a + b) / 2), together[0], first[0], second[0])
    jax.tree.map(compare, together[1], first[1])
    compare(together[2], (first[2] + second[2]) / 2)
    assert together[3] == first[3] + second[3]
    assert abs(first[2] - second[2]) > 1e-3


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
