"""The chips that can be planned for: their makers' figures, and topologies to compile for."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from shiftnet.errors import UserError


class Chip(NamedTuple):
    """A kind of device, by its maker's figures.

    Attributes:
      kind: JAX's name for such a device (`device_kind`).
      platform: JAX's name for the platform to lower for.
      kernels: the name that `implementations.lowered_for` has for it.
      memory: in bytes.
      flops: peak floating-point operations per second of its matrix units, by
        `config.model.dtype`.
      memory_bandwidth: in bytes per second.
      link_bandwidth: bytes per second that it sends to other devices, over all its links.
      topologies: the sizes that can be planned for, with their number of devices.
      install: the module that has its compiler, and pip's name for it.
    """

    kind: str
    platform: str
    kernels: str
    memory: float
    flops: Mapping[str, float]
    memory_bandwidth: float
    link_bandwidth: float
    topologies: Mapping[str, int]
    install: tuple[str, str]


_SIDES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SLICES = {sides: math.prod(map(int, sides.split("x"))) for sides in _SIDES}
_ONE_MACHINE = {"1": 1, "2": 2, "4": 4, "8": 8}  # NVLink connects no more GPUs
_LIBTPU = ("libtpu", "jax[tpu]")
_CUDA = ("jax_cuda13_plugin", "jax[cuda13]")
_HOPPER_FLOPS = {"float32": 989e12 / 2, "bfloat16": 1979e12 / 2}

# TPUs: "TPU v5e" and "TPU v6e" in Google's Cloud TPU documentation (cloud.google.com/tpu/docs/v5e
# and /v6e, System architecture): memory and its bandwidth, peak bfloat16 compute, and half of the
# bidirectional inter-chip bandwidth (256 times which is that page's all-reduce bandwidth of a pod).
# JAX's default precision multiplies float32 in one bfloat16 pass there, hence the same peak.
# GPUs: NVIDIA's datasheets for H100 SXM and H200 SXM: memory and its bandwidth, half of the TF32
# and bfloat16 peaks (which assume sparsity), and half of NVLink's bandwidth (which counts both
# directions). JAX's default precision multiplies float32 in TF32 there.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        kind="TPU v5 lite",
        platform="tpu",
        kernels="tpu",
        memory=16e9,
        flops={"float32": 197e12, "bfloat16": 197e12},
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        topologies=_SLICES,
        install=_LIBTPU,
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        platform="tpu",
        kernels="tpu",
        memory=32e9,
        flops={"float32": 918e12, "bfloat16": 918e12},
        memory_bandwidth=1638e9,
        link_bandwidth=400e9,
        topologies=_SLICES,
        install=_LIBTPU,
    ),
    "h100": Chip(
        kind="NVIDIA H100 80GB HBM3",
        platform="cuda",
        kernels="gpu",
        memory=80e9,
        flops=_HOPPER_FLOPS,
        memory_bandwidth=3350e9,
        link_bandwidth=450e9,
        topologies=_ONE_MACHINE,
        install=_CUDA,
    ),
    "h200": Chip(
        kind="NVIDIA H200",
        platform="cuda",
        kernels="gpu",
        memory=141e9,
        flops=_HOPPER_FLOPS,
        memory_bandwidth=4800e9,
        link_bandwidth=450e9,
        topologies=_ONE_MACHINE,
        install=_CUDA,
    ),
}


# Do not query a metadata server for the kind of machine, and let other processes load libtpu too.
_LIBTPU_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str) -> tuple[Chip, Sequence[jax.Device]]:
    """Returns a topology's chip, and its devices, to compile for and not to run on.

    Args:
      name: the topology, such as `"v5e:4x4"`.

    Raises:
      UserError: if the compiler for such devices is not installed.
    """
    kind, _, size = name.partition(":")
    chip = CHIPS[kind]
    module, package = chip.install
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"planning for {name} needs the compiler for such devices (not the devices): "
            f'pip install "{package}"'
        )
    if chip.platform == "tpu":
        for variable, value in _LIBTPU_WITHOUT_TPU.items():
            os.environ.setdefault(variable, value)
        host = {"chips_per_host_bounds": (1, 1, 1)} if size == "1x1" else {}
        return chip, topologies.get_topology_desc(name, platform="tpu", **host).devices
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver to check
    return chip, topologies.get_topology_desc(
        platform="cuda",
        topology=f"1x1x{size}",
        target_config=Path(__file__).with_name(f"{kind}.txtpb").read_text(),
    ).devices
