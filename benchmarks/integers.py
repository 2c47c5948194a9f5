"""Integer networks in C against onnxruntime: `python -m benchmarks.integers`.

README.md beside this file says what is measured and how. This process builds the networks and the
programs, and directs; each measurement is a worker (`benchmarks.our_integers`, and
`benchmarks.peers.onnx_integers` under `--onnx-python`).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import shiftnet
from benchmarks.options import add_json, add_rounds
from benchmarks.protocol import ROOT, Worker, WorkerError, alternate, steps_for
from benchmarks.train_step import CPU_INFO, NOT_QUIET, Refused, by_speed, host, print_row, timed
from shiftnet import config as config_lib
from shiftnet import integers, models, results, zoo
from shiftnet.data import Split
from shiftnet.integers import c, calibration, interpreter

OURS, PEER = "benchmarks.our_integers", "benchmarks.peers.onnx_integers"
NETWORKS = (
    *(f"shiftresnet20_1c{form}_c100" for form in ("_s3_all", "_s3", "_ternary", "_1bit", "")),
    *(f"shiftresnet20_3c{form}_c100" for form in ("_s3", "_ternary", "_1bit", "")),
    "resnet20_c100",
)
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Werror")
# The last ones are faster: all that this processor has, such as VNNI.
BUILDS = {
    "portable": ("-O3",),
    "AVX2": ("-O3", "-mavx2"),
    "native": ("-O3", "-march=native"),
}
RISCV = "riscv64-unknown-elf-gcc"
RV32I = ("-march=rv32i", "-mabi=ilp32", "-ffreestanding", "-fno-builtin", "-Os", "-std=c99")
# Mnemonics that multiply, of x86; `lea` and shifts do not.
MULTIPLIES = re.compile(r"^v?(i?mul|pmul|pmadd|pdp|mulps|mulss|fmadd)", re.IGNORECASE)
CHECKED = 100  # images for which all builds must give the interpreter's integers
# Of the classes of `CHECKED` images; float32 and int8 round differently, and with random weights
# the logits of all images are nearly the same.
AGREE = {"trained": 0.7, "random": 0.3}
SECONDS_TO_CHOOSE = 0.2
SECONDS_A_ROUND = 0.25  # hundreds of images or more


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.integers",
        description="Images/s, bytes and accuracy of integer networks in C, against onnxruntime.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-100 is prepared for TFDS")
    parser.add_argument(
        "--onnx-python",
        metavar="PATH",
        default=sys.executable,
        help="a Python that has onnx and onnxruntime",
    )
    parser.add_argument("--cc", default="gcc", help="the C compiler")
    add_rounds(parser, 11)
    add_json(parser)
    return parser.parse_args(argv)


def network(name: str) -> tuple[nnx.Module, Any, str]:
    """Returns the network of a row, a trained one for its data's facts, and how it was trained.

    One that was not trained yet has random weights: it shows the speed and the bytes.
    """
    for typed in (name, f"{name}_short"):
        if zoo.get(typed):
            trained = shiftnet.load(typed)
            return trained.network, trained, f"trained, {typed}"
    rows = {row.name: row for table in results.tables(ROOT / "results") for row in table.rows}
    model = config_lib.load(str(ROOT / rows[name].recipe)).model
    trained = shiftnet.load("shiftresnet20_1c_c100")
    return models.build(model, 100, rngs=nnx.Rngs(0)), trained, "random weights"


def compiled(folder: Path, cc: str, build: str) -> dict[str, Any]:
    """Compiles a program; returns its files and its bytes."""
    flags = BUILDS[build]
    names = {kind: str(folder / f"{build}{suffix}") for kind, suffix in SUFFIXES.items()}
    sources = {"program": ["main.c", "net.c"], "library": ["net.c"], "object": ["net.c"]}
    extra = {"program": ["-s"], "library": ["-shared", "-fPIC", "-s"], "object": ["-c", "-fno-pie"]}
    for kind, name in names.items():
        command = [cc, *WARNINGS, *flags, *extra[kind], "-o", name, *sources[kind]]
        subprocess.run(command, cwd=folder, check=True)
    lines = subprocess.run(
        ["size", names["object"]], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    text, data, bss = map(int, lines[1].split()[:3])
    return {
        "files": names,
        "flags": flags,
        "binary_bytes": os.path.getsize(names["program"]),
        "flash_bytes": text + data,
        "ram_bytes": data + bss,
        "multiply_instructions": multiplies(["objdump"], names["object"]),
    }


SUFFIXES = {"program": "", "library": ".so", "object": ".o"}


def multiplies(objdump: list[str], path: str) -> int:
    """Counts the instructions of an object file that multiply."""
    command = [*objdump, "-d", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = (line.split("\t")[1] for line in text.splitlines() if line.count("\t") >= 1)
    return sum(bool(MULTIPLIES.match(each)) for each in instructions)


def on_rv32i(folder: Path) -> dict[str, Any] | str:
    """Compiles for a processor that cannot multiply; returns bytes and multiplications."""
    if shutil.which(RISCV) is None:
        return f"{RISCV} is not installed"
    subprocess.run([RISCV, *RV32I, "-c", "-o", "rv.o", "net.c"], cwd=folder, check=True)
    tool = RISCV.replace("gcc", "")
    undefined = subprocess.run(
        [f"{tool}nm", "-u", "rv.o"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    lines = subprocess.run(
        [f"{tool}size", "rv.o"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    text, data, bss = map(int, lines[1].split()[:3])
    return {
        "flags": RV32I,
        "multiply_instructions": multiplies([f"{tool}objdump"], str(folder / "rv.o")),
        "library_multiplications": len(re.findall("mul", undefined)),
        "flash_bytes": text + data,
        "ram_bytes": data + bss,
    }


def logits(program: str, images: np.ndarray, folder: Path) -> np.ndarray:
    """The logits that a program prints."""
    (folder / "images.raw").write_bytes(images.tobytes())
    text = subprocess.run(
        [program, "--logits", "images.raw"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    return np.array([line.split() for line in text.splitlines()], np.int64)


def build(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Builds a network's programs and what the peer reads; returns what is known without timing.

    Raises:
      Refused: where a program's integers are not the interpreter's.
    """
    model, trained, training = network(name)
    images = calibration.images(trained, options.data_dir, 256, 32)
    test = calibration.part(trained, options.data_dir, test=True)
    assert isinstance(test, Split)
    graph = integers.convert(model, images, trained.mean, trained.std).graph
    program = c.program(graph, trained.class_names)
    c.write(program, folder)
    described, arrays = integers.arrays(graph)
    (folder / "graph.json").write_text(json.dumps({"layers": described}))
    np.savez(folder / "graph.npz", **arrays)  # type: ignore[arg-type]
    np.savez(
        folder / "data.npz",
        calibration=images,
        test=test.images,
        labels=test.labels,
        mean=np.array(trained.mean, np.float32),
        std=np.array(trained.std, np.float32),
    )
    usable = "avx2" in CPU_INFO.read_text() if CPU_INFO.exists() else False
    builds = {
        build: compiled(folder, options.cc, build) for build in BUILDS if build != "AVX2" or usable
    }
    expected = interpreter.logits(graph, test.images[:CHECKED])
    for build, facts in builds.items():
        if not np.array_equal(
            logits(facts["files"]["program"], test.images[:CHECKED], folder), expected
        ):
            raise Refused(f"{name}: the {build} program's integers are not the interpreter's")
    fastest = list(builds)[-1]
    found = logits(builds[fastest]["files"]["program"], test.images, folder).argmax(-1)
    return {
        "training": training,
        "accuracy": float((found == test.labels).mean()),
        "images_equal_to_the_interpreter": CHECKED,
        "weight_bytes": program.sizes.weights,
        "requantization_bytes": program.sizes.requantization,
        "table_bytes": program.sizes.tables,
        "activation_bytes": program.sizes.activations,
        "rv32i": on_rv32i(folder),
        "builds": builds,
        "shapes": [
            (type(layer).__name__, layer.output.width, layer.output.channels)
            for layer in graph.layers
        ],
        "shifts": any(layer["kind"] == "conv" and layer["shift"] for layer in described),
    }


@contextlib.contextmanager
def ours(folder: Path, library: str):
    """A worker with one of our programs."""
    with Worker(sys.executable, OURS, {"JAX_PLATFORMS": "cpu"}) as worker:
        worker.ask("open", library=library, data=str(folder / "data.npz"), classes=100)
        yield worker


@contextlib.contextmanager
def peer(folder: Path, python: str, precision: str, form: str, threads: int):
    """A worker with a form of the peer."""
    with Worker(python, PEER) as worker:
        worker.ask(
            "open",
            graph=str(folder / "graph.json"),
            data=str(folder / "data.npz"),
            precision=precision,
            form=form,
            threads=threads,
        )
        yield worker


def choose(
    folder: Path,
    python: str,
    precision: str,
    forms: list[str],
    classes: list[int],
    agree: float,
) -> dict[str, dict[str, Any]]:
    """Times the peer's forms briefly on one thread; prints a line for each.

    Those of float32 that name our classes for less than a share `agree` of the images are refused.
    """
    tried: dict[str, dict[str, Any]] = {}
    for form in forms:
        try:
            with peer(folder, python, precision, form, 1) as worker:
                found = worker.ask("check", steps=len(classes))
                same = sum(a == b for a, b in zip(found, classes, strict=True)) / len(classes)
                if precision == "float32" and same < agree:
                    raise Refused(f"only {same:.0%} of its classes are ours")
                steps = steps_for(worker, SECONDS_TO_CHOOSE)
                seconds = min(worker.ask("run", steps=steps) for _ in range(3))
                tried[form] = {"seconds_a_step": seconds, "same_class_as_ours": same}
                print_row(f"{precision} {form}", seconds, 1)
        except (WorkerError, Refused) as error:
            tried[form] = {"failed": str(error)}
            print(f"  {precision} {form}: failed: {str(error)[:150]}", flush=True)
    return tried


def compare(
    name: str, folder: Path, options: argparse.Namespace, chosen: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Measures one network.

    Args:
      name: of its row.
      folder: for its files.
      options: of the command line.
      chosen: the peer's fastest form for each precision, for networks of the same shapes that were
        measured before; this one's are added.
    """
    print(f"\n{name}", flush=True)
    report = build(name, folder, options)
    print(
        f"  {report['training']}; {report['accuracy']:.2%} of the test images right; "
        f"{report['weight_bytes']:,} bytes of weights, {report['activation_bytes']:,} of "
        "activations"
    )
    python = options.onnx_python
    with ours(folder, report["builds"]["portable"]["files"]["library"]) as worker:
        classes = worker.ask("check", steps=CHECKED)
    with Worker(python, PEER) as worker:
        forms = worker.ask("forms", has_shifts=report.pop("shifts"))
    known = chosen.setdefault(str(report.pop("shapes")), {})
    report["peer"] = {}
    agree = AGREE[report["training"].partition(" ")[0].rstrip(",")]
    for precision in ("float32", "int8"):
        candidates = [known[precision]] if precision in known else forms[precision]
        tried = choose(folder, python, precision, candidates, classes, agree)
        report["peer"][precision] = tried
        if usable := by_speed(tried):
            known[precision] = usable[0]
    cores = host()["cpus_usable"]
    with contextlib.ExitStack() as stack:
        workers = {
            f"C {build}": stack.enter_context(ours(folder, facts["files"]["library"]))
            for build, facts in report["builds"].items()
        }
        for precision, form in known.items():
            for threads in sorted({1, cores}):
                workers[f"onnxruntime {precision}, {threads} thread{'s' * (threads > 1)}"] = (
                    stack.enter_context(peer(folder, python, precision, form, threads))
                )
        turns = alternate(workers, options.rounds, seconds=SECONDS_A_ROUND)
        report["timed"] = timed(turns, 1)
        processor = {key: worker.ask("processor_seconds") for key, worker in workers.items()}
        for key, seconds in processor.items():
            report["timed"][key]["processor_seconds_a_step"] = seconds
        for precision, form in known.items():
            facts = workers[f"onnxruntime {precision}, 1 thread"].ask("facts")
            report["peer"][precision][form] |= facts
            print(f"  onnxruntime {precision}: {facts['accuracy']:.2%} of the test images right")
    quiet = "" if report["timed"]["quiet"] else NOT_QUIET
    report["ratios"] = {}
    for program in (worker for worker in workers if worker.startswith("C ")):
        for other in (worker for worker in workers if worker.startswith("onnxruntime")):
            times = [np.array(turns.times[each]) for each in (other, program)]
            wall, used = np.median(times[0] / times[1]), processor[other] / processor[program]
            report["ratios"][f"{program} against {other}"] = {
                "wall": float(wall),
                "processor": used,
            }
            if "portable" not in program:
                line = f"{program} against {other}: {wall:.2f}x, by processor time {used:.2f}x"
                print(f"  {line}{quiet}", flush=True)
    for facts in report["builds"].values():
        del facts["files"]
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    report: dict[str, Any] = {"host": host(), "networks": {}}
    version = subprocess.run([options.cc, "--version"], capture_output=True, text=True, check=True)
    report["compiler"] = version.stdout.splitlines()[0]
    try:
        with Worker(options.onnx_python, PEER) as worker:
            report["peer"] = worker.ask("describe")
        chosen: dict[str, dict[str, str]] = {}
        for name in options.networks:
            with tempfile.TemporaryDirectory() as folder:
                report["networks"][name] = compare(name, Path(folder), options, chosen)
            if options.json:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    except (Refused, WorkerError, OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.integers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
