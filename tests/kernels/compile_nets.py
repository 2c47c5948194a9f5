"""Whole networks through the compilers for devices that are not here: `make compile-check`.

    python -m tests.kernels.compile_nets [--all]

Compiles inference and a training step of networks for one v5e or v6e by libtpu, and prints the
bytes that each moves: the compiler's count, and with it what the kernels' grids move, which the
compiler does not count. Exits with 1 where a program does not compile or moves more than it should.
`--all` does every combination, and the same in plain XLA (very long).
"""

import functools
import itertools
import os
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

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
from shiftnet.planning import grids
from shiftnet.training.step import Program


class Net(NamedTuple):
    """A network, and what a step of it may move.

    Attributes:
      arch: as `model.arch`.
      expansion: as `model.expansion`.
      batch: images.
      size: of an image, in pixels.
      megabytes: an image, at most, in float32.
    """

    arch: str
    expansion: float
    batch: int
    size: int
    megabytes: Mapping[str, float]


# Plain XLA moves 12.2 and 91.3 MB, by libtpu 0.0.48 for a v5e.
SHIFTRESNET = Net("shiftresnet20", 9.0, 512, 32, {"inference": 2.0, "training": 16.0})
# Plain XLA moves 180 and 770 MB, and 493 MB in training in bfloat16.
SHIFTNET = Net("shiftnet_a", 1.0, 128, 224, {"inference": 70, "training": 520})
NETS, CHIPS = (SHIFTRESNET, SHIFTNET), ("v5e", "v6e")
DTYPES, PROGRAMS = ("float32", "bfloat16"), ("inference", "training")
SOME = [
    (SHIFTRESNET, "v5e", "float32", "inference"),
    (SHIFTRESNET, "v5e", "float32", "training"),
    (SHIFTRESNET, "v6e", "bfloat16", "inference"),
    (SHIFTNET, "v5e", "float32", "inference"),
]


def program(net: Net, dtype: str, which: str, mesh: jax.sharding.Mesh):
    """A function and its abstract operands."""
    config = shiftnet.config.default_config()
    config.model.arch, config.model.expansion, config.model.dtype = net.arch, net.expansion, dtype
    config.batch_size = net.batch
    program = Program(
        config, num_classes=100, mean=(0, 0, 0), std=(1, 1, 1), steps_per_epoch=97, mesh=mesh
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(tree):
        make = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
        return jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), tree)

    state = abstract(jax.eval_shape(program.draw, np.uint32(0)))
    images = abstract(jax.ShapeDtypeStruct((net.batch, net.size, net.size, 3), jnp.float32))
    if which == "training":
        return program.update, (
            state,
            images,
            abstract(jax.ShapeDtypeStruct((net.batch,), jnp.int32)),
        )

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
    in_kernels = sum(map(grids.fetched_and_written, grids.kernels(lowered.jaxpr.jaxpr)))
    return counted["bytes accessed"], in_kernels, time.perf_counter() - start


def main() -> int:
    failed, everything = False, "--all" in sys.argv[1:]
    every = itertools.product(NETS, CHIPS, DTYPES, PROGRAMS)
    for net, chip, dtype, which in every if everything else SOME:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
        mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
        f, operands = program(net, dtype, which, mesh)
        around, inside, seconds = moved(f, operands, implementations.lowered_for("tpu"))
        ours, inside = (around + inside) / net.batch / 1e6, inside / net.batch / 1e6
        limit = net.megabytes[which] * jnp.dtype(dtype).itemsize / 4
        failed |= ours > limit
        print(
            f"{net.arch:13} {chip} {dtype:8} {which:9} {ours:6.2f} MB an image ({inside:.2f} of it "
            f"in kernels), at most {limit:.2f}: {'ok' if ours <= limit else 'TOO MUCH'}; compiled "
            f"in {seconds:.0f} s",
            end="",
            flush=True,
        )
        if everything:
            plain = moved(f, operands, implementations.only_xla())[0] / net.batch / 1e6
            print(f"; plain XLA {plain:.2f}, ratio {ours / plain:.3f}", end="")
        print()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
