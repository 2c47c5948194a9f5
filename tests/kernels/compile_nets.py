"""Whole networks through the compilers for devices that are not here: `make compile-check`.

    python -m tests.kernels.compile_nets

Compiles inference and training steps of ShiftResNet20, expansion 9, batch 512, for one v5e or v6e
by libtpu, with the kernels and in plain XLA, and prints the bytes that each moves: the compiler's
count, and beside it what the kernels' grids move, which the compiler does not count. Exits with 1
where a program does not compile or moves more than it should. `--all` does every combination.
"""

import functools
import itertools
import os
import sys
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

import shiftnet.config
from shiftnet.kernels import implementations
from shiftnet.training.step import Program
from tests.kernels.test_tpu_compile import fetched_and_written, kernels

BATCH = 512
INFERENCE_BYTES_PER_IMAGE = 2e6  # at most, in float32
TRAINING_SHARE = 1 / 3  # of plain XLA's bytes, at most, in the same dtype
CHIPS, DTYPES, PROGRAMS = ("v5e", "v6e"), ("float32", "bfloat16"), ("inference", "training")
SOME = [
    ("v5e", "float32", "inference"),
    ("v5e", "bfloat16", "training"),
    ("v6e", "bfloat16", "inference"),
]


def program(dtype: str, which: str, mesh: jax.sharding.Mesh):
    """A function and its abstract operands."""
    config = shiftnet.config.default_config()
    config.model.arch, config.model.expansion, config.model.dtype = "shiftresnet20", 9.0, dtype
    config.batch_size = BATCH
    program = Program(
        config, num_classes=100, mean=(0, 0, 0), std=(1, 1, 1), steps_per_epoch=97, mesh=mesh
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(tree):
        make = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
        return jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), tree)

    state = abstract(jax.eval_shape(program._init, np.int32(0)))
    images = abstract(jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32))
    if which == "training":
        return program.update, (state, images, abstract(jax.ShapeDtypeStruct((BATCH,), jnp.int32)))

    def infer(params, stats, images):
        return nnx.merge(program.graphdef, params, stats)(images)

    return infer, (state.params, state.stats, images)


def moved(f, operands, context) -> tuple[float, float, float]:
    """Bytes that the compiler counts, bytes of the kernels' grids, and seconds to compile."""

    def traced(*operands):  # a function of its own, which JAX has not traced yet
        with context:
            return f(*operands)

    start = time.perf_counter()
    lowered = jax.jit(traced).trace(*operands)
    counted = lowered.lower(lowering_platforms=("tpu",)).compile().cost_analysis()
    grids = sum(map(fetched_and_written, kernels(lowered.jaxpr.jaxpr)))
    return counted["bytes accessed"], grids, time.perf_counter() - start


def main() -> int:
    failed = False
    everything = list(itertools.product(CHIPS, DTYPES, PROGRAMS))
    for chip, dtype, which in everything if "--all" in sys.argv[1:] else SOME:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
        mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
        f, operands = program(dtype, which, mesh)
        around, grids, seconds = moved(f, operands, implementations.lowered_for("tpu"))
        plain, _, _ = moved(f, operands, implementations.only_xla())
        ours, per_image = around + grids, 1 / BATCH / 1e6
        limit = TRAINING_SHARE * plain
        if which == "inference":
            limit = BATCH * INFERENCE_BYTES_PER_IMAGE * jnp.dtype(dtype).itemsize / 4
        failed |= ours > limit
        print(
            f"{chip} {dtype:8} {which:9} {ours * per_image:6.2f} MB an image "
            f"({grids * per_image:.2f} of it in kernels), plain XLA {plain * per_image:6.2f}, "
            f"ratio {ours / plain:.3f}; limit {limit * per_image:.2f}: "
            f"{'ok' if ours <= limit else 'TOO MUCH'}; compiled in {seconds:.0f} s",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
