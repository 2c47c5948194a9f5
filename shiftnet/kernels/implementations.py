"""Which implementation of an operation runs.

Every operation has a plain XLA form, which takes whatever the operation takes, and kernels for some
devices, each of which takes some arguments. The choice is made when a program is traced, between
the kernel of the platform that the program is laid out for and plain XLA, which also serves where
the program is lowered for another platform after all.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from shiftnet.kernels.layouts import LANES, Layout

# Why an implementation cannot take some arguments; None when it can.
Reason = Callable[[], str | None]

_PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}
_only_xla = ContextVar(
    "_only_xla", default=os.environ.get("SHIFTNET_ONLY_XLA", "") not in ("", "0")
)
_platform: ContextVar[str | None] = ContextVar("_platform", default=None)
_mesh: ContextVar[Mesh | None] = ContextVar("_mesh", default=None)


def needs_hwcn() -> str | None:
    """Why a kernel cannot take NHWC."""
    return "the layout is NHWC, the kernel needs HWCN"


def needs_nhwc() -> str | None:
    """Why a kernel cannot take HWCN."""
    return "the layout is HWCN, the kernel needs NHWC"


@contextlib.contextmanager
def only_xla() -> Iterator[None]:
    """While a program is traced within, no operation takes a kernel unless it is asked for.

    Networks then call their layers one by one.

    For programs that must run on any device (`shiftnet.cli.export`), and for comparisons. JAX keeps
    what it traced: trace a function of its own within, not one that was called before. The
    environment's SHIFTNET_ONLY_XLA=1 does the same to a whole process.
    """
    token = _only_xla.set(True)
    try:
        yield
    finally:
        _only_xla.reset(token)


def is_only_xla() -> bool:
    """Whether this is within `only_xla`."""
    return _only_xla.get()


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """While a program is traced within, it is laid out for `platform`: "cpu", "tpu" or "gpu".

    For compiling for a device that is not here; without it, for JAX's default device.
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def is_lowered_for(platform: str) -> bool:
    """Whether this is within `lowered_for(platform)`."""
    return _platform.get() == platform


def platform() -> str:
    """What programs are laid out for: "cpu", "tpu" or "gpu"."""
    return _platform.get() or jax.default_backend()


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


def best_layout(batch: int) -> Layout:
    """The layout for a net of shifts.

    HWCN on a TPU, where `batch` fills the lanes on every device (NHWC would pad 16 channels to 128
    lanes), and NHWC elsewhere. On a CPU HWCN in plain XLA took 1.9 to 3.6 times as long as NHWC in
    plain XLA, 2.4 to 4.2 times as long as in our form (blocks of ShiftResNet20, forward and
    backward, 128 images, expansions 3 and 9, 2 cores). On Hopper only NHWC has kernels; HWCN was
    not tried.
    """
    return "HWCN" if platform() == "tpu" and shares(batch) % LANES == 0 else "NHWC"


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
    """While a program is traced within, operations run on every device of `mesh` by itself.

    The compiler, which divides everything else over the devices by itself, cannot look into a
    kernel, and would hand each device the whole batch.

    Args:
      mesh: of one axis, over which the batch is divided evenly.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def shares(batch: int) -> int:
    """How many of `batch` images an operation sees at once."""
    mesh = _mesh.get()
    return batch if mesh is None else batch // mesh.size


def on_shares(
    call: Callable[..., Any], operands: Sequence[Any], axes: Sequence[int | None], out_axes: Any
) -> Any:
    """Calls an operation on each device's share of the batch.

    Args:
      call: the operation, from `operands` to its results.
      operands: arrays, or trees of them.
      axes: of each operand the axis of its batch, None where every device has the whole of it.
      out_axes: of each result likewise; results without a batch are added up over the devices.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return call(*operands)
    (name,) = mesh.axis_names

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)

    def on_one(*operands: Any) -> Any:
        results = call(*operands)
        if not isinstance(out_axes, tuple):
            return results
        return tuple(
            jax.lax.psum(result, name) if axis is None else result
            for result, axis in zip(results, out_axes, strict=True)
        )

    return jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=tuple(map(spec, axes)),
        out_specs=jax.tree.map(spec, out_axes, is_leaf=lambda axis: axis is None),
        check_vma=False,
    )(*operands)


def run(
    operation: str,
    implementation: str | None,
    calls: Mapping[str, Callable[..., Any]],
    unsupported: Mapping[str, Reason],
    *operands: Any,
) -> Any:
    """Runs an operation by one of its implementations.

    Args:
      operation: its name, for errors.
      implementation: which; None takes the device's kernel where that supports the arguments, and
        "xla" elsewhere.
      calls: the implementations; "xla", "cpu", "tpu" and "gpu" are known to None.
      unsupported: of the implementations that do not take everything.
      *operands: what each of `calls` is called with.

    Raises:
      ValueError: for an implementation that does not exist, or cannot take the arguments.
    """
    sizes = [size for array in jax.tree.leaves(operands) for size in array.shape]

    def why_not(name: str) -> str | None:
        if name not in unsupported:
            return None
        if not all(isinstance(size, int) for size in sizes):
            return "a size is left open"
        wide = name != "cpu" and jax.config.read("jax_enable_x64")
        return unsupported[name]() or ("JAX is in its 64-bit mode" if wide else None)

    if implementation is not None:
        if implementation not in calls:
            raise ValueError(
                f"unknown implementation {implementation!r} of {operation}; "
                f"known: {', '.join(calls)}"
            )
        if reason := why_not(implementation):
            raise ValueError(f"{operation} has no {implementation!r} for this: {reason}")
        return _differentiable(calls[implementation], calls["xla"])(*operands)
    if is_only_xla():
        return calls["xla"](*operands)
    # The others are not even traced. The program may still be lowered for the CPU of this machine.
    here = platform()
    if here not in calls or why_not(here) is not None:
        return calls["xla"](*operands)
    if here == jax.default_backend() != "cpu":
        from shiftnet.kernels import selftest  # which runs operations

        if operation in selftest.failures(here):
            return calls["xla"](*operands)
    kernel = {_PLATFORMS[here]: _differentiable(calls[here], calls["xla"])}
    return jax.lax.platform_dependent(*operands, **kernel, default=calls["xla"])


def _differentiable(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, with the derivatives of `plain`.

    An operation's gradient is its own; these are the second derivatives, through what that runs.
    """
    call = jax.custom_jvp(kernel)

    @call.defjvp
    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        return call(*primals), jax.jvp(plain, primals, tangents)[1]

    return call
