"""Images/s of our training step and inference against PyTorch: `python -m benchmarks.train_step`.

README.md beside this file says what is measured and how. This process only directs: our side runs
in workers of this Python (`benchmarks.ours`), the peer in workers of `--torch-python`
(`benchmarks.peers.torch_shiftresnet`), one process a measurement.
"""

import argparse
import contextlib
import datetime
import fnmatch
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.options import (
    add_budget,
    add_json,
    add_num_classes,
    add_peer,
    add_precision,
    add_rounds,
    positive,
)
from benchmarks.protocol import Turns, Worker, WorkerError, alternate, steps_for

OURS, PEER = "benchmarks.ours", "benchmarks.peers.torch_shiftresnet"
TASKS = ("training", "inference")
# The originals' recipe with a tenth of its learning rate: at 0.1 the first losses of a deep net
# amplify rounding beyond what could be told from a mistake. It makes no difference to the time.
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
CHECK_STEPS = 3  # the second loss depends on the first gradients, the third on the momentum
# Largest difference over a scale, see `agree`. With reduced precision numbers can only be in the
# right place, so the same form is checked in float32 as well. Where weights are rounded to levels,
# a rounding error moves some of them to another one.
TOLERANCES = {"float32": 1e-3, "float32, low-bit": 2e-2, "TF32": 2e-2, "bfloat16": 1e-1}
PRECISIONS = {
    "float32": "float32",
    "TF32": "float32 with TF32 products on both sides",
    "bfloat16": "bfloat16 with float32 parameters",
}
# On a GPU a JAX process takes three quarters of the memory at once; two of ours must fit.
SHARED_GPU = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
# What our commands tell glibc (`shiftnet.training.processes`), for the peer: it gains from it too.
KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
PRESELECTION_SECONDS = 0.5
# Above one of these, something else was using the machine: slowest round over fastest, and cores.
UNSTEADY, BUSY = 1.2, 0.1
# What the project's targets are for: ratios, to be reached on either.
TARGET_DEVICES = ("H100", "H200")
NO_TIME = "not tried, the time for it was over"
PATIENCE = 240.0  # seconds for an answer on a GPU; the longest are compilations
NOT_QUIET = "; NOT TO BE RELIED ON, the machine was not quiet"
LINUX = sys.platform == "linux"
CPU_INFO = Path("/proc/cpuinfo")
# Settings that change how fast either side runs; both inherit them, and the report names them.
SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
    "GOMP_",
    "JAX_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_",
    "ONEDNN_",
    "PYTORCH_",
    "TORCHINDUCTOR_",
    "XLA_",
)


class Refused(Exception):
    """There is no result to be trusted. The message is one sentence."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="Images/s of ShiftResNet's training step and inference, ours and PyTorch's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--depth", type=int, default=20, help="6n + 2")
    parser.add_argument("--expansion", type=float, default=3.0, help="of the shift blocks")
    add_num_classes(parser)
    parser.add_argument("--batch-size", type=positive, default=128, help="images a step")
    add_precision(parser)
    add_rounds(parser, 7)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to compare"
    )
    add_peer(
        parser, sys.executable, meaning="which of the peer's forms to try, such as 'split/*/eager'"
    )
    add_budget(
        parser,
        None,
        ", shared by the tasks: how long to try forms of the peer (default: until all are tried); "
        "comparing the fastest comes after it",
    )
    parser.add_argument(
        "--loop",
        action="store_true",
        help="instead of the peer, measure what our training loop adds to the bare step",
    )
    add_json(parser)
    return parser.parse_args(argv)


class Benchmark:
    """The settings of one run, and the file with what both sides start from.

    Args:
      options: from `parse`; of them `depth`, `expansion`, `num_classes`, `batch_size`, `dtype`,
        `tf32` and `torch_python`; the first three only without a `net`.
      folder: a place for that file.
      worker: one of `OURS`, which is no longer needed afterwards.
      share_gpu: whether two of our measurements are open at the same time.
      net: any network, as `benchmarks.ours.recipe` takes it.
      peer: the module of the peer's worker.

    Attributes:
      net: depth, expansion and number of classes, or what was given.
      ours: versions and device of our side.
      on_cpu: whether that device is the CPU.
      precision: one of `PRECISIONS`.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        folder: str,
        worker: Worker,
        *,
        share_gpu: bool = False,
        net: dict[str, Any] | None = None,
        peer: str = PEER,
    ):
        self._options, self._share_gpu, self._peer = options, share_gpu, peer
        self.net = net or {
            "depth": options.depth,
            "expansion": options.expansion,
            "num_classes": options.num_classes,
        }
        self._data = os.path.join(folder, "data.npz")
        worker.ask("export", net=self.net, batch_size=options.batch_size, path=self._data)
        self.ours = worker.ask("describe")
        self.on_cpu = self.ours["device"] == "cpu"
        rounded = options.dtype == "float32" and options.tf32 and not self.on_cpu
        self.precision = "TF32" if rounded else options.dtype

    def peer(self) -> dict[str, Any]:
        """Versions, device and forms of the peer.

        Raises:
          Refused: where there is no PyTorch, or it runs on another kind of device.
        """
        python = self._options.torch_python
        hint = "name a Python that has PyTorch with --torch-python PATH"
        if python == sys.executable and importlib.util.find_spec("torch") is None:
            raise Refused(f"this Python has no PyTorch; {hint}")
        try:
            with Worker(python, self._peer) as worker:
                found = worker.ask("describe")
        except (OSError, WorkerError) as error:
            raise Refused(f"{python} cannot run the peer ({error}); {hint}") from error
        if (found["device"] == "cpu") != self.on_cpu:
            raise Refused(
                f"the sides would run on different devices: JAX on {self.ours['device']}, "
                f"PyTorch on {found['device']}"
            )
        return found

    @contextlib.contextmanager
    def measurement(
        self, task: str, form: str | None = None, *, exact: bool = False
    ) -> Iterator[Worker]:
        """A worker with a measurement open.

        Args:
          task: one of the worker's tasks.
          form: the peer's; None for our side.
          exact: in float32 without TF32, whatever the options say.
        """
        python = sys.executable if form is None else self._options.torch_python
        environment = SHARED_GPU if self._share_gpu else None
        if (
            form is not None
            and self.on_cpu
            and not any(name.startswith("MALLOC_") for name in os.environ)
        ):
            environment = KEPT_MEMORY
        # On a GPU a kernel, or a compiler, that hangs must not take the time of all.
        patience = None if self.on_cpu else PATIENCE
        module = OURS if form is None else self._peer
        with Worker(python, module, environment, patience) as worker:
            worker.ask(
                "open",
                task=task,
                net=self.net,
                optimizer=OPTIMIZER,
                data=self._data,
                dtype="float32" if exact else self._options.dtype,
                tf32=self._options.tf32 and not exact,
                **({} if form is None else {"form": form}),
            )
            yield worker

    def numbers(self, task: str, form: str | None = None, *, exact: bool = False) -> list[float]:
        """What the sides must agree on: logits, or the losses of the first steps."""
        with self.measurement(task, form, exact=exact) as worker:
            return worker.ask("check", steps=CHECK_STEPS)


def difference(ours: list[float], theirs: list[float], scale: float) -> float:
    """Largest difference over `scale`; infinite where a number is not finite."""
    if len(ours) != len(theirs) or not all(map(math.isfinite, ours + theirs)):
        return math.inf
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / scale


def agree(task: str, ours: list[float], theirs: list[float], precision: str) -> float:
    """Returns the difference, relative to what `README.md` says for `task` and `precision`.

    Raises:
      Refused: where it is above the tolerance of `precision`.
    """
    scale = max(map(abs, ours))
    if task == "training" and precision.startswith("float32"):
        # Against the way the loss went: next to the loss itself, a wrong momentum would not show.
        scale = max(ours) - min(ours)
    gap = difference(ours, theirs, scale)
    if gap > TOLERANCES[precision]:
        raise Refused(
            f"its numbers differ from ours by {gap:.1e}, more than {TOLERANCES[precision]:g}"
        )
    return gap


def preselect(
    benchmark: Benchmark,
    task: str,
    forms: list[str],
    batch_size: int,
    reference: list[float],
    until: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Checks and briefly times the peer's forms, each in its own process; prints a line for each.

    Args:
      benchmark: the run.
      task: "training" or "inference".
      forms: to try.
      batch_size: images a step.
      reference: our numbers.
      until: of `time.monotonic()`; once a form is found, no other begins after it.

    Returns:
      By form, `seconds_a_step` and `difference` from our numbers; or `failed`, the reason.
    """
    results: dict[str, dict[str, Any]] = {}
    print(f"\n{task}: the peer's forms, each briefly", flush=True)
    for form in forms:
        if by_speed(results) and time.monotonic() > until:
            results[form] = {"failed": NO_TIME}
            print(f"  {form:24} {NO_TIME}", flush=True)
            continue
        try:
            with benchmark.measurement(task, form) as worker:
                numbers = worker.ask("check", steps=CHECK_STEPS)
                gap = agree(task, reference, numbers, benchmark.precision)
                steps = steps_for(worker, PRESELECTION_SECONDS)
                # The fastest of three: what disturbs a run only ever makes it slower.
                seconds = min(worker.ask("run", steps=steps) for _ in range(3))
        except (WorkerError, Refused) as error:
            results[form] = {"failed": str(error)}
            print(f"  {form:24} failed: {str(error)[:200]}", flush=True)
        else:
            results[form] = {"seconds_a_step": seconds, "difference": gap}
            print_row(form, seconds, batch_size)
    return results


def by_speed(tried: dict[str, dict[str, Any]]) -> list[str]:
    """The forms that did not fail, fastest first."""
    usable = [form for form, row in tried.items() if "failed" not in row]
    return sorted(usable, key=lambda form: tried[form]["seconds_a_step"])


def matching(known: list[str], patterns: list[str]) -> list[str]:
    """The forms that match one of the patterns.

    Raises:
      Refused: where none does.
    """
    found = [
        form for form in known if any(fnmatch.fnmatchcase(form, pattern) for pattern in patterns)
    ]
    if not found:
        raise Refused(f"no form matches {' '.join(patterns)}; there are {', '.join(known)}")
    return found


def print_environment(report: dict[str, Any]) -> None:
    """Prints the device, the settings and the versions of a report."""
    print(f"device: {report['ours']['device']}, {report['host']['cpus_usable']} CPU cores usable")
    settings = report["host"]["settings"]
    print(f"environment: {' '.join(f'{k}={v}' for k, v in settings.items()) or 'default'}")
    for side in ("ours", "peer"):
        if side in report:
            versions = ", ".join(f"{k} {v}" for k, v in report[side]["versions"].items())
            print(f"{side}: {versions}")
    if reason := report["ours"].get("left_out"):
        print(f"OUR KERNELS ARE LEFT OUT, ours is plain XLA: {reason}")


def print_row(name: str, seconds: float, batch_size: int, rest: str = "") -> None:
    """Prints a line of a table."""
    print(
        f"  {name:24} {seconds:9.5f} s/step {batch_size / seconds:10.1f} images/s {rest}".rstrip(),
        flush=True,
    )


def timed(turns: Turns, batch_size: int) -> dict[str, Any]:
    """Prints and returns the medians of alternating rounds, with the rounds themselves.

    `quiet` says whether they can be relied on. Other work slows PyTorch down far more than us: its
    threads wait for each other at every operation.
    """
    result: dict[str, Any] = {"cores_used_by_others": turns.others}
    for name, rounds in turns.times.items():
        seconds = median(rounds)
        print_row(name, seconds, batch_size, f"({min(rounds):.5f} to {max(rounds):.5f} s)")
        result[name] = {
            "seconds_a_step": seconds,
            "images_a_second": batch_size / seconds,
            "rounds": rounds,
        }
    steady = all(max(rounds) <= UNSTEADY * min(rounds) for rounds in turns.times.values())
    result["quiet"] = steady and (turns.others or 0.0) <= BUSY
    if turns.others is not None:
        print(f"  meanwhile everything else used {turns.others:.2f} cores")
    return result


def compare(
    benchmark: Benchmark, task: str, forms: list[str], options: argparse.Namespace, until: float
) -> dict[str, Any]:
    """Finds the peer's fastest form of `task` and times it against ours, in turn.

    No form is tried after `until`, see `preselect`.

    Raises:
      Refused: where no form runs and agrees, or the fastest does not agree in float32.
    """
    reference = benchmark.numbers(task)
    tried = preselect(benchmark, task, forms, options.batch_size, reference, until)
    if not (usable := by_speed(tried)):
        raise Refused(f"no form of the peer runs {task} and agrees with our numbers: no ratio")
    best = usable[0]
    if benchmark.precision == "float32":
        gap = tried[best]["difference"]
    else:
        exact = benchmark.numbers(task, exact=True)
        try:
            gap = agree(task, exact, benchmark.numbers(task, best, exact=True), "float32")
        except Refused as refusal:
            raise Refused(f"{task}: {best} in float32: {refusal}") from refusal
    print(f"{task}: the numbers of {best} and ours agree within {gap:.0e} (relative, float32)")
    print(f"{task}: ours and {best} in turn, {options.rounds} rounds each", flush=True)
    with benchmark.measurement(task) as ours, benchmark.measurement(task, best) as peer:
        sides = timed(alternate({"ours": ours, "peer": peer}, options.rounds), options.batch_size)
    return {
        "preselection": tried,
        "form": best,
        "float32_difference": gap,
        **sides,
        "ratio": sides["ours"]["images_a_second"] / sides["peer"]["images_a_second"],
    }


def loop_overhead(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """Times our training loop against the bare step, in turn."""
    print(f"\ntraining: the bare step and the loop in turn, {options.rounds} rounds each")
    with benchmark.measurement("training") as bare, benchmark.measurement("loop") as loop:
        steps = loop.ask("steps_a_run")
        sides = timed(
            alternate({"bare step": bare, "loop": loop}, options.rounds, steps),
            options.batch_size,
        )
    overhead = sides["loop"]["seconds_a_step"] / sides["bare step"]["seconds_a_step"] - 1
    return {**sides, "overhead": overhead}


def on_target_device(device: str) -> bool:
    """Whether the project's targets are judged there."""
    return any(name in device for name in TARGET_DEVICES)


def host() -> dict[str, Any]:
    """What the numbers depend on besides the code, for the report."""
    names = [
        line.partition(":")[2].strip()
        for line in (CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if LINUX else os.cpu_count(),
        "settings": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)
        },
    }


def run(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Runs what `options` ask for, prints it, and returns all of it.

    Raises:
      Refused: where there is nothing to compare, or the sides disagree.
    """
    try:
        with Worker(sys.executable, OURS) as worker:
            benchmark = Benchmark(options, folder, worker, share_gpu=options.loop)
    except WorkerError as error:
        raise Refused(f"our side does not run: {error}") from error
    report: dict[str, Any] = {"host": host(), "ours": benchmark.ours}
    if not options.loop:
        report["peer"] = benchmark.peer()
    report["precision"] = benchmark.precision
    report["net"] = benchmark.net
    report["batch_size"] = options.batch_size

    print(
        f"ShiftResNet{options.depth}, expansion {options.expansion:g}, "
        f"{options.num_classes} classes, batch {options.batch_size}, "
        f"{PRECISIONS[benchmark.precision]}"
    )
    print_environment(report)

    if options.loop:
        report["loop"] = loop_overhead(benchmark, options)
        quiet = "" if report["loop"]["quiet"] else NOT_QUIET
        overhead = report["loop"]["overhead"]
        print(f"\nloop: {overhead:+.1%} over the bare step (target: at most 3 %){quiet}")
        return report
    forms = matching(report["peer"]["forms"], options.forms)
    report["tasks"] = {}
    start, budget = time.monotonic(), options.budget or math.inf
    for number, task in enumerate(options.tasks, 1):
        until = start + budget * number / len(options.tasks)
        report["tasks"][task] = compare(benchmark, task, forms, options, until)
        save(report, options)
    print()
    for task, result in report["tasks"].items():
        print(
            f"{task}: ours {result['ours']['images_a_second']:.1f} images/s, "
            f"best peer {result['peer']['images_a_second']:.1f} images/s ({result['form']}), "
            f"ratio {result['ratio']:.2f}{'' if result['quiet'] else NOT_QUIET}"
        )
    return report


def save(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes what there is so far to `--json`."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def read(path: Path, look_up: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Reads what `save` wrote, for `--measured`; `look_up` fails where something is missing.

    Raises:
      Refused: for anything else.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        look_up(report)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"--measured {path} is not what --json writes: {error}") from error
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, folder)
        save(report, options)
    except (Refused, WorkerError, OSError) as error:
        print(f"benchmarks.train_step: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
