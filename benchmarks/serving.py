"""Latency of requests of a few images against ONNX Runtime: `python -m benchmarks.serving`.

    python -m benchmarks.serving --onnx-python PATH --json OUT

Ours is `predict` of what `shiftnet.load` returns, uint8 images in NumPy's memory to probabilities
there; the peer is a session of ONNX Runtime on what `shiftnet export` writes, to logits there. One
request follows the other. The peer's forms are tried for each number of images, and the faster one
takes turns with ours, A B A B ..., each in a process of its own. At the end, mixed requests show
whether our process grows.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.options import add_json, add_rounds, positive
from benchmarks.protocol import Worker, WorkerError, alternate, steps_for
from benchmarks.train_step import NOT_QUIET, Refused, host, print_environment, save, timed

OURS, PEER = "benchmarks.our_serving", "benchmarks.peers.onnxruntime_serving"
NETWORKS = ("shiftresnet20_1c_c100", "shiftresnet20_3c_c100")
SIZES = (1, 2, 4, 8, 16)
TOLERANCE = 1e-4  # of probabilities, in float32
PRESELECTION_SECONDS = 0.5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Latency of requests of a few images, ours and ONNX Runtime's, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names or checkpoints")
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=list(SIZES), help="images each"
    )
    add_rounds(parser, 7)
    parser.add_argument(
        "--requests", type=int, default=10_000, help="mixed ones, for the growth of memory; 0: none"
    )
    parser.add_argument(
        "--onnx-python",
        metavar="PATH",
        default=sys.executable,
        help="a Python that has onnxruntime, jax2onnx and this project's own packages",
    )
    add_json(parser)
    return parser.parse_args(argv)


def measure(
    options: argparse.Namespace, forms: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Finds the peer's faster form for a network and a size, and times it and ours in turn.

    Raises:
      Refused: where the sides do not agree.
    """
    tried = {}
    for form in forms:
        with Worker(options.onnx_python, PEER) as worker:
            worker.ask("open", **settings, form=form)
            tried[form] = worker.ask("run", steps=steps_for(worker, PRESELECTION_SECONDS))
    form = min(tried, key=lambda name: tried[name])
    with Worker(sys.executable, OURS) as ours, Worker(options.onnx_python, PEER) as peer:
        ours.ask("open", **settings)
        peer.ask("open", **settings, form=form)
        pairs = zip(ours.ask("check", steps=1), peer.ask("check", steps=1), strict=True)
        gap = max(abs(one - other) for one, other in pairs)
        if not gap <= TOLERANCE:
            raise Refused(f"the sides' probabilities differ by {gap:.2g}, so there is no ratio")
        sides = timed(alternate({"ours": ours, "peer": peer}, options.rounds), settings["size"])
    rounds = zip(sides["peer"]["rounds"], sides["ours"]["rounds"], strict=True)
    ratio = median(theirs / own for theirs, own in rounds)
    return {"preselection": tried, "form": form, "difference": gap, **sides, "ratio": ratio}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures, prints, and returns all of it.

    Raises:
      Refused: where there is nothing to compare with.
    """
    with Worker(sys.executable, OURS) as worker:
        report: dict[str, Any] = {"host": host(), "ours": worker.ask("describe"), "networks": {}}
    programs = {}
    for number, network in enumerate(options.networks):
        programs[network] = str(folder / f"{number}.onnx")
        try:
            with Worker(options.onnx_python, PEER) as worker:
                report["peer"] = worker.ask("describe")
                worker.ask("export", network=network, path=programs[network])
        except (OSError, WorkerError) as error:
            raise Refused(
                f"{options.onnx_python} cannot export {network} ({error}); name a Python that has "
                f"onnxruntime and jax2onnx with --onnx-python PATH"
            ) from error
    print_environment(report)
    for network in options.networks:
        rows = report["networks"][network] = {}
        for size in options.sizes:
            print(f"\n{network}, {size} image{'s' if size > 1 else ''}", flush=True)
            settings = {"network": network, "program": programs[network], "size": size}
            rows[str(size)] = measure(options, report["peer"]["forms"], settings)
            save(report, options)
    if options.requests:
        with Worker(sys.executable, OURS) as worker:
            before, after = worker.ask(
                "memory",
                network=options.networks[0],
                requests=options.requests,
                largest=max(options.sizes),
            )
        report["memory"] = {"requests": options.requests, "before": before, "after": after}
        save(report, options)
    return report


def print_table(report: dict[str, Any]) -> None:
    """Prints a line for each network and size: milliseconds of both sides, and their ratio."""
    print(f"\n{'':26} images {'ours':>9} {'ONNX':>9} {'ratio':>6}  (ms)")
    for network, rows in report["networks"].items():
        for size, result in rows.items():
            ours, peer = (1000 * result[side]["seconds_a_step"] for side in ("ours", "peer"))
            quiet = "" if result["quiet"] else NOT_QUIET
            print(f"{network:26} {size:>6} {ours:9.3f} {peer:9.3f} {result['ratio']:6.2f}{quiet}")
    if memory := report.get("memory"):
        grown = (memory["after"] - memory["before"]) / 2**20
        print(f"\nour process grew by {grown:.1f} MiB over {memory['requests']:,} mixed requests")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, Path(folder))
    except (Refused, WorkerError, OSError) as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 2
    print_table(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
