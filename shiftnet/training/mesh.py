"""Where arrays live: the one place that decides it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shiftnet.errors import UserError
from shiftnet.kernels.implementations import compiler_options

BATCH_AXIS = "data"
# Below this many values an array is not worth dividing: it costs a message to each device whatever
# its size.
FSDP_SIZE = 2**14


def make_mesh(batch_size: int | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices in a row; the batch is divided along it (data parallel).

    Args:
      batch_size: what the devices must divide evenly; None: not checked.
      devices: None: all devices of all processes.

    Raises:
      UserError: where `batch_size` is given and does not divide evenly over the devices.
    """
    devices = jax.devices() if devices is None else devices
    if batch_size is not None and batch_size % len(devices):
        raise UserError(
            f"batch_size {batch_size} does not divide over {len(devices)} devices; "
            f"the nearest that do are {_nearest_multiples(batch_size, len(devices))}"
        )
    return Mesh(np.array(devices), (BATCH_AXIS,))


def _nearest_multiples(size: int, divisor: int) -> str:
    below = size // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device: parameters, statistics, the data set, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def parameters_sharded(tree: Any, mesh: Mesh) -> Any:
    """Where each array of a state goes that is divided over the devices (FSDP).

    Along the longest axis that divides evenly; whole onto every device where there is none, or
    where the array has fewer than `FSDP_SIZE` values.
    """

    def of(leaf: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if math.prod(leaf.shape) < FSDP_SIZE or not even:
            return replicated(mesh)
        axis = max(even, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))

    return jax.tree.map(of, tree)


def compiled(
    function: Callable[..., Any], mesh: Mesh, out_shardings: Any = None, **options: Any
) -> Any:
    """`jax.jit` of a function as XLA does it best there.

    Its results go whole to every device where `out_shardings` does not say otherwise.
    """
    return jax.jit(
        function,
        out_shardings=replicated(mesh) if out_shardings is None else out_shardings,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
        **options,
    )


def compiled_quickly(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Any:
    """`jax.jit` of a function that runs seldom: on a CPU compiling takes longer than running.

    Like all that is compiled with options, it cannot be called while another function is traced.

    Without LLVM's optimisation the draw of ShiftResNet8 compiles in 1.3 s in place of 5.0 s, that
    of WRN-8 in 1.8 s in place of 11 s (2 cores).
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    quickly = {"xla_backend_optimization_level": 0} if on_cpu else {}
    return jax.jit(function, compiler_options=quickly, **options)


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts a host array, the same in every process, whole onto every device."""
    return jax.make_array_from_process_local_data(replicated(mesh), array)


def shard_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Joins the shares of a batch that each process has, and divides it over the devices."""
    return jax.make_array_from_process_local_data(batch_sharded(mesh), array)
