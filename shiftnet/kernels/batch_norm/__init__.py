"""Batch norm in training, with the ReLU and the addition that follow."""

import functools
from typing import NamedTuple

import jax

from shiftnet.kernels import checks
from shiftnet.kernels.batch_norm import cpu, xla
from shiftnet.kernels.layouts import wide_dtype
from shiftnet.kernels.operation import Epilogue, Relu, finish, relu_of
from shiftnet.kernels.whole_batch import Implementation, choose, either

__all__ = ["Implementation", "batch_norm"]


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    out_relu: Relu = False,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by the batch's mean and variance; then scale, bias, ReLU, addition.

    On a CPU all of it is two passes over memory, and its gradient likewise.

    Args:
      x: `[..., C]`, floating.
      scale: `[C]`, in float32 or the dtype of `x` if that is wider; statistics have its dtype.
      bias: likewise.
      epsilon: what is added to the variance.
      out_relu: whether to apply a ReLU; `"last"` applies it after `residual` is added.
      residual: added, in the shape and dtype of `x`.
      implementation: `"cpu"` is C++ compiled at its first use, not for float64; `"xla"` is plain
        XLA. None selects `"cpu"` on a CPU if it supports the arguments, a compiler was found and
        the batch is not divided over devices, else `"xla"`.

    Returns:
      The result in the shape and dtype of `x`; and mean and biased variance, `[C]` each, which
      carry no gradient.

    Raises:
      ValueError: if shapes or dtypes do not match, or `implementation` is unknown or does not
        support the arguments.
    """
    if x.ndim < 2:
        raise ValueError(f"batch_norm needs x [..., C] of at least two axes, got {x.shape}")
    checks.same_dtype("batch_norm", x, residual=residual)
    checks.shaped("batch_norm", x.shape, residual=residual)
    checks.shaped("batch_norm", x.shape[-1:], scale=scale, bias=bias)
    for name, array in (("scale", scale), ("bias", bias)):
        if array.dtype != wide_dtype(x.dtype):
            raise ValueError(
                f"batch_norm needs {name} in {wide_dtype(x.dtype)} for x in {x.dtype}, "
                f"got {array.dtype}"
            )
    relu = relu_of("batch_norm", out_relu, residual)
    call = _Call(relu, float(epsilon), implementation is not None)
    if choose("batch_norm", x, implementation) == "xla":
        return call.plain(x, scale, bias, residual)
    return _fused(call, x, scale, bias, residual)


class _Call(NamedTuple):
    """The static part of a call."""

    relu: Relu
    epsilon: float
    asked_for: bool  # the kernel, on whatever platform the program is lowered for

    def plain(self, x, scale, bias, residual, normalize=xla.forward):
        y, mean, var = normalize(x, scale, bias, self.epsilon)
        return finish(y, Epilogue(residual=residual), self.relu), mean, var

    def by_kernel(self, x, scale, bias, residual):
        return cpu.forward(x, scale, bias, residual, relu=self.relu, epsilon=self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    call: _Call, x: jax.Array, scale: jax.Array, bias: jax.Array, residual: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Without a gradient of its own: that has no derivative, which second derivatives ask for.
    plain = functools.partial(call.plain, normalize=xla.formula)
    return either(call.by_kernel, plain, x, scale, bias, residual, always=call.asked_for)


def _forward(call, x, scale, bias, residual):
    y, mean, var = _fused(call, x, scale, bias, residual)
    out = y if call.relu == "last" else None
    return (y, mean, var), (x, out, mean, var, scale, bias, residual)


def _backward(call, residuals, cotangents):
    x, out, mean, var, scale, bias, residual = residuals

    def kernel(x, out, dout, mean, var, scale, bias, residual):
        after = {"relu": call.relu, "epsilon": call.epsilon}
        *gradients, added = cpu.backward(x, out, dout, mean, var, scale, bias, **after)
        return *gradients, None if residual is None else added

    def plain(x, out, dout, mean, var, scale, bias, residual):
        del out, mean, var
        _, vjp = jax.vjp(lambda *operands: call.plain(*operands)[0], x, scale, bias, residual)
        return vjp(dout)

    arrays = (x, out, cotangents[0], mean, var, scale, bias, residual)
    return either(kernel, plain, *arrays, always=call.asked_for)


_fused.defvjp(_forward, _backward)
