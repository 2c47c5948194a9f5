"""Compiles the packed product's GPU kernel for an H200 on a machine without one.

    python -m tests.benchmarks.compile_packed_gpu

It needs `jax[cuda13]` and `absl-py`, in an environment of their own. Prints a line for each kernel
that does not compile, and exits with 1 if there is one.
"""

import os
import pathlib
import sys

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver here to check against

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks.packed_matmul import PackedMatrix, gpu
from benchmarks.packed_matmul.packed import Encoding
from shiftnet.planning import plan

LEVELS = {
    "Sign": (-1.0, 1.0),
    "S3 2": (-1.0, 0.0, 1.0),
    "DenseShift 2": (-2.0, -1.0, 1.0, 2.0),
    "S3 3": (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
    "DenseShift 3": (-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0),
    "S3 4": (0.0, *(sign * 2.0**i for i in range(7) for sign in (1, -1))),
    "DenseShift 4": tuple(sign * 2.0**i for i in range(8) for sign in (1, -1)),
}
# Rows, inputs, outputs, dtype: a tile, wide tiles, shared inputs, parts of groups, most rows.
SHAPES = [
    (1, 4096, 8192, "bfloat16"),
    (16, 4096, 28672, "bfloat16"),
    (16, 8192, 4096, "bfloat16"),
    (3, 1000, 500, "float32"),
    (64, 4096, 8192, "bfloat16"),
    (64, 4096, 34048, "bfloat16"),
]


def main() -> int:
    target = pathlib.Path(plan.__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
    device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    failed = 0
    for form, levels in LEVELS.items():
        bits = Encoding.of(levels).bits
        for rows, inputs, outputs, dtype in SHAPES:
            columns = -(-outputs // 128) * 128
            word_rows = -(-inputs // 256) * 8 * bits
            packed = PackedMatrix(
                jax.ShapeDtypeStruct((word_rows, columns), jnp.int32, sharding=device),
                jax.ShapeDtypeStruct((columns,), jnp.float32, sharding=device),
                (inputs, outputs),
                levels,
            )
            x = jax.ShapeDtypeStruct((rows, inputs), dtype, sharding=device)
            try:
                jax.jit(lambda x, packed: gpu.matmul(x, packed)).lower(x, packed).compile()
            except Exception as error:
                failed += 1
                reason = str(error).strip().splitlines()[0]
                print(f"packed_matmul {form} {rows}x{inputs}x{outputs} {dtype}: {reason}")
    compiled = len(LEVELS) * len(SHAPES) - failed
    print(f"{compiled} kernels compiled for {topology.devices[0].device_kind}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
