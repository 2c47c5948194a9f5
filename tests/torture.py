"""Kills training runs at bad moments, starts them again, and compares how they end.

    python -m tests.torture [--kills 60] [--seed 0] [--kinds digits files seeds job]

Two kinds of run, one on data that the device holds, one on image files read by worker processes,
are each done once in peace. Then they are done again while their process is killed: by SIGKILL at
random moments, right after the first step of a start, while a checkpoint is being written, and
between its digests and its renaming; and stopped by SIGTERM. Some starts have other settings, of
those that may change, and some have settings that must be refused. Each time the run is started
again, until it ends; then it begins anew, until there were enough kills.

The third kind is two seeds of a row of results, trained by two processes at once, one or both of
which are killed at random moments and while they end; the row's file must have both seeds.

The fourth is a job of 4 processes with 2 devices each and divided parameters, one of which is
killed: the others must end, and the job must be continued. If none of its processes uses processor
time for minutes it hangs; if they only get little, they are waited for.

Most of a start is Python's imports and JAX's tracing: all starts share a folder of compiled
programs, and networks and data are small.

Every array of every end's checkpoint and every line of `metrics.jsonl` (but for the clock's
numbers) must be those of the run in peace. Each kill is printed with what happened, how the run was
continued and how it ended. Exits with 1 where an end differs, or a kill is not accounted for.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import re
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

# Before JAX is imported; the runs inherit all. The last two as in conftest.py.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from shiftnet.checkpoint import BEST, LATEST, find, verify
from tests.data.image_files import write_folder
from tests.training.small import epochs

ROOT = Path(__file__).parents[1]
TRAIN = ["train.py", "--config", "configs/quickstart.py"]
COMMON = {"checkpoint.every_steps": 3, "log.every_seconds": 0, "log.tensorboard": "false"}
# 256 digits to train on; the others choose the best network.
DIGITS = {"model.arch": "shiftresnet8", "data.validation": 1186, "batch_size": 64, "epochs": 4}
FILES = {
    "model.arch": "wrn8",
    "model.width": 0.25,
    "data.source": "folder",
    "data.size": 72,
    "data.workers": 2,
    "data.flip": "true",
    "batch_size": 8,
    "epochs": 6,
}
# Settings that change nothing, and settings that must be refused once there is a checkpoint.
HARMLESS = (
    {"checkpoint.every_steps": 2},
    {"checkpoint.every_epochs": 3},
    {"checkpoint.keep": 1},
    {"checkpoint.keep": 4},
)
REFUSED = ({"optimizer.lr": 0.3}, {"batch_size": 7}, {"seed": 5})
JOB = DIGITS | {"model.expansion": 9, "epochs": 6, "parallel.fsdp": "true"}
PROCESSES, DEVICES = 4, 2
# A job stands still if none of its processes uses a second of CPU in so many of the clock, three
# times JAX's patience with a silent process.
STILL = 180
STARTS = 4  # of a job, at most
STARTED: list[subprocess.Popen[str]] = []
KINDS = ["digits", "files", "seeds", "job"]
MOMENTS = ("any time", "first step", "checkpoint", "sealed", "SIGTERM", "other settings")

# Runs a script that kills itself when it has written the digests of so many checkpoints, which it
# has not renamed yet.
DIES_SEALED = """
import os, pathlib, runpy, signal, sys
left, replace = int(sys.argv[1]), pathlib.Path.replace
def dying(self, target):
    global left
    result = replace(self, target)
    left -= pathlib.Path(target).name == "digests.json"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
pathlib.Path.replace = dying
sys.argv[:2] = []
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""

ROW = "digits"
RECIPE = """
from shiftnet.config import default_config


def get_config():
    config = default_config()
    config.epochs, config.model.arch, config.schedule.boundaries = 2, "shiftresnet8", (1,)
    config.data.name, config.data.flip, config.log.every_seconds = "digits", False, 0.0
    config.data.validation, config.batch_size, config.checkpoint.every_steps = 1186, 64, 3
    return config
"""
TABLE = f"""
[[tables]]
name = "one"
title = "One row"
source = "nothing"
epoch = "best"
note = ""
[[tables.rows]]
name = "{ROW}"
recipe = "RECIPE"
parameters = 1
multiply_adds = 1
bytes = 1
"""


@dataclasses.dataclass
class Kill:
    """One kill: of which kind of run, when, how the process ended, and what came of the run."""

    kind: str
    moment: str
    code: int | None = None
    then: str = ""
    end: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.moment}: exit {self.code}; {self.then}; end: {self.end}"

    @property
    def accounted(self) -> bool:
        """Whether it is known what came of it, and it is good."""
        return self.code is not None and bool(self.then) and self.end == "the same"


def settings_of(workdir: Path, settings: dict[str, Any]) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in (COMMON | settings).items()]
    return [*TRAIN, "--workdir", str(workdir), *overrides]


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    # A group of its own, so that a kill is the process's alone, as the system's is for memory.
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def in_peace(arguments: list[str]) -> float:
    """Runs to the end, and returns how many seconds it took."""
    began = time.monotonic()
    process = start(arguments)
    printed, _ = process.communicate()
    if process.returncode:
        print(printed)
        raise SystemExit(f"a run in peace ended with code {process.returncode}")
    return time.monotonic() - began


def writing(workdir: Path) -> bool:
    """Whether a checkpoint of the run is not complete at this moment."""
    return any(any((workdir / series).glob("*.unsealed*")) for series in (LATEST, BEST))


def kill(
    process: subprocess.Popen[str], moment: str, workdir: Path, chance: random.Random, took: float
) -> str:
    """Kills it at the moment, unless it ends before; returns what it had printed.

    A whole run takes `took` seconds.
    """
    assert process.stdout is not None
    seen = ""
    if moment == "sealed":
        process.wait()
    elif moment == "checkpoint":
        patience = chance.randrange(3)  # the first that is seen, or a later one
        while process.poll() is None:
            if writing(workdir):
                if patience == 0:
                    break
                patience -= 1
                time.sleep(0.3)
    elif moment in ("first step", "SIGTERM"):
        for line in process.stdout:
            seen += line
            if "  step " in line:
                break
    else:
        deadline = time.monotonic() + chance.uniform(0.0, took)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    process.send_signal(signal.SIGTERM if moment == "SIGTERM" else signal.SIGKILL)
    rest, _ = process.communicate()
    return seen + rest


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    path = find(workdir)
    assert verify(path) is None, verify(path)
    here = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        dict(ocp.checkpointables_metadata(path).metadata),
    )
    leaves = jax.tree.leaves_with_path(ocp.load_checkpointables(path, like))
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def differences(workdir: Path, peaceful: Path) -> str:
    """Names what differs between two ended runs, the best networks included."""
    found = []
    for series in (LATEST, BEST):
        want, got = final_state(peaceful / series), final_state(workdir / series)
        assert len(want) > 20, "there is hardly anything to compare"
        found += [f"{series}: {name}" for name in want.keys() ^ got.keys()]
        found += [
            f"{series}: {name}"
            for name in want.keys() & got.keys()
            if want[name].tobytes() != got[name].tobytes()
        ]
    if json.dumps(epochs(workdir)) != json.dumps(epochs(peaceful)):
        found.append("metrics.jsonl")
    return ", ".join(found) or "the same"


def beginning(printed: str) -> str:
    """Says how a start began, by what it printed."""
    if found := re.search("continuing after step [0-9]+|already finished", printed):
        return found[0]
    return "began anew" if "compiling" in printed else "stopped before it began"


def refused(workdir: Path, settings: dict[str, Any], chance: random.Random) -> None:
    """Starts a run with a setting that it cannot have any more."""
    if not (workdir / "config.json").exists():
        return
    wrong = chance.choice(REFUSED)
    process = start(settings_of(workdir, settings | wrong))
    printed, _ = process.communicate()
    if process.returncode != 2 or "Traceback" in printed:
        print(printed)
        raise SystemExit(f"{wrong} ended with code {process.returncode}")


def torture(kind: str, settings: dict[str, Any], kills: int, chance: random.Random) -> list[Kill]:
    """Kills runs of one kind."""
    done: list[Kill] = []
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "files":
            images = Path(scratch) / "images"
            settings = settings | {
                "data.dir": str(write_folder(images, (9, 8, 7, 10), (3, 2, 3, 3)))
            }
        peaceful, workdir = Path(scratch) / "peaceful", Path(scratch) / "run"
        in_peace(settings_of(peaceful, settings))
        took = in_peace(settings_of(workdir, settings))  # with what is compiled now
        print(f"{kind}: a run takes {took:.0f} s", flush=True)
        assert (found := differences(workdir, peaceful)) == "the same", found
        shutil.rmtree(workdir)
        pending: list[Kill] = []  # of the run that goes on

        def started(printed: str) -> None:
            if pending and not pending[-1].then:
                pending[-1].then = f"the next start: {beginning(printed)}"

        def ended() -> None:
            for one in pending:
                one.end = differences(workdir, peaceful)
                print(one, flush=True)
            pending.clear()
            shutil.rmtree(workdir)

        while len(done) < kills:
            moment, own = chance.choice(MOMENTS), settings
            if moment == "other settings":
                refused(workdir, settings, chance)
                own = settings | chance.choice(HARMLESS)
            arguments = settings_of(workdir, own)
            if moment == "sealed":
                arguments = ["-c", DIES_SEALED, str(chance.randrange(1, 6)), *arguments]
            process = start(arguments)
            printed = kill(process, moment, workdir, chance, took)
            started(printed)
            code = process.returncode
            if code == 0:  # it had ended by itself
                ended()
                continue
            if code not in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
                print(printed)
                raise SystemExit(f"{kind}: a start failed with code {code}")
            done.append(Kill(kind, moment, code))
            pending.append(done[-1])
        if pending:
            process = start(settings_of(workdir, settings))
            printed, _ = process.communicate()
            if process.returncode:
                print(printed)
                raise SystemExit(f"{kind}: the last start failed with code {process.returncode}")
            started(printed)
            ended()
    return done


def row_lines(place: Path) -> dict[int, str]:
    """Each seed's epochs in a row's result, without what depends on the clock."""
    path = place / "results" / f"{ROW}.json"
    if not path.exists():
        return {}
    return {
        run["seed"]: json.dumps([{**line, "images_per_second": 0} for line in run["epochs"]])
        for run in json.loads(path.read_text())["runs"]
    }


def torture_seeds(kills: int, chance: random.Random) -> list[Kill]:
    """Kills two processes that train two seeds of a row."""
    done: list[Kill] = []
    with tempfile.TemporaryDirectory() as scratch:

        def furnished(name: str) -> tuple[Path, list[str]]:
            place = Path(scratch) / name
            (place / "results").mkdir(parents=True)
            (place / "recipe.py").write_text(RECIPE)
            table = TABLE.replace("RECIPE", str(place / "recipe.py"))
            (place / "results" / "table.toml").write_text(table)
            options = ["--only", ROW, "--seeds", "2", "--together", "1"]
            options += ["--results", str(place / "results"), "--workdir", str(place / "runs")]
            return place, ["-m", "shiftnet", "reproduce", *options]

        peaceful, command = furnished("peaceful")
        in_peace(command)
        want = row_lines(peaceful)
        assert sorted(want) == [0, 1]
        place, command = furnished("killed")
        took = in_peace(command)  # with what is compiled now
        assert row_lines(place) == want
        print(f"seeds: a run takes {took:.0f} s", flush=True)

        def strike(process: subprocess.Popen[str], moment: str, delay: float) -> bool:
            """Kills it at the moment; returns whether it was there to be killed."""
            if moment == "its end":
                assert process.stdout is not None
                for line in process.stdout:
                    if "epoch 2/2  lr" in line:
                        break
            time.sleep(delay)
            alive = process.poll() is None
            process.kill()
            return alive

        while len(done) < kills:
            shutil.rmtree(place)
            place, command = furnished("killed")
            pending = []
            while len(row_lines(place)) < 2:
                processes = [start(command), start(command)]
                victims = chance.sample(processes, min(chance.choice((1, 2)), kills - len(done)))
                moments = [chance.choice(("any time", "its end")) for _ in victims]
                delays = [
                    chance.uniform(0.0, took if moment == "any time" else 1.0) for moment in moments
                ]
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    struck = list(pool.map(strike, victims, moments, delays))
                printed = [process.communicate()[0] for process in processes]
                for process, text in zip(processes, printed, strict=True):
                    if process.returncode not in (0, -signal.SIGKILL):
                        print(text)
                        raise SystemExit(f"seeds: a start failed with code {process.returncode}")
                then = f"seeds {sorted(row_lines(place))} were kept then"
                for victim, moment, alive in zip(victims, moments, struck, strict=True):
                    if alive:
                        done.append(Kill("seeds", moment, victim.returncode, then))
                        pending.append(done[-1])
            for one in pending:
                one.end = "the same" if row_lines(place) == want else "another result"
                print(one, flush=True)
    return done


def start_job(workdir: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = ["--coordinator", address, "--num-processes", str(PROCESSES), "--process-id"]
    # Programs of the folder are the first process's alone, which would wait for the others to
    # compile, for at most the 30 s that XLA allows the first collective.
    variables = {
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONFAULTHANDLER": "1",
    }
    arguments = settings_of(workdir, JOB)
    return [start([*arguments, *join, str(number)], **variables) for number in range(PROCESSES)]


def seconds_of(process: subprocess.Popen[str]) -> float:
    """The CPU time that a process has used; none once it has ended."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for all processes, and returns what they printed.

    Raises SystemExit if they stand still: on a busy machine they may be slow.
    """
    printed = []
    for process in processes:
        while True:
            before = [(one, seconds_of(one)) for one in processes if one.poll() is None]
            try:
                printed.append(process.communicate(timeout=STILL)[0])
                break
            except subprocess.TimeoutExpired:
                used = [seconds_of(one) - seconds for one, seconds in before]
                if max(used) < 1:
                    for one, _ in before:
                        one.send_signal(signal.SIGABRT)  # faulthandler prints where it stands
                    print(*printed, *(one.communicate()[0] for one, _ in before), sep="\n")
                    raise SystemExit(f"job: stood still, {used} s of CPU in {STILL} s") from None
    return printed


def run_job(workdir: Path) -> None:
    """Runs a job to its end; starts it again where it says so, on a busy machine."""
    for _ in range(STARTS):
        processes = start_job(workdir)
        printed = wait_for(processes)
        codes = [process.returncode for process in processes]
        if not any(codes):
            return
        reasons = re.findall("error: .*; start the job again", "".join(printed))
        if not reasons:
            break
        print(f"job: {reasons[0]}", flush=True)
    print(*printed, sep="\n")
    raise SystemExit(f"job: the processes ended with codes {codes}")


def torture_job() -> list[Kill]:
    """Kills one process of a job."""
    done = Kill("job", "second epoch")
    with tempfile.TemporaryDirectory() as scratch:
        peaceful, workdir = Path(scratch) / "peaceful", Path(scratch) / "run"
        run_job(peaceful)
        for _ in range(STARTS):
            processes = start_job(workdir)
            assert processes[0].stdout is not None
            # A line need not name every step: fast ones are taken several in a call.
            if any(line.startswith("epoch 2/") for line in processes[0].stdout):
                break
            print("job: ended before it was killed", wait_for(processes), flush=True)
        processes[2].kill()
        began = time.monotonic()
        printed = wait_for(processes)
        assert all(process.returncode for process in processes), printed
        done.code = processes[2].returncode
        done.then = f"the others ended within {time.monotonic() - began:.0f} s"
        run_job(workdir)
        done.end = differences(workdir, peaceful)
        print(done, flush=True)
    return [done]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=60, help="of all runs together, the job's too")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of runs")
    arguments = parser.parse_args()
    try:
        return torture_all(arguments.kinds, arguments.kills, random.Random(arguments.seed))
    finally:  # of runs that failed, some processes may be left
        for process in STARTED:
            process.kill()


def torture_all(kinds: list[str], kills: int, chance: random.Random) -> int:
    """Kills runs of these kinds, so many times in all, a job once; returns the exit code."""
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
        done = torture_job() if "job" in kinds else []
        kinds = [kind for kind in kinds if kind != "job"]
        for number, kind in enumerate(kinds):
            share = (kills - len(done)) // (len(kinds) - number)
            if share == 0:
                continue
            if kind == "seeds":
                done += torture_seeds(share, chance)
            else:
                done += torture(kind, {"digits": DIGITS, "files": FILES}[kind], share, chance)
    wrong = [one for one in done if not one.accounted]
    for (kind, moment), count in sorted(Counter((one.kind, one.moment) for one in done).items()):
        print(f"{kind:8} {moment:16} {count}")
    print(f"{len(done)} kills of {kills}, {len(done) - len(wrong)} accounted for")
    for one in wrong:
        print(f"not accounted for: {one}")
    return bool(wrong) or len(done) != kills


if __name__ == "__main__":
    sys.exit(main())
