"""Images/s of every family's networks against PyTorch: `python -m benchmarks.networks`.

README.md beside this file says what is measured and how; workers and checks are those of
`benchmarks.train_step`.
"""

import argparse
import copy
import fnmatch
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.options import (
    add_budget,
    add_json,
    add_peer,
    add_plot,
    add_rounds,
    add_rows,
    can_plot,
)
from benchmarks.protocol import Worker, WorkerError, alternate
from benchmarks.train_step import (
    NOT_QUIET,
    OURS,
    PEER,
    Benchmark,
    Refused,
    by_speed,
    host,
    matching,
    preselect,
    print_environment,
    read,
    save,
    timed,
)

NETWORKS_PEER = "benchmarks.peers.torch_networks"
# Ratios that are aimed at, and those that are accepted.
TARGET, ACCEPTED = 1.0, {"training": 0.8, "inference": 1.0}


class Network(NamedTuple):
    """A row of the table.

    Attributes:
      net: as `benchmarks.ours.recipe` takes it.
      batch_size: of training and of inference with many images.
      peer: the module of the peer's worker.
    """

    net: dict[str, Any]
    batch_size: int = 128
    peer: str = NETWORKS_PEER


def _small(**model: Any) -> dict[str, Any]:
    return {"model": model, "num_classes": 100, "size": 32}


def _large(**model: Any) -> dict[str, Any]:
    return {"model": model, "num_classes": 1000, "size": 224}


def _shift(expansion: float) -> dict[str, Any]:
    return {"depth": 20, "expansion": expansion, "num_classes": 100}


NETWORKS = {
    "shiftresnet20-e1": Network(_shift(1.0), peer=PEER),
    "shiftresnet20-e3": Network(_shift(3.0), peer=PEER),
    "resnet20": Network(_small(arch="resnet20")),
    "depthwiseresnet20": Network(
        _small(arch="depthwiseresnet20", reduction=0.38, reduction_mode="block")
    ),
    "wrn20-2-1bit": Network(_small(arch="wrn20", width=2.0, weights="sign"), 64),
    "resnet20-s3": Network(_small(arch="resnet20", weights="s3")),
    "resnet18": Network(_large(arch="imagenet_resnet18"), 16),
    "resnet18-s3": Network(_large(arch="imagenet_resnet18", weights="s3"), 16),
}
TASKS = ("training", "inference", "one-image")


class Row(NamedTuple):
    """A network and what it does."""

    name: str
    task: str

    @property
    def network(self) -> Network:
        return NETWORKS[self.name]

    @property
    def batch_size(self) -> int:
        return 1 if self.task == "one-image" else self.network.batch_size

    @property
    def kind(self) -> str:
        """The workers' word for the task."""
        return "training" if self.task == "training" else "inference"

    def __str__(self) -> str:
        return f"{self.name}/{self.task}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks",
        description="Images/s of all families' networks, ours and PyTorch's, in float32.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_rows(parser, "'resnet20/*' or '*/training'")
    add_rounds(parser, 7)
    add_budget(parser, "60m", ", divided evenly over the rows: how long to try forms of the peer")
    add_peer(
        parser, sys.executable, meaning="which of the peer's forms to try, such as '*/nhwc/eager'"
    )
    add_json(parser)
    add_plot(parser, "ratios")
    options = parser.parse_args(argv)
    options.dtype, options.tf32 = "float32", False
    return options


def rows(patterns: Sequence[str]) -> list[Row]:
    """The rows that match one of the patterns.

    Raises:
      Refused: where none does.
    """
    every = [Row(name, task) for name in NETWORKS for task in TASKS]
    found = [row for row in every if any(fnmatch.fnmatchcase(str(row), p) for p in patterns)]
    if not found:
        raise Refused(
            f"no row matches {' '.join(patterns)}; there are {', '.join(map(str, every))}"
        )
    return found


def measure(
    benchmark: Benchmark, row: Row, forms: list[str], rounds: int, until: float
) -> dict[str, Any]:
    """Finds the peer's fastest form of a row, times it and ours in turn, and prints the ratio.

    Raises:
      Refused: where no form runs and agrees with our numbers.
    """
    with benchmark.measurement(row.kind) as ours:
        numbers = benchmark.numbers(row.kind)
        tried = preselect(benchmark, row.kind, forms, row.batch_size, numbers, until)
        if not (usable := by_speed(tried)):
            raise Refused(f"{row}: no form of the peer runs and agrees with our numbers")
        with benchmark.measurement(row.kind, usable[0]) as peer:
            sides = timed(alternate({"ours": ours, "peer": peer}, rounds), row.batch_size)
    pairs = zip(sides["peer"]["rounds"], sides["ours"]["rounds"], strict=True)
    return {
        "preselection": tried,
        "form": usable[0],
        "difference": tried[usable[0]]["difference"],
        **sides,
        "ratio": median(theirs / ours for theirs, ours in pairs),
    }


def run(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Measures, prints, and returns all of it.

    Raises:
      Refused: where there is nothing to compare.
    """
    report: dict[str, Any] = {"host": host(), "rows": {}}
    wanted, start = rows(options.only), time.monotonic()
    for number, row in enumerate(wanted, 1):
        settings = copy.copy(options)
        settings.batch_size = row.batch_size
        net, peer = row.network.net, row.network.peer
        try:
            with Worker(sys.executable, OURS) as worker:
                benchmark = Benchmark(settings, folder, worker, net=net, peer=peer)
            if row.kind == "training" and net.get("model", {}).get("weights", "float") != "float":
                benchmark.precision = "float32, low-bit"
            found = benchmark.peer()
            if "ours" not in report:
                report["ours"] = benchmark.ours
                report["peer"] = {name: found[name] for name in ("versions", "device", "threads")}
                print_environment(report)
            until = start + (options.budget or math.inf) * number / len(wanted)
            print(f"\n{row}, batch {row.batch_size}", flush=True)
            forms = matching(found["forms"], options.forms)
            result = measure(benchmark, row, forms, options.rounds, until)
        except WorkerError as error:
            raise Refused(f"{row}: {error}") from error
        report["rows"][str(row)] = {"net": net, "batch_size": row.batch_size, **result}
        save(report, options)
    return report


def print_table(report: dict[str, Any]) -> None:
    """Prints a line for each row: images/s of both sides, their ratio, and the peer's form."""
    print(f"\n{'':28} {'ours':>9} {'PyTorch':>9} {'ratio':>6}  (images/s, of its fastest form)")
    for name, result in report["rows"].items():
        speeds = [result[side]["images_a_second"] for side in ("ours", "peer")]
        task = "training" if name.endswith("/training") else "inference"
        missed = "" if result["ratio"] >= TARGET else "  below 1"
        missed = missed if result["ratio"] >= ACCEPTED[task] else f"  BELOW {ACCEPTED[task]:g}"
        quiet = "" if result["quiet"] else NOT_QUIET
        form = f"  {result['form']} of {len(by_speed(result['preselection']))}"
        figures = f"{speeds[0]:9.1f} {speeds[1]:9.1f} {result['ratio']:6.2f}"
        print(f"{name:28} {figures}{form}{missed}{quiet}")


def _looked_up(report: dict[str, Any]) -> object:
    return [(row["ratio"], row["ours"], row["peer"]) for row in report["rows"].values()]


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the ratio of each row, in a panel for each task."""
    import altair as alt

    ratios = [
        {"network": name, "task": task, "ratio": result["ratio"]}
        for key, result in report["rows"].items()
        for name, task in [key.rsplit("/", 1)]
    ]
    base = alt.Chart().encode(alt.Y("network:N").sort(None).title(None))
    bars = base.mark_bar(color="#4477aa").encode(
        alt.X("ratio:Q").title("our images/s / PyTorch's").scale(domainMin=0)
    )
    numbers = base.mark_text(align="right", dx=-4, color="white").encode(
        alt.X("ratio:Q"), alt.Text("ratio:Q").format(".2f")
    )
    level = alt.Chart().mark_rule(strokeDash=[4, 3]).encode(alt.XDatum(TARGET))
    alt.layer(bars, numbers, level, data=alt.Data(values=ratios)).properties(width=230).facet(
        column=alt.Column("task:N").sort(list(TASKS)).title(None)
    ).resolve_scale(x="independent").save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    if options.list:
        print("\n".join(str(row) for row in rows(["*"])))
        return 0
    try:
        if options.measured:
            report = read(options.measured, _looked_up)
        else:
            with tempfile.TemporaryDirectory() as folder:
                report = run(options, folder)
    except (Refused, OSError) as error:
        print(f"benchmarks.networks: {error}", file=sys.stderr)
        return 2
    print_table(report)
    if can_plot(options):
        plot(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
