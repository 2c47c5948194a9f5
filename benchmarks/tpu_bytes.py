"""Bytes that every family's programs move on a TPU: `python -m benchmarks.tpu_bytes`.

README.md beside this file says what is counted. Programs are compiled for a v5e by libtpu, which
needs no TPU; nothing is run.
"""

import argparse
import fnmatch
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Weights are compiled for a TPU, and nothing else runs; set before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.options import add_json, add_rows
from benchmarks.ours import MEAN, STD, recipe
from benchmarks.train_step import host
from shiftnet import models
from shiftnet.errors import UserError
from shiftnet.kernels import implementations
from shiftnet.models.counting import count
from shiftnet.planning import chips, grids, hlo
from shiftnet.training.mesh import BATCH_AXIS
from shiftnet.training.step import Program

TOPOLOGY = "v5e:1x1"
TARGET = 1.5  # of the ratio, in inference
PROGRAMS = ("inference", "training")
CLASSES = {32: 100, 224: 1000}


class Network(NamedTuple):
    """A network of a family.

    Attributes:
      batch: images per step.
      size: height and width of an image.
      model: fields of `config.model`.
    """

    batch: int
    size: int
    model: dict[str, Any]


def _small(batch: int = 512, **model: Any) -> Network:
    return Network(batch, 32, model)


def _large(**model: Any) -> Network:
    return Network(128, 224, model)


def _reduced(arch: str, reduction: float) -> Network:
    return _small(arch=arch, reduction=reduction, reduction_mode="block")


# The reductions are some of the page's: with them mobile and shuffle blocks have the parameters of
# a ShiftResNet20 at expansion 1, depthwise ones those at expansion 3.
NETWORKS = {
    "shiftresnet20-e1": _small(arch="shiftresnet20", expansion=1.0),
    "shiftresnet20-e9": _small(arch="shiftresnet20", expansion=9.0),
    "resnet20": _small(arch="resnet20"),
    "resnet20-s3": _small(arch="resnet20", weights="s3"),
    "depthwiseresnet20": _reduced("depthwiseresnet20", 0.38),
    "mobileresnet20": _reduced("mobileresnet20", 1.12),
    "shuffleresnet20": _reduced("shuffleresnet20", 0.38),
    "wrn20-10-1bit": _small(128, arch="wrn20", width=10.0, weights="sign"),
    "resnet18": _large(arch="imagenet_resnet18"),
    "resnet18-s3": _large(arch="imagenet_resnet18", weights="s3"),
    "shiftnet-a": _large(arch="shiftnet_a"),
}
ROWS = [f"{name}/{program}" for program in PROGRAMS for name in NETWORKS]


def floor(network: Network, state: Any, dtype: str, program: str) -> int:
    """Returns the bytes that a step cannot do without, where activations go through the memory.

    Every product (or shift block) reads its inputs and writes its result once, with all that
    follows up to the next product done on the way: `Counts.fused_bytes_moved`. Activations have
    the dtype of the computation; the program is given float32 images and parameters. Backward a
    product reads its inputs again and the gradient of its result, and writes the gradient of its
    inputs, but not that of the images. Parameters are read forward and backward and written once,
    the optimizer's state and running statistics are read and written.

    Args:
      network: which.
      state: its `TrainState`, abstract.
      dtype: of the activations.
      program: of `PROGRAMS`.
    """
    config = recipe({"model": network.model}, network.batch, "float32")
    classes = CLASSES[network.size]
    model = nnx.eval_shape(lambda: models.build(config.model, classes, rngs=nnx.Rngs(0)))
    counts = count(model, (network.size, network.size, 3))
    image = 4 * 3 * network.size**2
    share = jnp.dtype(dtype).itemsize / 4
    read = share * (counts.fused_bytes_read - image)
    written = share * (counts.fused_bytes_moved - counts.weight_bytes - counts.fused_bytes_read)
    if program == "inference":
        return int(_nbytes((state.params, state.stats)) + network.batch * (image + read + written))
    of_state = 3 * _nbytes(state.params) + 2 * _nbytes((state.stats, state.opt_state))
    return int(of_state + network.batch * (2 * image + 3 * read + 2 * written))


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(
    network: Network, dtype: str, which: str, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], str]:
    """Compiles a program.

    Returns:
      Its bytes by each count, the floor, and what compiling took; and the program as text.
    """
    program = Program(
        recipe({"model": network.model}, network.batch, dtype),
        num_classes=CLASSES[network.size],
        mean=MEAN,
        std=STD,
        steps_per_epoch=97,
        mesh=mesh,
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(tree: Any) -> Any:
        make = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
        return jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), tree)

    state = abstract(jax.eval_shape(program.draw, np.uint32(0)))
    side = network.size
    images = abstract(jax.ShapeDtypeStruct((network.batch, side, side, 3), jnp.float32))
    labels = abstract(jax.ShapeDtypeStruct((network.batch,), jnp.int32))

    def infer(params: nnx.State, stats: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(program.graphdef, params, stats)(images)

    # As a training run does, the state is given away.
    call, operands = {
        "inference": (jax.jit(infer), (state.params, state.stats, images)),
        "training": (jax.jit(program.update, donate_argnums=0), (state, images, labels)),
    }[which]
    with implementations.lowered_for("tpu"):
        start = time.perf_counter(), time.process_time()
        traced = call.trace(*operands)
        lowered = traced.lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        seconds, processor = (
            now - then
            for now, then in zip((time.perf_counter(), time.process_time()), start, strict=True)
        )
    text, body = compiled.as_text(), traced.jaxpr.jaxpr
    beyond = grids.beyond_operands(body)
    analysis: Any = compiled.cost_analysis()
    counted = {
        "batch_size": network.batch,
        "floor": floor(network, state, dtype, which),
        "accessed": int(analysis["bytes accessed"])
        + sum(map(grids.fetched_and_written, grids.kernels(body))),
        "memory": hlo.memory_traffic(text) + beyond,
        "memory_padded": hlo.memory_traffic(text, padded=True) + beyond,
        "compile_seconds": seconds,
        "compile_processor_seconds": processor,
    }
    return counted, text


HEADER = (
    f"{'':29} {'floor':>8} {'accessed':>9} {'ratio':>6} {'memory':>8} {'ratio':>6} {'padded':>8} "
    f"{'compiled in':>12}"
)


def line(name: str, result: dict[str, Any]) -> str:
    """Returns a row of the table, in megabytes per image and processor seconds."""
    least, accessed, memory, padded = (
        result[key] / result["batch_size"] / 1e6
        for key in ("floor", "accessed", "memory", "memory_padded")
    )
    return (
        f"{name:29} {least:8.3f} {accessed:9.3f} {accessed / least:6.2f} {memory:8.3f} "
        f"{memory / least:6.2f} {padded:8.3f} {result['compile_processor_seconds']:10.0f} s"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_bytes",
        description="Bytes that every family's compiled programs move on a v5e, against the least "
        "that they must. Nothing is run.",
    )
    add_rows(parser, "'*/inference'")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--programs", metavar="FOLDER", type=Path, help="write the compiled programs as text there"
    )
    add_json(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    chosen = [row for row in ROWS if any(fnmatch.fnmatchcase(row, p) for p in options.only)]
    if options.list:
        print("\n".join(chosen))
        return 0
    if importlib.util.find_spec("libtpu") is None:
        print('benchmarks.tpu_bytes: needs a TPU\'s compiler: pip install "jax[tpu]"')
        return 2
    try:
        _, devices = chips.devices(TOPOLOGY)
    except UserError as error:
        print(f"benchmarks.tpu_bytes: {error}", file=sys.stderr)
        return 2
    mesh = jax.sharding.Mesh(np.array(devices[:1]), (BATCH_AXIS,))
    # A program for a TPU cannot be read back from the cache without one.
    jax.config.update("jax_enable_compilation_cache", False)
    report: dict[str, Any] = {"rows": {}}
    if options.json and options.json.exists():  # adds the rows of this call to those that are there
        report = json.loads(options.json.read_text())
    report["host"] = host()
    report["versions"] = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    report["topology"] = TOPOLOGY
    print(f"v5e, {options.dtype}, megabytes per image\n{HEADER}", flush=True)
    for row in chosen:
        name, _, program = row.partition("/")
        result, text = measure(NETWORKS[name], options.dtype, program, mesh)
        if options.programs:
            options.programs.mkdir(parents=True, exist_ok=True)
            (options.programs / f"{name}-{program}-{options.dtype}.txt").write_text(text)
        report["rows"][f"{row}/{options.dtype}"] = result
        print(line(row, result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    ratios = {
        name: result["accessed"] / result["floor"]
        for name, result in report["rows"].items()
        if "/inference/" in name
    }
    over = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio > TARGET]
    print(f"inference within {TARGET} of the floor: {len(ratios) - len(over)} of {len(ratios)}")
    if over:
        print("above: " + ", ".join(over))
    return 0


if __name__ == "__main__":
    sys.exit(main())
