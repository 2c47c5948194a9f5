"""Images/s of our ImageNet input against PyTorch's: `python -m benchmarks.input_pipeline`.

    python -m benchmarks.input_pipeline --torch-python PATH --json OUT

Decoding, RandomResizedCrop(224) and flip of JPEG files made for the run: noise with the spectrum of
photographs, about 500x375 pixels and 110 kB each, as ImageNet's are; smaller than its average image
is in pixels, so that our decoding to a fraction of the size never comes into play. Ours is
`TrainStream` over `FolderSource` with `--workers` processes. The peer is a `DataLoader` over
`ImageFolder` (`benchmarks.peers.torch_input`) in several forms; each is tried briefly with several
numbers of workers, and the best is compared with, for each of two kinds of batch:

  float32   normalised by the workers, as in PyTorch's ImageNet example
  uint8     normalised on the device, as ours

The sides take turns, A B A B ..., each in a process of its own, and in each turn start their worker
processes afresh. The time counts from when the workers are at work to the last batch, with none
made in advance; ending the workers does not count. The files are in the page cache.

`--processor` needs no peer: it counts the processor time that an image costs all of our processes,
which other work on the machine disturbs less than the clock.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.options import add_json, add_rounds
from benchmarks.protocol import Worker, WorkerError, alternate
from benchmarks.train_step import BUSY, NOT_QUIET, UNSTEADY, Refused, host

OURS, PEER = "benchmarks.our_input", "benchmarks.peers.torch_input"
KINDS = ("float32", "uint8")
# Height and width; most of ImageNet's files are the first two.
SHAPES = ((375, 500), (375, 500), (333, 500), (500, 375), (400, 500), (375, 500))
QUALITY = 90
CLASSES = 10
PRESELECTION_STEPS = 10


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photographs, in muted colours.

    Returns:
      uint8 [height, width, 3].
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    slope = rng.uniform(0.9, 1.3)
    planes = []
    for contrast, steeper in (50, 0.0), (18, 0.3), (18, 0.3):  # luma, and two of chroma
        spectrum = rng.standard_normal((2, *frequency.shape)) / frequency ** (slope + steeper)
        plane = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], (height, width))
        planes.append(contrast * (plane - plane.mean()) / plane.std())
    luma, blue, red = planes
    rgb = (luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue)
    return (np.stack(rgb, axis=-1) + 128).clip(0, 255).astype(np.uint8)


def make_files(folder: Path, count: int, scale: int = 1) -> float:
    """Writes `count` JPEG files to `folder/train/<class>`; returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    sizes = []
    for number in range(count):
        path = folder / "train" / f"n{number % CLASSES:08d}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = SHAPES[number % len(SHAPES)]
        pixels = photograph(rng, scale * height, scale * width)
        Image.fromarray(pixels).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    (folder / "val").mkdir()
    return float(np.mean(sizes))


class Loader(Worker):
    """A worker whose own worker processes count as it, once they have ended."""

    def processor_seconds(self) -> float:
        """Processor time used so far; Linux only."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return sum(map(int, stat.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline",
        description="Images/s of our ImageNet input pipeline against PyTorch's DataLoader.",
    )
    parser.add_argument("--images", type=int, default=1000, help="files to make")
    parser.add_argument(
        "--scale", type=int, default=1, help="height and width of the files, times 500x375 or so"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="timed batches of a round")
    add_rounds(parser, 7)
    parser.add_argument("--workers", type=int, default=2, help="our worker processes")
    parser.add_argument(
        "--peer-workers",
        type=int,
        nargs="+",
        default=[2, 3, 4],
        metavar="N",
        help="numbers of worker processes that the peer is tried with",
    )
    parser.add_argument(
        "--torch-python",
        metavar="PATH",
        default=sys.executable,
        help="a Python that has PyTorch and torchvision",
    )
    parser.add_argument(
        "--processor",
        action="store_true",
        help="only ours, in processor time: images per second of it, and what starting costs",
    )
    add_json(parser)
    options = parser.parse_args(argv)
    for name in ("batch_size", "steps", "rounds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.images < options.batch_size:
        parser.error("--images must be at least --batch-size")
    return options


def print_row(name: str, seconds: float, batch_size: int, rest: str = "") -> None:
    """Prints a line of a table."""
    print(f"  {name:26} {batch_size / seconds:8.1f} images/s {rest}".rstrip(), flush=True)


def preselect(
    options: argparse.Namespace, peer: dict[str, Any], settings: dict[str, Any]
) -> dict[str, float]:
    """Tries the peer's forms with each number of workers; returns the seconds a batch of each."""
    print(f"\nthe peer's forms / worker processes, {PRESELECTION_STEPS} batches, best of 2")
    results = {}
    for form in peer["forms"]:
        for workers in options.peer_workers:
            with Loader(options.torch_python, PEER) as worker:
                worker.ask("open", **settings, form=form, workers=workers)
                seconds = min(worker.ask("run", steps=PRESELECTION_STEPS) for _ in range(2))
            name = f"{form}/{workers}"
            results[name] = seconds
            print_row(name, seconds, options.batch_size)
    return results


def compare(
    options: argparse.Namespace, settings: dict[str, Any], chosen: dict[str, str]
) -> dict[str, Any]:
    """Times ours and the chosen forms in turn.

    Args:
      options: from `parse`.
      settings: what every side is opened with.
      chosen: for each of `KINDS`, the form with its number of workers.
    """
    print(f"\nin turn, {options.rounds} rounds of {options.steps} batches each", flush=True)
    with (
        Loader(sys.executable, OURS) as ours,
        Loader(options.torch_python, PEER) as floats,
        Loader(options.torch_python, PEER) as bytes_,
    ):
        workers: dict[str, Worker] = {"ours": ours, "float32": floats, "uint8": bytes_}
        ours.ask("open", **settings, workers=options.workers)
        for kind in KINDS:
            form, _, count = chosen[kind].rpartition("/")
            workers[kind].ask("open", **settings, form=form, workers=int(count))
        found = {name: worker.ask("check", steps=0) for name, worker in workers.items()}
        if found["float32"] != found["ours"]:
            raise Refused(f"the sides see different files: {found}")
        turns = alternate(workers, options.rounds, options.steps)
    result: dict[str, Any] = {"cores_used_by_others": turns.others}
    for name, rounds in turns.times.items():
        seconds = median(rounds)
        spread = sorted(options.batch_size / value for value in rounds)
        label = f"ours/{options.workers}" if name == "ours" else chosen[name]
        print_row(label, seconds, options.batch_size, f"({spread[0]:.0f} to {spread[-1]:.0f})")
        result[name] = {"images_a_second": options.batch_size / seconds, "rounds": rounds}
    if turns.others is not None:
        print(f"  meanwhile everything else used {turns.others:.2f} cores")
    steady = all(max(rounds) <= UNSTEADY * min(rounds) for rounds in turns.times.values())
    result["quiet"] = steady and (turns.others or 0.0) <= BUSY
    own = result["ours"]["images_a_second"]
    result["ratio"] = {kind: own / result[kind]["images_a_second"] for kind in KINDS}
    return result


def in_processor_time(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes the files, counts our processor time in each round, prints, and returns all of it."""
    mean_bytes = make_files(folder, options.images, options.scale)
    settings = {"folder": str(folder), "batch_size": options.batch_size}
    rounds = []
    with Worker(sys.executable, OURS) as worker:
        described = worker.ask("describe")
        for _ in range(options.rounds):
            found = worker.ask(
                "processor", **settings, workers=options.workers, batches=options.steps
            )
            rounds.append(found)
            print(
                f"{1 / found['seconds_an_image']:6.0f} images per second of processor time; "
                f"{found['start_seconds']:.2f} s of it to start {options.workers} workers, whose "
                f"first batch came after {found['first_batch_after']:.2f} s",
                flush=True,
            )
    return {"host": host(), "ours": described, "mean_bytes": mean_bytes, "processor": rounds}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes the files, measures, prints, and returns all of it.

    Raises:
      Refused: where the peer does not run.
    """
    with Loader(sys.executable, OURS) as worker:
        report: dict[str, Any] = {"host": host(), "ours": worker.ask("describe")}
    try:
        with Loader(options.torch_python, PEER) as worker:
            report["peer"] = worker.ask("describe")
    except (OSError, WorkerError) as error:
        raise Refused(
            f"{options.torch_python} cannot run the peer ({error}); name a Python that has PyTorch "
            f"and torchvision with --torch-python PATH"
        ) from error
    mean_bytes = make_files(folder, options.images, options.scale)
    names = ("images", "batch_size", "steps", "rounds", "workers")
    report["options"] = {name: getattr(options, name) for name in names}
    report["mean_bytes"] = mean_bytes

    print(f"{options.images} JPEG files of {mean_bytes / 1000:.0f} kB, batch {options.batch_size}")
    print(f"{report['host']['cpus_usable']} CPU cores usable, {report['host']['processor']}")
    for side in ("ours", "peer"):
        versions = ", ".join(f"{k} {v}" for k, v in report[side]["versions"].items())
        print(f"{side}: {versions}")
    settings = {"folder": str(folder), "batch_size": options.batch_size}
    tried = preselect(options, report["peer"], settings)
    chosen = {
        kind: min((name for name in tried if name.startswith(kind)), key=lambda name: tried[name])
        for kind in KINDS
    }
    report["preselection"], report["chosen"] = tried, chosen
    report["result"] = result = compare(options, settings, chosen)
    print()
    for kind in KINDS:
        print(
            f"input: ours {result['ours']['images_a_second']:.1f} images/s, best peer "
            f"{result[kind]['images_a_second']:.1f} images/s ({chosen[kind]}), "
            f"ratio {result['ratio'][kind]:.2f}{'' if result['quiet'] else NOT_QUIET}"
        )
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure = in_processor_time if options.processor else run
            report = measure(options, Path(folder))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    except (Refused, WorkerError, OSError) as error:
        print(f"benchmarks.input_pipeline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
