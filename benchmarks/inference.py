"""Images/s of inference with whole networks: `python -m benchmarks.inference`.

README.md beside this file says what is measured and how. Each network is what `shiftnet.load`
returns, with our default operations, with plain XLA only, and in PyTorch's best form; workers and
checks are those of `benchmarks.train_step`.
"""

import argparse
import contextlib
import copy
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.options import (
    add_budget,
    add_json,
    add_num_classes,
    add_peer,
    add_precision,
    add_rounds,
)
from benchmarks.protocol import Worker, WorkerError, alternate
from benchmarks.train_step import (
    NOT_QUIET,
    OURS,
    PRECISIONS,
    Benchmark,
    Refused,
    agree,
    by_speed,
    host,
    matching,
    on_target_device,
    preselect,
    print_environment,
    save,
    timed,
)

BATCH_SIZES_ON_CPU, BATCH_SIZES = (1, 128), (1024, 128, 1)
KEPT_FORMS = 3
# On a GPU these; without CUDA graphs small batches wait for the host, and NCHW is for float32.
GPU_FORMS = ("*/nhwc/graphs", "cat/nchw/graphs", "split/nchw/graphs")
TARGET_NET, TARGET_PEER, TARGET_XLA = (20, 9), 5.0, 3.0


class Case(NamedTuple):
    """A network and a batch size."""

    depth: int
    expansion: int
    batch_size: int

    def __str__(self) -> str:
        return f"ShiftResNet{self.depth} e={self.expansion} batch {self.batch_size}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="Images/s of ShiftResNets' inference: ours, plain XLA and PyTorch's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56], help="6n + 2")
    parser.add_argument(
        "--expansions", type=int, nargs="+", default=[9, 3, 1], help="of the shift blocks"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", help="images; 1024, 128 and 1, on a CPU 128 and 1"
    )
    add_num_classes(parser)
    add_precision(parser)
    add_rounds(parser, 5)
    add_budget(
        parser,
        "8m",
        "; networks that would begin later are named as skipped, and no further form of the peer "
        "is tried",
    )
    add_peer(
        parser,
        None,
        None,
        "which of the peer's forms to try, such as 'split/*/eager'; all on a CPU, "
        f"{' '.join(GPU_FORMS)} on a GPU",
    )
    add_json(parser)
    return parser.parse_args(argv)


def cases(options: argparse.Namespace, on_cpu: bool) -> list[Case]:
    """What to measure, the target's network first."""
    sizes = options.batch_sizes or (BATCH_SIZES_ON_CPU[::-1] if on_cpu else BATCH_SIZES)
    return [
        Case(depth, expansion, size)
        for depth in options.depths
        for expansion in options.expansions
        for size in sizes
    ]


class Forms:
    """Which of the peer's forms to try: all of them once, then those that were fastest.

    The fastest of a net depend on whether the host or the device limits it, so a batch size is
    tried in full once for each of a few hundred images and for few.

    Args:
      forms: all of them.
    """

    def __init__(self, forms: list[str]):
        self._forms = forms
        self._fastest: dict[tuple[int, bool], list[str]] = {}

    @staticmethod
    def _kind(case: Case) -> tuple[int, bool]:
        return case.expansion, case.batch_size > 16

    def of(self, case: Case) -> list[str]:
        """The forms to try."""
        return self._fastest.get(self._kind(case), self._forms)

    def learn(self, case: Case, forms: list[str]) -> None:
        """Takes what was found, fastest first."""
        self._fastest.setdefault(self._kind(case), forms[:KEPT_FORMS])


def measure(
    benchmark: Benchmark,
    case: Case,
    forms: Forms | None,
    exact: set[tuple[str, int, int]],
    rounds: int,
    until: float,
) -> dict[str, Any]:
    """Times one network, all sides in turn, and prints what it finds.

    Args:
      benchmark: of the case.
      case: the network and batch size.
      forms: the peer's; None to leave it out.
      exact: which forms were found to agree in float32; a form is added that was.
      rounds: timed rounds of each side.
      until: when to have tried the peer's forms, as of `preselect`.

    Raises:
      Refused: where the sides disagree.
    """
    result: dict[str, Any] = case._asdict()
    print(f"\n{case}", flush=True)
    with contextlib.ExitStack() as stack:
        workers = {
            "ours": stack.enter_context(benchmark.measurement("inference")),
            "plain XLA": stack.enter_context(benchmark.measurement("plain inference")),
        }
        numbers, plain = (worker.ask("check", steps=1) for worker in workers.values())
        try:
            result["difference"] = agree("inference", numbers, plain, benchmark.precision)
        except Refused as refusal:
            raise Refused(f"{case}: plain XLA: {refusal}") from refusal
        if forms:
            tried = preselect(
                *(benchmark, "inference", forms.of(case), case.batch_size, numbers, until)
            )
            result["preselection"] = tried
            if usable := by_speed(tried):
                forms.learn(case, usable)
                best = result["form"] = usable[0]
                workers["peer"] = stack.enter_context(benchmark.measurement("inference", best))
            else:
                print("  no form of the peer runs and agrees with our numbers")
        result |= timed(alternate(workers, rounds), case.batch_size)
    if "form" in result and benchmark.precision != "float32":
        _check_in_float32(benchmark, case, result["form"], exact)
    speed = {name: result[name]["images_a_second"] for name in workers}
    result["ratios"] = {n: speed["ours"] / s for n, s in speed.items() if n != "ours"}
    return result


def _check_in_float32(
    benchmark: Benchmark, case: Case, form: str, exact: set[tuple[str, int, int]]
) -> None:
    """With rounded products numbers can only be in the right place; once, they must be right."""
    key = (form, case.depth, case.expansion)
    if key in exact:
        return
    numbers = benchmark.numbers("inference", exact=True)
    try:
        agree("inference", numbers, benchmark.numbers("inference", form, exact=True), "float32")
    except Refused as refusal:
        raise Refused(f"{case}: {form} in float32: {refusal}") from refusal
    exact.add(key)


def run(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Measures, prints, and returns all of it.

    Raises:
      Refused: where there is nothing to measure, or our side and the peer cannot be compared.
    """
    start = time.monotonic()
    benchmarks: dict[Case, Benchmark] = {}
    with Worker(sys.executable, OURS) as worker:
        described = worker.ask("describe")
        for case in cases(options, described["device"] == "cpu"):
            of_case = copy.copy(options)
            of_case.depth, of_case.expansion, of_case.batch_size = case
            place = os.path.join(folder, str(len(benchmarks)))
            os.mkdir(place)
            benchmarks[case] = Benchmark(of_case, place, worker, share_gpu=True)
    first = next(iter(benchmarks.values()))
    report: dict[str, Any] = {"host": host(), "ours": described, "precision": first.precision}
    forms = None
    if options.torch_python:
        report["peer"] = first.peer()
        patterns = options.forms or (["*"] if first.on_cpu else list(GPU_FORMS))
        forms = Forms(matching(report["peer"]["forms"], patterns))
    print(f"inference of {options.num_classes} classes, {PRECISIONS[first.precision]}")
    print_environment(report)

    report |= {"cases": [], "skipped": [], "refused": []}
    exact: set[tuple[str, int, int]] = set()
    for case, benchmark in benchmarks.items():
        if time.monotonic() - start > options.budget:
            report["skipped"].append(str(case))
            continue
        try:
            result = measure(benchmark, case, forms, exact, options.rounds, start + options.budget)
            report["cases"].append(result)
        except (Refused, WorkerError) as error:
            print(f"  no result: {error}", flush=True)
            report["refused"].append(f"{case}: {error}")
        save(report, options)
    _print_end(report)
    return report


def _print_end(report: dict[str, Any]) -> None:
    print()
    for name in ("skipped", "refused"):
        for text in report[name]:
            print(f"{name}: {text}")
    for result in report["cases"]:
        case = Case(*(result[field] for field in Case._fields))
        others = []
        for name, ratio in result["ratios"].items():
            form = f" ({result['form']})" if name == "peer" else ""
            images = result[name]["images_a_second"]
            others.append(f"{name} {images:.1f} images/s{form}, ratio {ratio:.2f}")
        ours = result["ours"]["images_a_second"]
        quiet = "" if result["quiet"] else NOT_QUIET
        print(f"{case}: ours {ours:.1f} images/s, {', '.join(others)}{quiet}")
    report["targets"] = targets(report["cases"], report["ours"]["device"])
    for text in report["targets"]:
        print(f"target: {text}")


def targets(results: list[dict[str, Any]], device: str) -> list[str]:
    """For each of the project's targets of inference, a sentence: met, missed or unmeasured."""
    lines = []
    for name, least in (("peer", TARGET_PEER), ("plain XLA", TARGET_XLA)):
        found = {
            result["batch_size"]: result["ratios"][name]
            for result in results
            if (result["depth"], result["expansion"]) == TARGET_NET and name in result["ratios"]
        }
        text = f"ShiftResNet20 e=9 over {'PyTorch' if name == 'peer' else name} at least {least:g}"
        ratios = ", ".join(f"{ratio:.2f} at batch {size}" for size, ratio in found.items())
        if not found:
            lines.append(f"{text}: unmeasured")
        elif not on_target_device(device):
            lines.append(f"{text}: unmeasured, this is no H100 or H200; here {ratios}")
        else:
            met = all(ratio >= least for ratio in found.values())
            lines.append(f"{text}: {'met' if met else 'MISSED'}, {ratios}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a network had no result, 2 where none began."""
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, folder)
        save(report, options)
    except (Refused, WorkerError, OSError) as error:
        print(f"benchmarks.inference: {error}", file=sys.stderr)
        return 2
    return int(bool(report["refused"]))


if __name__ == "__main__":
    sys.exit(main())
