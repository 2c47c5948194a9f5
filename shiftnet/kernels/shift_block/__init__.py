"""A whole shift block as one operation: 1x1 convolution, ReLU, shift, 1x1 convolution."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import checks, implementations
from shiftnet.kernels.layouts import BATCH, CHANNELS, ROWS, Layout, wide_dtype
from shiftnet.kernels.shift.offsets import channel_offsets
from shiftnet.kernels.shift_block import cpu, gpu, tpu, xla
from shiftnet.kernels.shift_pointwise.xla import epilogue as finish

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
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    layout: Layout = "NHWC",
    implementation: Implementation | None = None,
) -> jax.Array:
    """`shift(relu(x @ w1 + b1)) @ w2`, and bias, ReLU and addition of the result.

    In that order; the last three only where they are asked for. In the kernels the expanded tensor
    `relu(x @ w1 + b1)` never leaves the chip, forward or backward: an output value needs of each
    group of its channels only the one pixel of `x` that the group moves from. Scales are the
    caller's to fold into the weights.

    Args:
      x: `[N, H, W, C]`, or `[H, W, C, N]` in layout HWCN; floating.
      w1: `[C, E]`, in the dtype of `x`.
      b1: `[E]`, floating; biases are added in float32 or wider.
      w2: `[E, K]`, in the dtype of `x`.
      kernel_size, dilation: of the shift; see `shiftnet.kernels.shift.shift`.
      stride: of the second convolution, in pixels, both ways.
      shift_first: whether the bias comes after the shift, `relu(shift(x @ w1) + b1) @ w2`, so that
        what the shift brings in is `relu(b1)` and not 0.
      out_bias: `[K]`, floating.
      out_relu: whether negative results become 0.
      residual: of the result's shape and dtype, added last.
      layout: of `x`, `residual` and the result.
      implementation: `"tpu"` (HWCN) and `"gpu"` (NHWC, Hopper) are kernels, `"xla"` is plain XLA,
        `"cpu"` (NHWC) the same on a few images at a time. None takes the device's where it supports
        the arguments, else `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]`, or the same in HWCN, in the dtype of `x`; sums
      are taken in float32 or wider.

    Raises:
      ValueError: for shapes or dtypes that do not fit, a `kernel_size`, `dilation` or `stride`
        that is no whole number of at least 1, an unknown `layout` or `implementation`, or one that
        does not support the arguments.
    """
    checks.known("shift_block", layout)
    if (
        x.ndim != 4
        or w1.ndim != 2
        or w2.ndim != 2
        or not checks.is_whole(*w1.shape, *w2.shape)
        or (x.shape[CHANNELS[layout]], *b1.shape) != w1.shape
        or b1.shape != w2.shape[:1]
    ):
        raise ValueError(
            f"shift_block needs x in {layout}, w1 [C, E], b1 [E] and w2 [E, K], "
            f"got x {x.shape}, w1 {w1.shape}, b1 {b1.shape} and w2 {w2.shape}"
        )
    if not checks.is_whole(kernel_size, dilation, stride):
        raise ValueError(
            "shift_block needs a whole kernel_size, dilation and stride of at least 1, "
            f"got {kernel_size}, {dilation} and {stride}"
        )
    checks.same_dtype("shift_block", x, w1=w1, w2=w2, residual=residual)
    checks.shaped("shift_block", w2.shape[1:], out_bias=out_bias)
    result = checks.result_shape(x, w2.shape[1], stride, layout)
    checks.shaped("shift_block", result, residual=residual)
    setting = _Setting(kernel_size, dilation, stride, out_relu, layout, implementation)
    if not shift_first:
        return _fused(setting, x, w1, b1, w2, out_bias, residual)
    y = _fused(setting._replace(out_relu=False), x, w1, b1, w2, None, None)
    rows = ROWS[layout]
    border = _border(b1, w2, x.shape[rows : rows + 2], **setting.core(len(w2))).astype(y.dtype)
    y = y + (border if layout == "NHWC" else border[..., None])
    return finish(y, None, out_bias, residual, relu=out_relu, layout=layout)


def _border(
    b1: jax.Array,
    w2: jax.Array,
    size: tuple[int, ...],
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> jax.Array:
    """What `relu(b1)` adds to each image's result where a shift brings it in, `[H', W', K]`."""
    wide = wide_dtype(w2.dtype)
    inside, places = [], []
    for length, offsets in zip(size, (dh, dw), strict=True):
        read = np.arange(0, length, stride)[:, None] + offsets
        # All rows, or columns, but those near the border are the same.
        kinds, of = np.unique((read >= 0) & (read < length), axis=0, return_inverse=True)
        inside.append(jnp.asarray(kinds))
        places.append(of.ravel())
    bias = jax.nn.relu(b1.astype(wide))
    brought = jnp.where(inside[0][:, None] & inside[1], jnp.zeros_like(bias), bias)
    return (brought @ w2.astype(wide))[places[0]][:, places[1]]


class _Setting(NamedTuple):
    kernel_size: int
    dilation: int
    stride: int
    out_relu: bool
    layout: Layout
    implementation: str | None

    def core(self, channels: int) -> dict[str, Any]:
        """What describes the operation up to the second product."""
        dh, dw = channel_offsets(channels, self.kernel_size, self.dilation)
        return {"dh": dh, "dw": dw, "stride": self.stride}

    def run(self, calls: dict[str, Any], x: jax.Array, w1: jax.Array, *rest: Any) -> Any:
        """Runs one of `calls`; `rest` begins with `b1` and `w2`."""
        arguments = {"x": x, "w1": w1, "w2": rest[1], **self.core(w1.shape[1])}
        # Forward kernels take some arguments that backward ones do not.
        unsupported: dict[str, implementations.Reason] = {
            "cpu": functools.partial(cpu.unsupported, **arguments),
            "tpu": functools.partial(tpu.unsupported, **arguments, backward=False),
            "gpu": functools.partial(gpu.unsupported, **arguments),
        }
        if self.layout == "HWCN":
            unsupported |= dict.fromkeys(("cpu", "gpu"), implementations.needs_nhwc)
        else:
            unsupported["tpu"] = implementations.needs_hwcn
        return implementations.run(
            "shift_block", self.implementation, calls, unsupported, x, w1, *rest
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(setting, x, w1, b1, w2, out_bias, residual):
    core = setting.core(len(w2))

    def plain(x, w1, b1, w2, out_bias, residual):
        y = xla.forward(x, w1, b1, w2, **core, layout=setting.layout)
        return finish(y, None, out_bias, residual, relu=setting.out_relu, layout=setting.layout)

    def kernel(forward, x, w1, b1, w2, out_bias, residual):
        after = {"out_bias": out_bias, "out_relu": setting.out_relu, "residual": residual}
        return forward(x, w1, b1, w2, **core, **after)

    calls = {
        "xla": plain,
        "cpu": functools.partial(kernel, cpu.forward),
        "tpu": functools.partial(kernel, tpu.forward),
        "gpu": functools.partial(kernel, gpu.forward),
    }
    batch = BATCH[setting.layout]
    return implementations.on_shares(
        functools.partial(setting.run, calls),
        (x, w1, b1, w2, out_bias, residual),
        (batch, None, None, None, None, batch),
        batch,
    )


def _forward(setting, x, w1, b1, w2, out_bias, residual):
    y = _fused(setting._replace(out_relu=False), x, w1, b1, w2, None, None)

    def after(y, out_bias, residual):
        return finish(y, None, out_bias, residual, relu=setting.out_relu, layout=setting.layout)

    out, unfinish = jax.vjp(after, y, out_bias, residual)
    return out, (unfinish, (x, w1, b1, w2))


def _backward(setting, residuals, dout):
    unfinish, (x, w1, b1, w2) = residuals
    dy, dout_bias, dresidual = unfinish(dout)
    core = setting.core(len(w2))

    def plain(x, w1, b1, w2, dy):
        forward = functools.partial(xla.forward, **core, layout=setting.layout)
        return jax.vjp(forward, x, w1, b1, w2)[1](dy)

    def kernel(module):
        lacking = module.unsupported(x, w1, w2, **core, backward=True)
        return plain if lacking else functools.partial(module.backward, **core)

    calls = {
        "xla": plain,
        "cpu": functools.partial(cpu.backward, **core),
        "tpu": kernel(tpu),
        "gpu": kernel(gpu),
    }
    batch = BATCH[setting.layout]
    gradients = implementations.on_shares(
        functools.partial(setting.run, calls),
        (x, w1, b1, w2, dy),
        (batch, None, None, None, batch),
        (batch, None, None, None),
    )
    return *gradients, dout_bias, dresidual


_fused.defvjp(_forward, _backward)
