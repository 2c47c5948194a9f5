"""A two-dimensional convolution without bias."""

from typing import Literal

import jax
import numpy as np

from shiftnet.kernels import checks
from shiftnet.kernels.conv import cpu, xla
from shiftnet.kernels.operation import Kernel, Operation, Relu

__all__ = ["Implementation", "conv", "pack"]

Implementation = Literal["xla", "cpu"]


def conv(
    x: jax.Array,
    w: jax.Array,
    *,
    stride: int = 1,
    groups: int = 1,
    packed: jax.Array | None = None,
    out_scale: jax.Array | None = None,
    out_bias: jax.Array | None = None,
    out_relu: Relu = False,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Convolves images with a square kernel of odd size k, zero-padded by k // 2 on every side.

    The optional steps after it, scale, bias, ReLU and addition, are part of the same pass over the
    result on a CPU: a batch norm in inference, and the end of a residual block.

    Args:
      x: `[N, H, W, C]`, floating.
      w: `[k, k, C / groups, K]`, k odd, in the dtype of `x`.
      stride: in pixels, along both axes.
      groups: number of groups that the channels of `x` and of the result are divided into: 1, C for
        a depthwise convolution, or any other divisor of both C and K.
      packed: what `pack` makes of `w`, which saves the time that this takes; None is always right.
      out_scale: `[K]`, which the result is multiplied by.
      out_bias: `[K]`, added then.
      out_relu: whether to apply a ReLU then; `"last"` applies it after `residual` is added.
      residual: added then, in the shape and dtype of the result.
      implementation: `"cpu"` is C++ compiled at its first use, not for float64; `"xla"` is plain
        XLA. None selects `"cpu"` on a CPU if it supports the arguments and a compiler was found,
        else `"xla"`.

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
    checks.same_dtype("conv", x, w=w, residual=residual)
    checks.shaped("conv", w.shape[3:], out_scale=out_scale, out_bias=out_bias)
    checks.shaped("conv", checks.result_shape(x, w.shape[3], stride), residual=residual)
    return OPERATION(
        x,
        w,
        packed,
        stride=stride,
        groups=groups,
        implementation=implementation,
        out_scale=out_scale,
        out_bias=out_bias,
        out_relu=out_relu,
        residual=residual,
    )


def pack(w: np.ndarray, *, stride: int = 1) -> np.ndarray | None:
    """Arranges constant weights as the convolutions of this machine's CPU read them.

    Args:
      w: `[k, k, C, K]`, as in `conv` with one group.
      stride: as in `conv`.

    Returns:
      `conv`'s argument `packed`, float32 `[P]`; None where `conv` runs in plain XLA.
    """
    return cpu.pack(w, stride)


OPERATION = Operation(
    "conv",
    xla.forward,
    {"cpu": Kernel(cpu.forward, cpu.backward, cpu.unsupported)},
    images=(True, False, False),
    relu_last=True,
)
