"""What decides which program is traced: the platform, the mesh, and whether kernels are wanted.

All of it is part of `jax.jit`'s cache key, so that a function traced before is traced anew where
one of them differs: the first and the last are JAX's user contexts, and the mesh is JAX's own.
"""

import contextlib
import functools
import math
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

_only_xla: Any = jax.make_user_context(os.environ.get("SHIFTNET_ONLY_XLA", "") not in ("", "0"))
_platform: Any = jax.make_user_context(None)


def only_xla() -> contextlib.AbstractContextManager[None]:
    """While a program is traced within, no operation takes a kernel unless it is asked for.

    For programs that must run on any device (exported ones), and for comparisons. The environment's
    SHIFTNET_ONLY_XLA=1 does the same to a whole process.
    """
    return _only_xla(True)


def is_only_xla() -> bool:
    """Whether this is within `only_xla`."""
    return _only_xla.value


def lowered_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """While a program is traced within, it is laid out for a platform, or for a runtime of ONNX.

    For compiling for a device that is not here, and for conversion; without it, for JAX's default
    device.

    Args:
      platform: "cpu", "tpu", "gpu" or "onnx".
    """
    return _platform(platform)


def is_lowered_for(platform: str) -> bool:
    """Whether this is within `lowered_for(platform)`."""
    return _platform.value == platform


def platform() -> str:
    """The platform that programs are laid out for: "cpu", "tpu", "gpu" or "onnx"."""
    return _platform.value or jax.default_backend()


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """What `jax.jit` tells XLA, as its `compiler_options`, about a program for this platform.

    On a CPU: to take YNNPACK for sums and convolutions but not for matrix products. With 16 to 96
    inputs a product, XLA's other library took 0.24 ms where YNNPACK took 0.6 ms (32,768 pixels, 16
    to 48 channels, 2 cores), a training step of ShiftResNet20 0.28 s in place of 0.30 s, inference
    0.055 s in place of 0.061 s.
    """
    if platform != "cpu":
        return {}
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_REDUCE"
    options = {"xla_cpu_experimental_ynn_fusion_type": kinds}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # an experimental option, which a later XLA may not know
        return {}
    return options


class Division(NamedTuple):
    """How a batch lies on the devices of a mesh.

    Attributes:
      mesh: the mesh.
      axes: its axes that the batch is divided over; none where every device has the whole batch.
      free: its axes that are not manual already, as they are within a `jax.shard_map`.
    """

    mesh: AbstractMesh
    axes: tuple[str, ...]
    free: frozenset[str]


def division(x: Any) -> Division | None:
    """How the first axis of `x` is divided over devices; None where there is one device, or none.

    The mesh is that of the type of `x`, which it has from the sharding of a program's arguments, or
    else the one of `jax.set_mesh`. A mesh with explicit axes knows which of them divide the batch;
    otherwise the first one is taken to, if it does so evenly.
    """
    sharding = jax.typeof(x).sharding
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh.empty else sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [name for name, kind in kinds.items() if kind != AxisType.Manual]
    if all(mesh.shape[name] == 1 for name in free):
        return None
    if AxisType.Explicit in kinds.values():
        of_batch = sharding.spec[0] if len(sharding.spec) else None
        axes = of_batch if isinstance(of_batch, tuple) else (of_batch,) if of_batch else ()
    else:
        batch = x.shape[0]
        even = isinstance(batch, int) and batch % mesh.shape[free[0]] == 0
        axes = (free[0],) if even else ()
    return Division(mesh, axes, frozenset(free))


def local_batch(x: Any) -> int:
    """How many images of a batch `x` one device has."""
    found = division(x)
    return len(x) // math.prod(found.mesh.shape[axis] for axis in found.axes) if found else len(x)
