"""The context that selects implementations: the platform, the mesh, and `only_xla`.

All three are part of `jax.jit`'s cache key, so a function is retraced when one of them changes: the
platform and `only_xla` are JAX user contexts, and the mesh is JAX's own.
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
    """Selects plain XLA in programs traced in this context, unless a call names an implementation.

    For programs that must run on any device, such as exported ones, and for comparisons. The
    environment variable SHIFTNET_ONLY_XLA=1 does the same for a whole process.
    """
    return _only_xla(True)


def is_only_xla() -> bool:
    """Returns whether `only_xla` is active."""
    return _only_xla.value


def lowered_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """Selects those for `platform` in programs traced in this context.

    For compiling for a device that is not attached, and for conversion to ONNX. Without it, they
    are those of JAX's default device.

    Args:
      platform: "cpu", "tpu", "gpu" or "onnx".
    """
    return _platform(platform)


def is_lowered_for(platform: str) -> bool:
    """Returns whether `lowered_for(platform)` is active."""
    return _platform.value == platform


def platform() -> str:
    """Returns the platform that implementations are selected for, see `lowered_for`."""
    return _platform.value or jax.default_backend()


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """Returns the `compiler_options` for `jax.jit` of a program for this platform.

    On a CPU they select YNNPACK for reductions and convolutions but not for matrix products. For
    products with 16 to 96 inputs XLA's other library took 0.24 ms and YNNPACK 0.6 ms (32,768
    pixels, 16 to 48 channels, 2 cores); a training step of ShiftResNet20 took 0.28 s instead of
    0.30 s, and inference 0.055 s instead of 0.061 s.
    """
    if platform != "cpu":
        return {}
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_REDUCE"
    options = {"xla_cpu_experimental_ynn_fusion_type": kinds}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # experimental: a later XLA may not have the option
        return {}
    return options


class Division(NamedTuple):
    """How a batch is sharded over the devices of a mesh.

    Attributes:
      mesh: the mesh.
      axes: names of the mesh axes that the batch is sharded over; empty if it is replicated.
      free: names of the mesh axes that are not manual (those of an enclosing `jax.shard_map` are).
    """

    mesh: AbstractMesh
    axes: tuple[str, ...]
    free: frozenset[str]


def division(x: Any) -> Division | None:
    """Returns how the first axis of `x` is sharded; None without a mesh of several devices.

    The mesh is that of the type of `x`, which comes from the sharding of the program's arguments,
    or else the one of `jax.set_mesh`. With explicit axes the type of `x` says which of them shard
    the batch; otherwise it is assumed to be the first one, if its size divides the batch.
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
    """Returns the number of images of a batch `x` on each device."""
    found = division(x)
    return len(x) // math.prod(found.mesh.shape[axis] for axis in found.axes) if found else len(x)
