"""A shift fused with the pointwise (1x1) convolution that follows it."""

from typing import Literal

import jax

from shiftnet.kernels import checks
from shiftnet.kernels.operation import Case, Kernel, Operation
from shiftnet.kernels.shift.offsets import ChannelOrder, Neighbourhood, Offsets, arrays
from shiftnet.kernels.shift_pointwise import gpu, tpu, xla

__all__ = ["Implementation", "shift_pointwise"]

Implementation = Literal["xla", "tpu", "gpu"]


def shift_pointwise(
    x: jax.Array,
    w: jax.Array,
    kernel_size: int = 3,
    dilation: int = 1,
    *,
    stride: int = 1,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    relu: bool = False,
    out_scale: jax.Array | None = None,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    channel_order: ChannelOrder = "interleaved",
    offsets: Offsets | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes `shift(relu(x * scale + bias)) @ w`, then scale, bias, ReLU and addition.

    Everything except the shift and the product is optional. The kernels apply the shift to the
    addresses that they read `x` from; no shifted copy is made.

    Args:
      x: `[N, H, W, C]`, floating.
      w: `[C, K]`, the 1x1 convolution's weight, in the dtype of `x`.
      kernel_size, dilation: those of the shift; see `shiftnet.kernels.shift.shift`.
      stride: stride of the convolution in pixels, along both axes.
      scale, bias: `[C]`, floating, applied before the shift, so that values from outside the image
        are 0; like `out_scale` and `out_bias` they are applied in float32 or wider.
      relu: whether to apply a ReLU before the shift.
      out_scale, out_bias: `[K]`, applied to the result.
      out_relu: whether to apply a ReLU to the result.
      residual: array of the result's shape and dtype, added last.
      channel_order: channel order of `x`; see `shiftnet.kernels.shift.channel_offsets`. The GPU
        kernel needs "grouped".
      offsets: `(dh, dw)`, integers for each channel, instead of those of a neighbourhood.
      implementation: `"tpu"` and `"gpu"` (Hopper) are kernels, `"xla"` is plain XLA. None selects
        the device's kernel if it supports the arguments, else `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]` in the dtype of `x`; sums are accumulated in
      float32 or wider.

    Raises:
      ValueError: if shapes or dtypes do not match, `kernel_size`, `dilation` or `stride` is not an
        integer of at least 1, `offsets` are for another number of channels, `channel_order` is
        unknown, or `implementation` is unknown or does not support the arguments.
    """
    if x.ndim != 4 or w.ndim != 2 or x.shape[3] != w.shape[0] or not checks.is_whole(*w.shape):
        raise ValueError(
            "shift_pointwise needs x in NHWC and w [C, K] of the same C, "
            f"got x {x.shape} and w {w.shape}"
        )
    moves = checks.moves("shift_pointwise", len(w), kernel_size, dilation, channel_order, offsets)
    checks.stride("shift_pointwise", stride)
    checks.same_dtype("shift_pointwise", x, w=w, residual=residual)
    checks.shaped("shift_pointwise", w.shape[:1], scale=scale, bias=bias)
    checks.shaped("shift_pointwise", w.shape[1:], out_scale=out_scale, out_bias=out_bias)
    result = checks.result_shape(x, w.shape[1], stride)
    checks.shaped("shift_pointwise", result, residual=residual)
    return OPERATION(
        *(x, w, scale, bias),
        moves=moves,
        stride=stride,
        relu=relu,
        out_scale=out_scale,
        out_bias=out_bias,
        out_relu=out_relu,
        residual=residual,
        implementation=implementation,
    )


def _prepare(x, w, scale, bias, *, moves, **settings):
    dh, dw = arrays(len(w), moves)
    return {"dh": dh, "dw": dw, **settings}


def _unsupported(module):
    return lambda x, w, scale, bias, **settings: module.unsupported(x, w, **settings)


_TESTED = {"moves": Neighbourhood(3, 1, "grouped"), "relu": True}

OPERATION = Operation(
    "shift_pointwise",
    xla.forward,
    {
        "tpu": Kernel(tpu.forward, tpu.backward, _unsupported(tpu), layout="HWCN"),
        "gpu": Kernel(gpu.forward, gpu.backward, _unsupported(gpu)),
    },
    images=(True, False, False, False),
    prepare=_prepare,
    cases=[
        Case((x, (144, 16), None, None), {**_TESTED, "stride": stride})
        for x, stride in (((128, 4, 8, 144), 1), ((128, 4, 8, 144), 2), ((256, 32, 32, 144), 1))
    ],
)
