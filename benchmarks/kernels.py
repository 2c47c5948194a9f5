"""Times of our operations, shape by shape: `python -m benchmarks.kernels`.

README.md beside this file says what is measured and how. This process only directs and prints: our
side runs in a worker of this Python (`benchmarks.our_kernels`), PyTorch in a worker of
`--torch-python` (`benchmarks.peers.torch_kernels`).
"""

import argparse
import contextlib
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import kernel_rows
from benchmarks.kernel_rows import Ceilings, Row
from benchmarks.options import (
    add_budget,
    add_json,
    add_peer,
    add_plot,
    add_rows,
    can_plot,
    positive,
)
from benchmarks.protocol import Worker, WorkerError, steps_for
from benchmarks.train_step import (
    UNSTEADY,
    Refused,
    host,
    on_target_device,
    print_environment,
    read,
)

OURS, PEER = "benchmarks.our_kernels", "benchmarks.peers.torch_kernels"
ROUNDS, SECONDS_A_ROUND = 5, 0.08
PATIENCE = 120.0  # seconds; a kernel that waits for itself must not take the rest with it
CHUNK = 6  # rows compiled side by side
OURS_SHARE = 0.6  # of the budget; the rest is PyTorch's, where there is one
KEPT_FORMS = 3
HOST_BOUND = 0.8  # of the time; above it the host takes as long to start an operation
BATCH = {"cpu": 16, "gpu": 512, "tpu": 128}  # of 128 an H200 is done before the host has begun
LARGE = {"cpu": (1024, 2048), "gpu": (4096, 8192), "tpu": (4096, 8192)}
BARE = ("copy", "1x1 product", "1x1 convolution", "dense")  # of which the fastest counts
# Of our results against plain XLA in the same dtype, where that is further off than the tolerance.
WORST_XLA = 8


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Times of our operations, shape by shape, against plain XLA, PyTorch and "
        "what the device can do.",
    )
    add_rows(parser, "'shift_block/*'")
    parser.add_argument(
        "--batch-size",
        type=positive,
        help="images (default: 128, on a CPU 16; a TPU's kernels need 128)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU"
    )
    add_budget(parser, "8m", ", the default 8m; rows that would begin later are named as skipped")
    add_peer(parser, None)
    parser.add_argument(
        "--all-forms",
        action="store_true",
        help=f"try all of PyTorch's forms in every row, not the {KEPT_FORMS} that were fastest in "
        "the first row of its kind",
    )
    add_json(parser)
    add_plot(parser, "fractions")
    return parser.parse_args(argv)


def rounds_of(worker: Worker) -> list[float]:
    """Seconds of an operation, in each round."""
    steps = steps_for(worker, SECONDS_A_ROUND)
    return [worker.ask("run", steps=steps) for _ in range(ROUNDS)]


class Ours:
    """Our side: one worker, started again where a kernel took it down.

    Args:
      dtype: of the operations; None is the device's.

    Attributes:
      described: versions and device.
      platform: "cpu", "gpu" or "tpu".
      dtype: of the operations.
    """

    def __init__(self, dtype: str | None):
        self._stack = contextlib.ExitStack()
        self._start()
        self.platform: str = self.described["platform"]
        self.dtype = dtype or ("float32" if self.platform == "cpu" else "bfloat16")

    def _start(self) -> None:
        self._stack.close()
        self._worker = self._stack.enter_context(Worker(sys.executable, OURS))
        self.described = self._worker.ask("describe")  # which tests the kernels, and may wait
        self._worker.patience = PATIENCE

    def close(self) -> None:
        """Ends the worker."""
        self._stack.close()

    def ceilings(self) -> dict[str, float]:
        """What the device does at best; see `our_kernels.ceilings`."""
        return self._worker.ask("ceilings", dtype=self.dtype)

    def prepare(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Compiles the programs of some rows; their plans."""
        fields = [kernel_rows.to_json(row) for row in rows]
        try:
            return self._worker.ask("prepare", rows=fields, dtype=self.dtype)
        except WorkerError:
            self._start()
            if len(rows) > 1:
                return [plan for row in rows for plan in self.prepare([row])]
            # One program ended it or took too long; each is compiled again when it is measured.
            return [self._worker.ask("plan", row=fields[0], dtype=self.dtype)]

    def measure(self, row: Row, plan: dict[str, Any], sample: bool) -> dict[str, Any]:
        """Times and checks the programs of a row.

        Returns:
          The plan, with `programs` by name: `seconds`, `rounds`, `error`, `buffers`, `kernels` and
          whether it is `host_bound`; or `failed`, the reason. With `sample` also that, the numbers
          that a peer must have too.
        """
        result: dict[str, Any] = {**plan, "programs": {}}
        for name in plan["programs"]:
            numbers = result if sample and name == "xla" else None
            result["programs"][name] = self._program(row, name, numbers)
        if "ours" not in plan["programs"]:
            result["programs"]["ours"] = result["programs"]["xla"]
        return result

    def _program(self, row: Row, name: str, numbers: dict[str, Any] | None) -> dict[str, Any]:
        opened = False
        fields = kernel_rows.to_json(row)
        try:
            self._worker.ask("open", row=fields, program=name, dtype=self.dtype)
            opened = True
            found = self._worker.ask("start")
            if numbers is not None:
                numbers["sample"] = self._worker.ask("check", steps=1)
            found["rounds"] = rounds_of(self._worker)
            found["seconds"] = median(found["rounds"])
            dispatch = self._worker.ask("dispatch")
            found["host_bound"] = (
                self.platform != "cpu" and dispatch > HOST_BOUND * found["seconds"]
            )
        except WorkerError as error:
            # After a fault on a device nothing else runs in the same process.
            if opened or not self._worker.lives:
                self._start()
            return {"failed": str(error)}
        return found


def judge(row: Row, result: dict[str, Any], ceilings: Ceilings, dtype: str) -> None:
    """Adds to what `Ours.measure` returned: the floor, what is wrong, and what can be compared.

    `lost` says why something that ours is compared with has no time, `failed` why the row has no
    ratios; else `microseconds` and `ratios`, of times over ours,
    have "xla", "expand first" and "bare", the fastest of what does only a part of the work.
    `reached` is the floor over our time.
    """
    floor, tolerance = row.floor(ceilings, dtype), row.tolerance(dtype)
    result |= {"floor": floor._asdict(), "tolerance": tolerance}
    timed = result["programs"]
    lost = {name: program["failed"] for name, program in timed.items() if "failed" in program}
    failures = [f"{name}: {lost.pop(name)}" for name in ("ours", "xla") if name in lost]
    result["lost"] = lost
    timed = {name: program for name, program in timed.items() if "failed" not in program}
    if not failures:
        of_xla = timed["xla"]["error"]
        if of_xla > WORST_XLA * tolerance:
            failures.append(f"plain XLA is off by {of_xla:.1e}, more than {tolerance:.1e}")
        # No further from exact than it may be, or than plain XLA is, which rounding moves a bit.
        allowed = max(tolerance, 1.1 * of_xla)
        failures += [
            f"{name} is off by {timed[name]['error']:.1e}, more than {allowed:.1e}"
            for name in ("expand first", "ours")
            if name in timed and timed[name]["error"] > allowed
        ]
    if failures:
        result["failed"] = "; ".join(failures)
        return
    times = {name: p["seconds"] for name, p in timed.items() if name not in BARE}
    bare = {name: timed[name]["seconds"] for name in BARE if name in timed}
    if bare:
        result["bare"] = min(bare, key=lambda name: bare[name])
        times["bare"] = bare[result["bare"]]
    result["microseconds"] = {name: 1e6 * time for name, time in times.items()}
    result["ratios"] = {n: t / times["ours"] for n, t in times.items() if n != "ours"}
    result["reached"] = floor.seconds / times["ours"]


HEADER = (
    f"{'row':52} {'ours':>5} {'us':>9} {'XLA':>9} {'expand':>9} {'bare':>9} {'floor':>9}    reached"
)


def line(result: dict[str, Any]) -> str:
    """A row of the table, in microseconds."""
    start = f"{result['key']:52} {result['implementation']:>5}"
    if "failed" in result:
        return f"{start} FAILED: {result['failed']}"
    times = result["microseconds"]
    columns = [
        f"{times[name]:9.1f}" if name in times else f"{'-':>9}"
        for name in ("ours", "xla", "expand first", "bare")
    ]
    floor = result["floor"]
    marks = [result["layout"]] if result["layout"] != "NHWC" else []
    marks += [result["channel_order"]] if result["channel_order"] != "interleaved" else []
    if "bare" in result:
        marks.append(f"bare: {result['bare']}")
    marks += [f"{name} failed: {reason}" for name, reason in result["lost"].items()]
    if result["programs"]["ours"]["host_bound"]:
        marks.append("as slow on the host")
    return " ".join(
        (
            start,
            *columns,
            f"{1e6 * floor['seconds']:9.1f} {floor['limit'][:3]}",
            f"{result['reached']:7.1%}",
            "; ".join(marks),
        )
    ).rstrip()


class Peer:
    """PyTorch's side: one worker, started again where a form took it down.

    Args:
      options: from `parse`.
      dtype: of the operations.
      device: ours.

    Attributes:
      described: versions and device.

    Raises:
      Refused: where there is no PyTorch, or it runs on another kind of device.
    """

    def __init__(self, options: argparse.Namespace, dtype: str, device: str):
        self._options, self._dtype = options, dtype
        self._stack = contextlib.ExitStack()
        self._fastest: dict[str, list[str]] = {}
        try:
            self._start()
            self.described = self._worker.ask("describe")
        except (OSError, WorkerError) as error:
            raise Refused(f"{options.torch_python} cannot run the peer: {error}") from error
        if (self.described["device"] == "cpu") != (device == "cpu"):
            raise Refused(f"JAX runs on {device}, PyTorch on {self.described['device']}")

    def _start(self) -> None:
        self._stack.close()
        self._worker = self._stack.enter_context(
            Worker(self._options.torch_python, PEER, patience=PATIENCE)
        )

    def close(self) -> None:
        """Ends the worker."""
        self._stack.close()

    def restart(self) -> None:
        """Starts a worker again, after `close`."""
        self._start()

    def measure(self, row: Row, sample: list[list[float]], until: float) -> dict[str, Any]:
        """Times the forms of a row that agree with our numbers.

        Args:
          row: which.
          sample: of our numbers.
          until: of `time.monotonic()`; once a form is found, no other begins after it.

        Returns:
          By form `seconds` and `rounds`, or `failed`, the reason.
        """
        fields = kernel_rows.to_json(row)
        forms = [
            form
            for form in self._worker.ask("forms", row=fields)
            if any(fnmatch.fnmatchcase(form, pattern) for pattern in self._options.forms)
        ]
        if row.kind in self._fastest and not self._options.all_forms:
            forms = self._fastest[row.kind]
        found: dict[str, Any] = {}
        usable: list[str] = []
        for form in forms:
            if usable and time.monotonic() > until:
                break
            found[form] = self._form(row, fields, form, sample)
            if "failed" not in found[form]:
                usable.append(form)
        usable.sort(key=lambda form: found[form]["seconds"])
        if usable:
            self._fastest.setdefault(row.kind, usable[:KEPT_FORMS])
        return found

    def _form(
        self, row: Row, fields: dict[str, Any], form: str, sample: list[list[float]]
    ) -> dict[str, Any]:
        try:
            self._worker.ask("open", row=fields, form=form, dtype=self._dtype)
            error = kernel_rows.error(row, sample, self._worker.ask("check", steps=1))
            allowed = 2 * row.tolerance(self._dtype)  # both sides round
            if error > allowed:
                return {"failed": f"off by {error:.1e}, more than {allowed:.1e}"}
            rounds = rounds_of(self._worker)
        except WorkerError as reason:
            if not self._worker.lives or "CUDA" in str(reason):
                self._start()
            return {"failed": str(reason)}
        return {"seconds": median(rounds), "rounds": rounds}


class Target(NamedTuple):
    """One of the project's targets, over rows.

    Attributes:
      text: what must hold.
      rows: which rows, by the start of their names.
      ratio: of `ratios`, or "reached".
      least: what it must be in each.
    """

    text: str
    rows: str
    ratio: str
    least: float

    def verdict(self, report: dict[str, Any]) -> str:
        """A sentence: met, missed or unmeasured."""
        rows = [result for result in report["rows"] if result["key"].startswith(self.rows)]
        found = {}
        for result in rows:
            numbers = {"reached": result.get("reached"), **result.get("ratios", {})}
            if (value := numbers.get(self.ratio)) is not None:
                found[result["key"]] = value
        if not found:
            return f"{self.text}: unmeasured, none of its rows was"
        met = sum(value >= self.least for value in found.values())
        worst = min(found, key=lambda key: found[key])
        count = f"in {met} of {len(found)} rows, least {found[worst]:.2f} ({worst})"
        without = len(rows) - len(found)
        without += sum(key.startswith(self.rows) for key in report["skipped"])
        if without:
            count += f", {without} more rows without a result"
        if not on_target_device(report["ours"]["device"]):
            return f"{self.text}: unmeasured, this is no H100 or H200; here {count}"
        if met < len(found):
            return f"{self.text}: MISSED, {count}"
        return f"{self.text}: {'met so far' if without else 'met'}, {count}"


# "Never slower" leaves 2 % to chance.
TARGETS = (
    Target("shift at 0.85 of copy bandwidth", "shift/", "reached", 0.85),
    Target(
        "1x1 convolution / shift_pointwise at least 1/1.10",
        "shift_pointwise/alone",
        "bare",
        1 / 1.1,
    ),
    Target("dense product / packed_matmul at least 3", "packed_matmul/large", "bare", 3.0),
    Target("expand first / packed_matmul at least 1", "packed_matmul/", "expand first", 0.98),
)
ELSEWHERE = (
    "ShiftResNet20 e=9 inference against PyTorch (5x) and plain XLA (3x): "
    "measured by `python -m benchmarks.inference`",
    "CPU training step and inference against PyTorch (1.0x, 1.2x): "
    "measured by `python -m benchmarks.train_step`",
)


def steady(result: dict[str, Any]) -> bool:
    """Whether the rounds of each of a row's programs differ by no more than a fifth."""
    programs = [
        *result["programs"].values(),
        result.get("peer", {}).get(result.get("peer_form"), {}),
    ]
    rounds = [program["rounds"] for program in programs if "rounds" in program]
    return all(max(times) <= UNSTEADY * min(times) for times in rounds)


def summary(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each kind of row: medians over its shapes."""
    lines = []
    for kind in dict.fromkeys(result["kind"] for result in results):
        group = [result for result in results if result["kind"] == kind and "reached" in result]
        if not group:
            continue
        parts = [f"reached {median(result['reached'] for result in group):.0%}"]
        for name in ("xla", "bare", "expand first", "peer"):
            ratios = [result["ratios"][name] for result in group if name in result["ratios"]]
            if ratios:
                label = {"xla": "XLA", "peer": "PyTorch"}.get(name, name)
                parts.append(f"{label} / ours {median(ratios):.2f}")
        lines.append(f"{kind}, medians over {len(group)} shapes: {', '.join(parts)}")
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the fraction of the floor that each side reached, by row."""
    import altair as alt

    fractions = []
    for result in report["rows"]:
        if "reached" in result:
            sides = {"ours": 1.0, **result["ratios"]}
            fractions += [
                {"row": result["key"], "side": label, "reached": result["reached"] / sides[name]}
                for name, label in (("ours", "ours"), ("xla", "plain XLA"), ("peer", "PyTorch"))
                if name in sides
            ]
    chart = alt.Chart(alt.Data(values=fractions)).encode(
        alt.X("reached:Q").title("floor (each byte once at copy speed, or arithmetic) / time"),
        alt.Y("row:N").sort(None).title(None).axis(labelLimit=400),
        alt.Color("side:N")
        .title(None)
        .scale(domain=["ours", "plain XLA", "PyTorch"], range=["#4477aa", "#222222", "#cc3311"]),
    )
    ours = chart.mark_bar().transform_filter("datum.side == 'ours'")
    others = chart.mark_point(filled=True).transform_filter("datum.side != 'ours'")
    title = f"{report['ours']['device']}, {report['dtype']}"
    alt.layer(ours, others).properties(title=title, width=600).save(path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what `options` ask for, prints it, and returns all of it.

    Raises:
      Refused: where there is nothing to measure.
      WorkerError: where our side does not start.
    """
    start = time.monotonic()
    ours = Ours(options.dtype)
    peer: Peer | None = None
    try:
        if options.torch_python:
            peer = Peer(options, ours.dtype, ours.described["device"])
            peer.close()  # until ours are done: both would want the memory
        rows = kernel_rows.rows(options.batch_size or BATCH[ours.platform], LARGE[ours.platform])
        chosen = [
            row
            for row in rows
            if any(fnmatch.fnmatchcase(row.key, pattern) for pattern in options.only)
        ]
        if not chosen:
            raise Refused(f"no row matches {' '.join(options.only)}; --list prints them")
        report: dict[str, Any] = {"host": host(), "ours": ours.described, "dtype": ours.dtype}
        if peer:
            report["peer"] = peer.described
        report["ceilings"] = ours.ceilings()
        report |= {"rows": [], "skipped": [], "skipped_peer": []}
        _print_head(report, chosen)
        skipped = _measure_ours(ours, chosen, report, options, start)
        ours.close()
        if peer:
            _measure_peer(peer, chosen[: len(chosen) - skipped], report, options, start)
    finally:
        ours.close()
        if peer:
            peer.close()
    report["seconds"] = time.monotonic() - start
    _print_end(report)
    return report


def _print_head(report: dict[str, Any], rows: Sequence[Row]) -> None:
    ceilings = report["ceilings"]
    print(f"{len(rows)} rows, {report['dtype']}")
    print_environment(report)
    print(
        f"measured now: copy {ceilings['bytes_a_second'] / 1e9:.1f} GB/s, "
        f"product {ceilings['operations_a_second'] / 1e12:.2f} TFLOP/s, "
        f"smallest operation {1e6 * ceilings['smallest_seconds']:.1f} us\n"
    )
    print(HEADER, flush=True)


def _measure_ours(
    ours: Ours,
    rows: Sequence[Row],
    report: dict[str, Any],
    options: argparse.Namespace,
    start: float,
) -> int:
    """Fills `report["rows"]`; returns how many rows there was no time for."""
    ceilings = Ceilings(
        report["ceilings"]["bytes_a_second"], report["ceilings"]["operations_a_second"]
    )
    plans: list[dict[str, Any]] = []
    budget = options.budget * (OURS_SHARE if options.torch_python else 1)
    for number, row in enumerate(rows):
        if time.monotonic() - start > budget:
            report["skipped"] = [row.key for row in rows[number:]]
            print(f"{len(rows) - number} rows skipped, the budget is spent: {report['skipped']}")
            return len(rows) - number
        if number % CHUNK == 0:
            plans = ours.prepare(rows[number : number + CHUNK])
        result = {"key": row.key, "kind": row.kind}
        result |= ours.measure(row, plans[number % CHUNK], bool(options.torch_python))
        judge(row, result, ceilings, ours.dtype)
        report["rows"].append(result)
        print(line(result), flush=True)
        save(report, options)
    return 0


def _measure_peer(
    peer: Peer,
    rows: Sequence[Row],
    report: dict[str, Any],
    options: argparse.Namespace,
    start: float,
) -> None:
    """Adds `peer` to the rows of `report`."""
    print(f"\n{'row':52} {'PyTorch':>9} {'ours':>9}   ratio  form", flush=True)
    peer.restart()
    for row, result in zip(rows, report["rows"], strict=True):
        sample = result.pop("sample", None)
        if "failed" in result or sample is None:
            continue
        if time.monotonic() - start > options.budget:
            report["skipped_peer"].append(row.key)
            continue
        result["peer"] = peer.measure(row, sample, start + options.budget)
        usable = {f: p["seconds"] for f, p in result["peer"].items() if "failed" not in p}
        if not usable:
            print(f"{row.key:52} no form of PyTorch runs and agrees: {result['peer']}")
            continue
        best = min(usable, key=lambda form: usable[form])
        result["peer_form"] = best
        result["microseconds"]["peer"] = 1e6 * usable[best]
        result["ratios"]["peer"] = result["microseconds"]["peer"] / result["microseconds"]["ours"]
        print(
            f"{row.key:52} {1e6 * usable[best]:9.1f} {result['microseconds']['ours']:9.1f} "
            f"{result['ratios']['peer']:7.2f}  {best} of {len(usable)}",
            flush=True,
        )
        save(report, options)
    if report["skipped_peer"]:
        print(
            f"{len(report['skipped_peer'])} rows without PyTorch, the budget is spent: "
            f"{report['skipped_peer']}"
        )


def _print_end(report: dict[str, Any]) -> None:
    print()
    reasons: dict[str, int] = {}
    for result in report["rows"]:
        if "why" in result:
            reasons[result["why"]] = reasons.get(result["why"], 0) + 1
    for why, count in reasons.items():
        print(f"plain XLA is the default in {count} rows: {why}")
    for text in summary(report["rows"]):
        print(text)
    if unsteady := [result["key"] for result in report["rows"] if not steady(result)]:
        print(
            f"rounds that differ by more than a fifth in {len(unsteady)} rows: not to be relied on"
        )
    report["unsteady"] = unsteady
    report["targets"] = [target.verdict(report) for target in TARGETS]
    for text in (*report["targets"], *ELSEWHERE):
        print(f"target: {text}")
    failed = [result["key"] for result in report["rows"] if "failed" in result]
    print(
        f"{len(report['rows'])} rows in {report['seconds']:.0f} s; {len(failed)} failed"
        f"{': ' + ', '.join(failed) if failed else ''}"
    )


def save(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes what there is so far to `--json`, without the samples."""
    if options.json:
        rows = [{k: v for k, v in row.items() if k != "sample"} for row in report["rows"]]
        options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


def _looked_up(report: dict[str, Any]) -> object:
    return (report["rows"], report["ours"]["device"], report["dtype"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a row failed, 2 where nothing was measured."""
    options = parse(argv)
    if options.list:
        for row in kernel_rows.rows(options.batch_size or BATCH["gpu"], LARGE["gpu"]):
            print(row.key)
        return 0
    try:
        report = read(options.measured, _looked_up) if options.measured else run(options)
        save(report, options)
    except (Refused, WorkerError, OSError) as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 2
    if can_plot(options):
        plot(report, options.plot)
    return int(any("failed" in result for result in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
