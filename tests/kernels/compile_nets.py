"""Whole networks through the compilers for devices that are not here: `make compile-check`.

    python -m tests.kernels.compile_nets [--all]

Compiles inference and a training step of ShiftResNet20, expansion 9, batch 512, for one v5e or v6e
by libtpu, and prints the bytes that each moves: the compiler's count, and with it what the kernels'
grids move, which the compiler does not count. Exits with 1 where a program does not compile or
moves more than it should. `--all` does every combination, and the same in plain XLA (minutes).
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
# At most, an image, in float32: for training a third of what plain XLA moves (91.3 MB by libtpu
# 0.0.48 for a v5e).
MEGABYTES = {"inference": 2.0, "training": 30.4}
CHIPS, DTYPES, PROGRAMS = ("v5e", "v6e"), ("float32", "bfloat16"), ("inference", "training")
SOME = [
    ("v5e", "float32", "inference"),
    ("v5e", "float32", "training"),
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
    failed, everything = False, "--all" in sys.argv[1:]
    for chip, dtype, which in itertools.product(CHIPS, DTYPES, PROGRAMS) if everything else SOME:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
        mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
        f, operands = program(dtype, which, mesh)
        around, grids, seconds = moved(f, operands, implementations.lowered_for("tpu"))
        ours = (around + grids) / BATCH / 1e6
        limit = MEGABYTES[which] * jnp.dtype(dtype).itemsize / 4
        failed |= ours > limit
        print(
            f"{chip} {dtype:8} {which:9} {ours:6.2f} MB an image ({grids / BATCH / 1e6:.2f} of it "
            f"in kernels), at most {limit:.2f}: {'ok' if ours <= limit else 'TOO MUCH'}; compiled "
            f"in {seconds:.0f} s",
            end="",
            flush=True,
        )
        if everything:
            plain = moved(f, operands, implementations.only_xla())[0] / BATCH / 1e6
            print(f"; plain XLA {plain:.2f}, ratio {ours / plain:.3f}", end="")
        print()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
