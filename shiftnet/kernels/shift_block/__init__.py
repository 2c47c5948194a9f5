"""A whole shift block as one operation: 1x1 convolution, ReLU, shift, 1x1 convolution."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import checks
from shiftnet.kernels.layouts import wide_dtype
from shiftnet.kernels.operation import Case, Epilogue, Kernel, Operation, finish
from shiftnet.kernels.shift.offsets import Neighbourhood, Offsets, arrays
from shiftnet.kernels.shift_block import cpu, gpu, tpu, xla

__all__ = ["Implementation", "shift_block"]

Implementation = Literal["xla", "cpu", "tpu", "gpu"]


def shift_block(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    kernel_size: int = 3,
    dilation: int = 1,
    *,
    stride: int = 1,
    shift_first: bool = False,
    offsets: Offsets | None = None,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes `shift(relu(x @ w1 + b1)) @ w2`, optionally followed by bias, ReLU and addition.

    In the kernels the expanded tensor `relu(x @ w1 + b1)` never leaves the chip, forward or
    backward: for an output pixel each group of channels that move together needs one pixel of `x`.
    Scales must be folded into the weights by the caller.

    Args:
      x: `[N, H, W, C]`, floating.
      w1: `[C, E]`, in the dtype of `x`.
      b1: `[E]`, floating; biases are added in float32 or wider.
      w2: `[E, K]`, in the dtype of `x`.
      kernel_size, dilation: those of the shift; see `shiftnet.kernels.shift.shift`.
      stride: stride of the second convolution in pixels, along both axes.
      shift_first: whether the bias comes after the shift, `relu(shift(x @ w1) + b1) @ w2`, so that
        pixels from outside the image are `relu(b1)` and not 0.
      offsets: `(dh, dw)`, integers for each expanded channel, instead of those of a neighbourhood.
      out_bias: `[K]`, floating.
      out_relu: whether to apply a ReLU to the result.
      residual: array of the result's shape and dtype, added last.
      implementation: `"tpu"` and `"gpu"` (Hopper) are kernels, `"cpu"` is C++ compiled at its first
        use (without a compiler, or for float64, plain XLA on a few images at a time), `"xla"` is
        plain XLA. None selects the device's if it supports the arguments, else `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]` in the dtype of `x`; sums are accumulated in
      float32 or wider.

    Raises:
      ValueError: if shapes or dtypes do not match, `kernel_size`, `dilation` or `stride` is not an
        integer of at least 1, `offsets` are for another number of channels, or `implementation` is
        unknown or does not support the arguments.
    """
    if (
        x.ndim != 4
        or w1.ndim != 2
        or w2.ndim != 2
        or not checks.is_whole(*w1.shape, *w2.shape)
        or (x.shape[3], *b1.shape) != w1.shape
        or b1.shape != w2.shape[:1]
    ):
        raise ValueError(
            "shift_block needs x in NHWC, w1 [C, E], b1 [E] and w2 [E, K], "
            f"got x {x.shape}, w1 {w1.shape}, b1 {b1.shape} and w2 {w2.shape}"
        )
    moves = checks.moves("shift_block", len(w2), kernel_size, dilation, offsets=offsets)
    checks.stride("shift_block", stride)
    checks.same_dtype("shift_block", x, w1=w1, w2=w2, residual=residual)
    checks.shaped("shift_block", w2.shape[1:], out_bias=out_bias)
    result = checks.result_shape(x, w2.shape[1], stride)
    checks.shaped("shift_block", result, residual=residual)
    settings: dict[str, Any] = {"moves": moves, "stride": stride}
    epilogue = Epilogue(None, out_bias, residual)
    if not shift_first:
        return OPERATION(
            *(x, w1, b1, w2),
            **settings,
            **epilogue._asdict(),
            out_relu=out_relu,
            implementation=implementation,
        )
    y = OPERATION(x, w1, b1, w2, **settings, implementation=implementation)
    border = _border(b1, w2, x.shape[1:3], **_prepare(x, w1, b1, w2, **settings))
    return finish(y + border.astype(y.dtype), epilogue, out_relu)


def _border(
    b1: jax.Array,
    w2: jax.Array,
    size: tuple[int, ...],
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> jax.Array:
    """Returns what `relu(b1)` from outside the image adds to the result, `[H', W', K]`."""
    wide = wide_dtype(w2.dtype)
    inside, places = [], []
    for length, offsets in zip(size, (dh, dw), strict=True):
        read = np.arange(0, length, stride)[:, None] + offsets
        # All rows (or columns) are the same, except those near the border.
        kinds, of = np.unique((read >= 0) & (read < length), axis=0, return_inverse=True)
        inside.append(jnp.asarray(kinds))
        places.append(of.ravel())
    bias = jax.nn.relu(b1.astype(wide))
    brought = jnp.where(inside[0][:, None] & inside[1], jnp.zeros_like(bias), bias)
    return (brought @ w2.astype(wide))[places[0]][:, places[1]]


def _prepare(x, w1, b1, w2, *, moves, stride):
    dh, dw = arrays(len(w2), moves)
    return {"dh": dh, "dw": dw, "stride": stride}


def _unsupported(module):
    return lambda x, w1, b1, w2, **settings: module.unsupported(x, w1, w2, **settings)


OPERATION = Operation(
    "shift_block",
    xla.forward,
    {
        "cpu": Kernel(cpu.forward, cpu.backward, _unsupported(cpu)),
        "tpu": Kernel(tpu.forward, tpu.backward, _unsupported(tpu), layout="HWCN"),
        "gpu": Kernel(gpu.forward, gpu.backward, _unsupported(gpu)),
    },
    images=(True, False, False, False),
    prepare=_prepare,
    cases=[
        Case(
            (x, (16, 144), (144,), (144, 16)),
            {"moves": Neighbourhood(3, 1), "stride": stride},
            runs,
        )
        for x, stride, runs in (
            ((128, 4, 8, 16), 1, 0),
            ((128, 4, 8, 16), 2, 0),
            ((256, 32, 32, 16), 1, 0),
            ((128, 4, 8, 16), 1, 2),
            ((128, 4, 8, 16), 2, 2),
        )
    ],
)
