"""Where arrays live: the one place that decides it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shiftnet.errors import UserError
from shiftnet.kernels.implementations import compiler_options

BATCH_AXIS = "data"


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


def compiled(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Any:
    """`jax.jit` of a function whose results go whole to every device, as XLA does it best there."""
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        function,
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(platform),
        **options,
    )


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts a host array, the same in every process, whole onto every device."""
    return jax.make_array_from_process_local_data(replicated(mesh), array)


def shard_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Joins the shares of a batch that each process has, and divides it over the devices."""
    return jax.make_array_from_process_local_data(batch_sharded(mesh), array)
