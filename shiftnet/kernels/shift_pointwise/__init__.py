"""A shift fused into the 1x1 convolution that follows it."""

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
    """`shift(relu(x * scale + bias)) @ w`, and scale, bias, ReLU and addition of the result.

    In that order, and each but the shift and the product only where it is asked for. The kernels
    read every value of `x` at an address that the shift decides; no shifted copy is made.

    Args:
      x: `[N, H, W, C]`, floating.
      w: `[C, K]`, the 1x1 convolution's weight, in the dtype of `x`.
      kernel_size, dilation: of the shift; see `shiftnet.kernels.shift.shift`.
      stride: of the convolution, in pixels, both ways.
      scale, bias: `[C]`, floating, applied before the shift, which brings in zeros after them; like
        those of the result in float32 or wider.
      relu: whether negative values become 0 before the shift.
      out_scale, out_bias: `[K]`.
      out_relu: whether negative results become 0.
      residual: of the result's shape and dtype, added last.
      channel_order: of `x`, as of `shiftnet.kernels.shift.channel_offsets`; the GPU's kernel needs
        "grouped".
      offsets: `(dh, dw)`, the whole numbers of each channel, in place of a neighbourhood's.
      implementation: `"tpu"` and `"gpu"` (Hopper) are kernels, `"xla"` is plain XLA.
        None takes the device's kernel where it supports the arguments, else `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]` in the dtype of `x`; sums are taken in float32 or
      wider.

    Raises:
      ValueError: for shapes or dtypes that do not fit, a `kernel_size`, `dilation` or `stride`
        that is no whole number of at least 1, offsets of another number of channels, an unknown
        `channel_order` or `implementation`, or one that does not support the arguments.
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
