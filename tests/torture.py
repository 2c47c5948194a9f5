"""Kills training runs at bad moments, starts them again, and compares how they end.

    python -m tests.torture [--kills 60] [--seed 0]

Two kinds of run, one on data that the device holds, one on image files read by worker processes,
are each done once in peace. Then they are done again while their process is killed: by SIGKILL at
random moments, right after the first step of a start, and while a checkpoint is being written; and
stopped by SIGTERM. Each time the run is started again, until it ends; then it begins anew, until
there were enough kills. Last comes a job of 4 processes with 2 devices each and divided parameters,
one of whose processes is killed: the others must end, and the job must go on.

Every array of every end's checkpoint and every line of `metrics.jsonl` (but for the clock's
numbers) must be those of the run in peace. Exits with 1 where they are not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

# Before JAX is imported; the runs inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from shiftnet.checkpoint import BEST, LATEST, find, flaw
from tests.data.image_files import write_folder
from tests.training.small import epochs

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, "train.py", "--config", "configs/quickstart.py"]
COMMON = {"checkpoint.every_steps": 3, "log.every_seconds": 0, "log.tensorboard": "false"}
DIGITS = {"model.arch": "shiftresnet8", "batch_size": 128, "epochs": 4}
FILES = {
    "model.arch": "wrn8",
    "model.width": 0.25,
    "data.source": "folder",
    "data.size": 24,
    "data.workers": 2,
    "data.flip": "true",
    "batch_size": 8,
    "epochs": 8,
}
JOB = DIGITS | {"model.expansion": 9, "epochs": 2, "parallel.fsdp": "true"}
PROCESSES, DEVICES, BOUND = 4, 2, 180  # seconds, three times JAX's patience with a silent process
MOMENTS = ("any time", "any time", "first step", "checkpoint", "SIGTERM")


def command(workdir: Path, settings: dict[str, Any]) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in (COMMON | settings).items()]
    return [*TRAIN, "--workdir", str(workdir), *overrides]


def start(
    workdir: Path, settings: dict[str, Any], *options: str, **variables: str
) -> subprocess.Popen[str]:
    # A group of its own, so that a kill is the process's alone, as the system's is for memory.
    return subprocess.Popen(
        [*command(workdir, settings), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def writing(workdir: Path) -> bool:
    """Whether a checkpoint of the run is not complete at this moment."""
    return any(any((workdir / series).glob("*.unsealed*")) for series in (LATEST, BEST))


def kill(process: subprocess.Popen[str], moment: str, workdir: Path, chance: random.Random) -> bool:
    """Kills it at the moment; False where it ended before that."""
    assert process.stdout is not None
    if moment == "any time":
        deadline = time.monotonic() + chance.uniform(0.0, 12.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    elif moment == "checkpoint":
        patience = chance.randrange(3)  # the first that is seen, or a later one
        while process.poll() is None:
            if writing(workdir):
                if patience == 0:
                    break
                patience -= 1
                time.sleep(0.3)
    else:
        for line in process.stdout:
            if "  step " in line:
                break
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGTERM if moment == "SIGTERM" else signal.SIGKILL)
    return True


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    path = find(workdir)
    assert flaw(path) is None, flaw(path)
    here = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        dict(ocp.checkpointables_metadata(path).metadata),
    )
    leaves = jax.tree.leaves_with_path(ocp.load_checkpointables(path, like))
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def differences(workdir: Path, peaceful: Path) -> list[str]:
    want, got = final_state(peaceful), final_state(workdir)
    assert len(want) > 20, "there is hardly anything to compare"
    found = [f"array {name}" for name in want.keys() ^ got.keys()]
    found += [
        f"array {name}"
        for name in want.keys() & got.keys()
        if want[name].tobytes() != got[name].tobytes()
    ]
    if json.dumps(epochs(workdir)) != json.dumps(epochs(peaceful)):
        found.append("metrics.jsonl")
    return found


def torture(kind: str, settings: dict[str, Any], kills: int, chance: random.Random) -> int:
    """Kills runs of one kind; returns how many of their ends differ from the peaceful one."""
    wrong = 0
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "files":
            images = Path(scratch) / "images"
            settings = settings | {
                "data.dir": str(write_folder(images, (9, 8, 7, 10), (3, 2, 3, 3)))
            }
        peaceful, workdir = Path(scratch) / "peaceful", Path(scratch) / "run"
        subprocess.run(command(peaceful, settings), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        ends = 0
        while done.total() < kills:
            moment = chance.choice(MOMENTS)
            process = start(workdir, settings)
            killed = kill(process, moment, workdir, chance)
            printed, _ = process.communicate()
            done[moment] += killed
            if killed and moment == "SIGTERM" and process.returncode not in (143, 0):
                print(printed)
                raise SystemExit(f"SIGTERM ended with code {process.returncode}")
            if not killed or process.returncode == 0:
                if process.returncode:
                    print(printed)
                    raise SystemExit(f"{kind}: a start failed with code {process.returncode}")
                ends += 1
                found = differences(workdir, peaceful)
                wrong += bool(found)
                print(f"{kind}: end {ends} after {done.total()} kills: {found or 'the same'}")
                shutil.rmtree(workdir)
        if workdir.exists():
            subprocess.run(
                command(workdir, settings), cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
            found = differences(workdir, peaceful)
            wrong += bool(found)
            print(f"{kind}: last end after {done.total()} kills: {found or 'the same'}")
    print(f"{kind}: {dict(done)}")
    return wrong


def start_job(workdir: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = ["--coordinator", address, "--num-processes", str(PROCESSES), "--process-id"]
    count = {"JAX_NUM_CPU_DEVICES": str(DEVICES)}
    return [start(workdir, JOB, *join, str(number), **count) for number in range(PROCESSES)]


def finish_job(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes[1:] + processes[:1]:  # the first one speaks, the others hardly
        printed, _ = process.communicate()
        if process.returncode:
            print(printed)
            raise SystemExit(f"job: a process ended with code {process.returncode}")


def torture_job() -> int:
    """Kills one process of a job; returns whether the job ends otherwise than in peace."""
    with tempfile.TemporaryDirectory() as scratch:
        peaceful, workdir = Path(scratch) / "peaceful", Path(scratch) / "run"
        finish_job(start_job(peaceful))
        processes = start_job(workdir)
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if "  step 5/" in line:
                break
        processes[2].kill()
        began = time.monotonic()
        for process in processes:
            printed, _ = process.communicate(timeout=BOUND)
            assert process.returncode, printed
        print(f"job: the others ended within {time.monotonic() - began:.0f} s of a kill")
        finish_job(start_job(workdir))
        found = differences(workdir, peaceful)
        print(f"job: end after the kill: {found or 'the same'}")
        return bool(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=60, help="of all runs together")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    wrong = torture("digits", DIGITS, arguments.kills // 2, chance)
    wrong += torture("files", FILES, arguments.kills - arguments.kills // 2, chance)
    wrong += torture_job()
    print("every end was the same" if not wrong else f"{wrong} ends differ")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
