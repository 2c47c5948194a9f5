"""A two-dimensional convolution without bias."""

from typing import Literal

import jax

from shiftnet.kernels import checks
from shiftnet.kernels.conv import cpu, xla
from shiftnet.kernels.operation import Kernel, Operation

__all__ = ["Implementation", "conv"]

Implementation = Literal["xla", "cpu"]


def conv(
    x: jax.Array,
    w: jax.Array,
    *,
    stride: int = 1,
    groups: int = 1,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Convolves images with a square kernel of odd size k, zero-padded by k // 2 on every side.

    Args:
      x: `[N, H, W, C]`, floating.
      w: `[k, k, C / groups, K]`, k odd, in the dtype of `x`.
      stride: in pixels, along both axes.
      groups: number of groups that the channels of `x` and of the result are divided into: 1, C for
        a depthwise convolution, or any other divisor of both C and K.
      implementation: `"cpu"` is C++ for float32, compiled at its first use; `"xla"` is plain XLA.
        None selects `"cpu"` on a CPU if it supports the arguments and a compiler was found, else
        `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]` in the dtype of `x`.

    Raises:
      ValueError: if shapes or dtypes do not match, `stride` or `groups` is not an integer of at
        least 1, or `implementation` is unknown or does not support the arguments.
    """
    if not checks.is_whole(stride, groups):
        raise ValueError(
            f"conv needs a whole stride and groups of at least 1, got {stride} and {groups}"
        )
    if (
        x.ndim != 4
        or w.ndim != 4
        or w.shape[0] != w.shape[1]
        or w.shape[0] % 2 == 0
        or w.shape[2] * groups != x.shape[3]
        or w.shape[3] % groups != 0
    ):
        raise ValueError(
            "conv needs x [N, H, W, C] and w [k, k, C / groups, K] with an odd k and groups that "
            f"divide K, got x {x.shape}, w {w.shape} and {groups} groups"
        )
    checks.same_dtype("conv", x, w=w)
    return OPERATION(x, w, stride=stride, groups=groups, implementation=implementation)


OPERATION = Operation(
    "conv",
    xla.forward,
    {"cpu": Kernel(cpu.forward, cpu.backward, cpu.unsupported)},
    images=(True, False),
)
