"""Operations over all pixels of a batch that have a kernel in C++: which implementation runs.

Unlike an `Operation`, they return several arrays, and each result needs the whole batch, so that
the kernel does not run where a batch is divided over devices.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from shiftnet.kernels import implementations, native
from shiftnet.kernels.operation import differentiable, record

Implementation = Literal["xla", "cpu"]


def choose(name: str, x: jax.Array, implementation: str | None) -> Implementation:
    """Returns the implementation of an operation, and records it for `choices`.

    Args:
      name: of the operation.
      x: the batch, `[..., C]`.
      implementation: what the call asks for; None selects `"cpu"` on a CPU if it supports the
        batch, else `"xla"`.

    Raises:
      ValueError: if it is unknown, or is `"cpu"` and does not support the batch.
    """
    if implementation not in (None, "xla", "cpu"):
        raise ValueError(f"unknown implementation {implementation!r} of {name}; known: xla, cpu")
    platform = implementations.platform()
    reason = None
    if implementation == "xla" or (implementation is None and implementations.is_only_xla()):
        reason = "it is asked for"
    elif implementation is None and platform != "cpu":
        reason = f"it has no {platform} kernel"
    else:
        reason = _unsupported(x)
        if reason and implementation:
            raise ValueError(f"{name} has no 'cpu' for this: {reason}")
    record(f"{name}: " + (f"xla, since {reason}" if reason else "cpu"))
    return "xla" if reason else "cpu"


def _unsupported(x: jax.Array) -> str | None:
    """Returns why the kernels do not support a batch, in one clause, or None."""
    if not all(isinstance(size, int) for size in x.shape):
        return "a size is left open"
    if x.size == 0:
        return "there are no pixels"
    if implementations.division(x) is not None:
        return "the batch is divided over devices"
    return native.unsupported(x.dtype)


def either(
    kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any, always: bool = False
) -> Any:
    """Runs the kernel, on a CPU only where the program may be lowered for another device.

    Args:
      kernel: of the arrays; its derivatives are those of `plain`.
      plain: likewise, in plain XLA.
      arrays: what both take.
      always: whether the kernel was asked for.
    """
    kernel = differentiable(kernel, plain)
    if always:
        return kernel(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=kernel, default=plain)
