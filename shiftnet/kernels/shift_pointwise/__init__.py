"""A shift fused into the 1x1 convolution that follows it."""

import functools
from typing import Any, Literal, NamedTuple

import jax

from shiftnet.kernels import checks, implementations
from shiftnet.kernels.layouts import BATCH, CHANNELS, Layout
from shiftnet.kernels.shift.offsets import ChannelOrder, channel_offsets
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
    layout: Layout = "NHWC",
    implementation: Implementation | None = None,
) -> jax.Array:
    """`shift(relu(x * scale + bias)) @ w`, and scale, bias, ReLU and addition of the result.

    In that order, and each but the shift and the product only where it is asked for. The kernels
    read every value of `x` at an address that the shift decides; no shifted copy is made.

    Args:
      x: `[N, H, W, C]`, or `[H, W, C, N]` in layout HWCN; floating.
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
      layout: of `x`, `residual` and the result.
      implementation: `"tpu"` (HWCN) and `"gpu"` (NHWC, Hopper) are kernels, `"xla"` is plain XLA.
        None takes the device's kernel where it supports the arguments, else `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]`, or the same in HWCN, in the dtype of `x`; sums
      are taken in float32 or wider.

    Raises:
      ValueError: for shapes or dtypes that do not fit, a `kernel_size`, `dilation` or `stride`
        that is no whole number of at least 1, an unknown `channel_order`, `layout` or
        `implementation`, or one that does not support the arguments.
    """
    checks.known("shift_pointwise", layout, channel_order)
    if (
        x.ndim != 4
        or w.ndim != 2
        or x.shape[CHANNELS[layout]] != w.shape[0]
        or not checks.is_whole(*w.shape)
    ):
        raise ValueError(
            f"shift_pointwise needs x in {layout} and w [C, K] of the same C, "
            f"got x {x.shape} and w {w.shape}"
        )
    if not checks.is_whole(kernel_size, dilation, stride):
        raise ValueError(
            "shift_pointwise needs a whole kernel_size, dilation and stride of at least 1, "
            f"got {kernel_size}, {dilation} and {stride}"
        )
    checks.same_dtype("shift_pointwise", x, w=w, residual=residual)
    checks.shaped("shift_pointwise", w.shape[:1], scale=scale, bias=bias)
    checks.shaped("shift_pointwise", w.shape[1:], out_scale=out_scale, out_bias=out_bias)
    result = checks.result_shape(x, w.shape[1], stride, layout)
    checks.shaped("shift_pointwise", result, residual=residual)
    neighbourhood = (kernel_size, dilation, channel_order)
    setting = _Setting(neighbourhood, stride, relu, out_relu, layout, implementation)
    return _fused(setting, x, w, scale, bias, _Epilogue(out_scale, out_bias, residual))


class _Setting(NamedTuple):
    neighbourhood: tuple[int, int, ChannelOrder]
    stride: int
    relu: bool
    out_relu: bool
    layout: Layout
    implementation: str | None

    def core(self, channels: int) -> dict[str, Any]:
        """What describes the operation up to the product."""
        dh, dw = channel_offsets(channels, *self.neighbourhood)
        return {"relu": self.relu, "dh": dh, "dw": dw, "stride": self.stride}

    def run(self, calls: dict[str, Any], x: jax.Array, w: jax.Array, *rest: Any) -> Any:
        """Runs one of `calls`."""
        arguments = {"x": x, "w": w, **self.core(len(w))}
        unsupported: dict[str, implementations.Reason]
        unsupported = {"tpu": implementations.needs_hwcn, "gpu": implementations.needs_nhwc}
        # Forward kernels take some arguments that backward ones do not.
        if self.layout == "HWCN":
            unsupported["tpu"] = functools.partial(tpu.unsupported, **arguments, backward=False)
        else:
            unsupported["gpu"] = functools.partial(gpu.unsupported, **arguments)
        return implementations.run(
            "shift_pointwise", self.implementation, calls, unsupported, x, w, *rest
        )


class _Epilogue(NamedTuple):
    """What follows the product; each may be missing."""

    out_scale: jax.Array | None = None
    out_bias: jax.Array | None = None
    residual: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(setting, x, w, scale, bias, epilogue):
    core = setting.core(len(w))

    def plain(x, w, scale, bias, *epilogue):
        y = xla.forward(x, w, scale, bias, **core, layout=setting.layout)
        return xla.epilogue(y, *epilogue, relu=setting.out_relu, layout=setting.layout)

    def kernel(forward, x, w, scale, bias, *epilogue):
        after = {**_Epilogue(*epilogue)._asdict(), "out_relu": setting.out_relu}
        return forward(x, w, scale, bias, **core, **after)

    calls = {
        "xla": plain,
        "tpu": functools.partial(kernel, tpu.forward),
        "gpu": functools.partial(kernel, gpu.forward),
    }
    batch = BATCH[setting.layout]
    return implementations.on_shares(
        functools.partial(setting.run, calls),
        (x, w, scale, bias, *epilogue),
        (batch, None, None, None, None, None, batch),
        batch,
    )


def _forward(setting, x, w, scale, bias, epilogue):
    y = _fused(setting._replace(out_relu=False), x, w, scale, bias, _Epilogue())

    def after(y, epilogue):
        return xla.epilogue(y, *epilogue, relu=setting.out_relu, layout=setting.layout)

    out, unfinish = jax.vjp(after, y, epilogue)
    return out, (unfinish, (x, w, scale, bias))


def _backward(setting, residuals, dout):
    unfinish, (x, w, scale, bias) = residuals
    dy, depilogue = unfinish(dout)
    core = setting.core(len(w))

    def plain(x, w, scale, bias, dy):
        forward = functools.partial(xla.forward, **core, layout=setting.layout)
        return jax.vjp(forward, x, w, scale, bias)[1](dy)

    def kernel(module):
        lacking = module.unsupported(x, w, **core, backward=True)
        return plain if lacking else functools.partial(module.backward, **core)

    calls = {"xla": plain, "tpu": kernel(tpu), "gpu": kernel(gpu)}
    batch = BATCH[setting.layout]
    gradients = implementations.on_shares(
        functools.partial(setting.run, calls),
        (x, w, scale, bias, dy),
        (batch, None, None, None, batch),
        (batch, None, None, None),
    )
    return *gradients, depilogue


_fused.defvjp(_forward, _backward)
