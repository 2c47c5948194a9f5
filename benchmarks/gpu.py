"""The targets for one GPU in one command of 8 minutes: `python -m benchmarks.gpu --json OUT`.

README.md beside this file says what is measured. Steps come in the order of their value, each
within a time of its own; results are written after each, so that a cut loses nothing.
"""

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.options import add_json, add_rows
from benchmarks.protocol import ROOT, Worker, WorkerError, steps_for
from benchmarks.train_step import OURS, host, on_target_device

LEAST_SECONDS = 15.0  # a step that would have less is left out
DRY_SECONDS = 600.0  # for each step of --dry
ROUNDS, SECONDS_A_ROUND = 5, 1.0
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
# Loops of steps are CUDA graphs too, with conditional nodes; not XLA's default.
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE"


class Size(NamedTuple):
    """How much is measured.

    Attributes:
      depth: of the ShiftResNet.
      batch_sizes: of training.
      dtype: of the computation.
      runs: stacked seeds.
      rounds: timed rounds.
      seconds: of a round.
      kernels: options of `benchmarks.kernels`.
    """

    depth: int
    batch_sizes: Sequence[int]
    dtype: str
    runs: int
    rounds: int
    seconds: float
    kernels: Sequence[str]


WHOLE = Size(20, (512, 128, 2048), "bfloat16", 8, ROUNDS, SECONDS_A_ROUND, ())
DRY = Size(8, (8,), "float32", 2, 1, 0.0, ("--batch-size", "2"))


class Step(NamedTuple):
    """One measurement.

    Attributes:
      name: its key in the report.
      seconds: that it may take.
      run: `run(size, folder, seconds, keep)`; calls `keep` with what it has so far.
    """

    name: str
    seconds: float
    run: Callable[[Size, Path, float, Callable[[Any], None]], None]


def _described(size: Size, folder: Path, seconds: float, keep: Callable[[Any], None]) -> None:
    """Versions, device, and the kernels' test, whose outcome the later steps find stored."""
    del size, folder
    with Worker(sys.executable, OURS, patience=seconds) as worker:
        keep(worker.ask("describe"))


def _training(
    expansion: float, *, stacked: bool = False, environment: dict[str, str] | None = None
) -> Callable[[Size, Path, float, Callable[[Any], None]], None]:
    """Returns the step that measures training, at each batch size, or of stacked seeds at 128."""

    def run(size: Size, folder: Path, seconds: float, keep: Callable[[Any], None]) -> None:
        end = time.monotonic() + seconds
        net = {"depth": size.depth, "expansion": expansion, "num_classes": 100}
        sizes = [min(size.batch_sizes, key=lambda n: abs(n - 128))] if stacked else size.batch_sizes
        found: dict[str, Any] = {}
        with Worker(sys.executable, OURS, environment) as worker:

            def ask(request: str, **arguments: Any) -> Any:
                worker.patience = max(1.0, end - time.monotonic())
                return worker.ask(request, **arguments)

            for batch_size in sizes:
                if found and end - time.monotonic() < LEAST_SECONDS:
                    break
                data = str(folder / "start.npz")
                ask("export", net=net, batch_size=batch_size, path=data)
                setting = {"net": net, "optimizer": OPTIMIZER, "dtype": size.dtype, "tf32": True}
                task = {"task": "stacked", "runs": size.runs} if stacked else {"task": "training"}
                began = time.monotonic()
                ask("open", **task, **setting, data=data)
                ask("run", steps=1)  # which compiles
                compiled = time.monotonic() - began
                steps = steps_for(worker, size.seconds)
                rounds = [ask("run", steps=steps) for _ in range(size.rounds)]
                images = batch_size * (size.runs if stacked else 1)
                found[str(batch_size)] = {
                    "images_a_second": images / median(rounds),
                    "seconds_a_step": rounds,
                    "ready_after_seconds": compiled,
                    "kernels": ask("kernels"),
                }
                keep(found)

    return run


def _kernels(*rows: str) -> Callable[[Size, Path, float, Callable[[Any], None]], None]:
    """Returns the step that runs `benchmarks.kernels` for some rows."""

    def run(size: Size, folder: Path, seconds: float, keep: Callable[[Any], None]) -> None:
        out = folder / "kernels.json"
        out.unlink(missing_ok=True)
        budget = ("--budget", f"{0.8 * seconds:.0f}s", "--json", str(out))
        some = rows if size is WHOLE else rows[:1]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kernels", "--only", *some, *size.kernels, *budget],
            cwd=ROOT,
            stdout=sys.stderr,
            start_new_session=True,  # so that its workers end with it
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not out.exists():
            raise WorkerError(f"benchmarks.kernels ended with {process.returncode} and no row")
        keep(json.loads(out.read_text()))

    return run


STEPS = (
    Step("device", 150, _described),
    Step("training e=1", 60, _training(1.0)),
    Step("training e=9", 60, _training(9.0)),
    Step("stacked training e=1", 60, _training(1.0, stacked=True)),
    Step(
        "kernels",
        80,
        _kernels("shift/e9/8x8*", "shift_pointwise/alone/e9/*", "shift/e9/*", "shift*/e3/*"),
    ),
    Step("packed", 60, _kernels("packed_matmul/large/1x*", "packed_matmul/large/*")),
    Step("training e=1, graphs", 45, _training(1.0, environment={"XLA_FLAGS": GRAPHS})),
    Step("other kernels", 60, _kernels("shift/e1/*", "shift_pointwise/alone/e1/*")),
)


class Target(NamedTuple):
    """What is aimed at on an H200.

    Attributes:
      text: what must hold.
      steps: which steps have it.
      found: the numbers of a step's result.
      least: what each must be at least, or the best of them with `best`.
      best: whether one is enough.
    """

    text: str
    steps: Sequence[str]
    found: Callable[[Any], Sequence[float]]
    least: float
    best: bool = False

    def verdict(self, report: dict[str, Any]) -> str:
        """A sentence: met, missed or unmeasured."""
        results = [
            report["steps"][name].get("result") for name in self.steps if name in report["steps"]
        ]
        numbers = [number for result in results if result for number in self.found(result)]
        if not numbers:
            return f"{self.text}: unmeasured"
        value = max(numbers) if self.best else min(numbers)
        which = "best" if self.best else f"least of {len(numbers)}"
        device = ((report["steps"].get("device") or {}).get("result") or {}).get("device", "cpu")
        if not on_target_device(device):
            return f"{self.text}: unmeasured, this is no H100 or H200; here {which} {value:,.4g}"
        return f"{self.text}: {'met' if value >= self.least else 'MISSED'}, {which} {value:,.4g}"


def _speeds(result: dict[str, Any]) -> list[float]:
    return [at["images_a_second"] for at in result.values()]


def _of_rows(start: str, ratio: str) -> Callable[[Any], list[float]]:
    def found(result: dict[str, Any]) -> list[float]:
        rows = [row for row in result["rows"] if row["key"].startswith(start)]
        numbers = [
            {**row.get("ratios", {}), "reached": row.get("reached")}.get(ratio) for row in rows
        ]
        return [number for number in numbers if number is not None]

    return found


TARGETS = (
    Target(
        "1,000,000 images/s of training at e=1",
        ("training e=1", "training e=1, graphs", "stacked training e=1"),
        _speeds,
        1e6,
        best=True,
    ),
    Target("300,000 images/s of training at e=9", ("training e=9",), _speeds, 3e5, best=True),
    Target(
        "shift at 0.85 of copy bandwidth",
        ("kernels", "other kernels"),
        _of_rows("shift/", "reached"),
        0.85,
    ),
    Target(
        "1x1 convolution / shift_pointwise at least 1/1.10",
        ("kernels", "other kernels"),
        _of_rows("shift_pointwise/alone", "bare"),
        1 / 1.1,
    ),
    Target(
        "packed_matmul at 0.8 of its packed bytes at copy bandwidth",
        ("packed",),
        _of_rows("packed_matmul/large", "reached"),
        0.8,
    ),
)


def run(
    steps: Sequence[Step], size: Size, seconds: float, out: Path | None, folder: Path
) -> dict[str, Any]:
    """Runs the steps, and writes the report to `out` after each.

    Returns:
      The report: by step `seconds` and `result`, and `failed`, the reason, where it was not
      finished; `skipped` has the steps that there was no time for.
    """
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"host": host(), "steps": {}, "skipped": []}

    def save() -> None:
        if out is not None:
            part = out.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(out)

    for step in steps:
        given = min(step.seconds, end - time.monotonic())
        if given < LEAST_SECONDS:
            report["skipped"].append(step.name)
            continue
        entry: dict[str, Any] = {}
        report["steps"][step.name] = entry

        def keep(result: Any, entry: dict[str, Any] = entry) -> None:
            entry["result"] = result
            save()

        print(f"{step.name} ...", flush=True)
        began = time.monotonic()
        try:
            step.run(size, folder, given, keep)
        except (WorkerError, OSError, ValueError) as error:
            entry["failed"] = f"{type(error).__name__}: {error}"
        entry["seconds"] = time.monotonic() - began
        print(f"  {entry.get('failed', 'done')}, {entry['seconds']:.0f} s", flush=True)
        save()
    report["targets"] = [target.verdict(report) for target in TARGETS]
    save()
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="The project's targets for one GPU, the most valuable first.",
    )
    add_rows(parser, "'training*'")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing begins")
    parser.add_argument(
        "--dry",
        action="store_true",
        help="the same in miniature, on any device: only whether it runs",
    )
    add_json(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a step failed."""
    options = parse(argv)
    chosen = [
        step for step in STEPS if any(fnmatch.fnmatchcase(step.name, p) for p in options.only)
    ]
    if options.list:
        print("\n".join(step.name for step in chosen))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # So that the kernels' test and each program are compiled once.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "cache"))
        if options.dry:  # in which nothing is timed, however slow the machine is
            steps = [step._replace(seconds=DRY_SECONDS) for step in chosen]
            report = run(steps, DRY, len(steps) * DRY_SECONDS, options.json, Path(folder))
        else:
            report = run(chosen, WHOLE, 60 * options.minutes, options.json, Path(folder))
    for name, entry in report["steps"].items():
        if name.startswith(("training", "stacked")):
            for batch_size, at in (entry.get("result") or {}).items():
                print(f"{name}, {batch_size} images: {at['images_a_second']:,.0f} images/s")
    for text in report["targets"]:
        print(f"target: {text}")
    if report["skipped"]:
        print(f"no time for: {', '.join(report['skipped'])}")
    return int(any("failed" in entry for entry in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
