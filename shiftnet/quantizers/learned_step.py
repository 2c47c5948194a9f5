"""Activations of a few bits with a learned step size (LSQ).

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.quantizers.activation import Activation, some, widened
from shiftnet.quantizers.form import straight_through

# The mean magnitude of standard normal values, and of those that went through a ReLU.
NORMAL_MAGNITUDE = {True: math.sqrt(2 / math.pi), False: math.sqrt(1 / (2 * math.pi))}
LEAST = 2.0**-10  # of the step, as a share of the first one: it cannot reach zero


class LearnedStep(Activation):
    """s · clip(round(x / s), -Qn, Qp), with a step s that is learned.

    Qn = 2^(bits - 1) and Qp = Qn - 1, or 0 and 2^bits - 1 where nothing is negative. Ties go to
    the even integer. The gradient to `x` is 1 where -Qn < x / s < Qp, else 0. That to s is
    round(x / s) - x / s there, -Qn or Qp outside, and is multiplied by 1 / sqrt(N · Qp), N being
    the values of one image.

    In the first training batch `unit` becomes 2 · mean(|x|) / sqrt(Qp), the paper's rule. It is a
    running statistic, saved with the network, so that a run that is continued has it. Before, it
    is the same of standard normal values. `step` is s as a multiple of it, starting at 1, with the
    gradient that makes SGD change s as in the paper.

    Args:
      features: channels of the input.
      bits: bits per value, 2 to 8.
      rectified: whether the input has no negative values.

    Attributes:
      step: parameter, float32 [].
      unit: running statistic, float32 [], 0 before the first batch; None once folded into `step`.
    """

    def __init__(self, features: int, *, bits: int, rectified: bool = False):
        super().__init__(features)
        self.bits = bits
        signed = not rectified
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - signed) - 1
        self.step = nnx.Param(jnp.ones((), jnp.float32))
        self.unit: Any = nnx.data(nnx.BatchStat(jnp.zeros((), jnp.float32)))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        wide = widened(x)
        if train:
            if self.unit is None:
                raise ValueError("a network whose activations are folded cannot be trained")
            first = self._first(jnp.abs(wide).mean()).astype(jnp.float32)
            unit = self.unit[...]
            self.unit[...] = jnp.where(unit > 0, unit, jax.lax.stop_gradient(first))
            size = math.prod(x.shape[1:])
            factor = 1 / math.sqrt(size * self.high)
            step = self._step(wide.dtype, factor)
            few = some(wide)
            self._observe(
                (few < self.low * step) | (few > self.high * step), jnp.abs(few) > step / 2
            )
        else:
            step = self._step(wide.dtype)
        return quantize(wide, step, self.low, self.high).astype(x.dtype)

    def integers(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = widened(x)
        step = self._step(wide.dtype)
        return _codes(wide / step, self.low, self.high).astype(jnp.int32), step

    def fold(self) -> None:
        super().fold()
        if self.unit is not None:
            self.step.set_value(self._step(jnp.dtype(jnp.float32)))
            self.unit = None

    def unfold(self) -> None:
        super().unfold()
        if self.unit is None:
            self.unit = nnx.data(nnx.BatchStat(self.step[...]))
            self.step.set_value(jnp.ones((), jnp.float32))

    def _first(self, magnitude: Any) -> Any:
        return 2 * magnitude / math.sqrt(self.high)

    def _step(self, dtype: jnp.dtype, factor: float = 1.0) -> jax.Array:
        step = self.step[...]
        if self.unit is None:
            return step.astype(dtype)
        unit = self.unit[...]
        unit = jnp.where(unit > 0, unit, self._first(NORMAL_MAGNITUDE[self.low < 0]))
        value = unit * jnp.maximum(step, LEAST)
        return straight_through(value, factor / unit * step).astype(dtype)


def _codes(v: jax.Array, low: int, high: int) -> jax.Array:
    return jnp.clip(jnp.round(v), low, high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantize(x: jax.Array, step: jax.Array, low: int, high: int) -> jax.Array:
    """Returns `step * clip(round(x / step), low, high)`, with LSQ's gradients.

    Args:
      x: floating, any shape.
      step: above 0, [], in the dtype of `x`.
      low, high: the least and the largest code.
    """
    return _quantize_forward(x, step, low, high)[0]


def _quantize_forward(x, step, low, high):
    return _codes(x / step, low, high) * step, (x, step)


def _quantize_backward(low, high, residuals, cotangent):
    x, step = residuals
    v = x / step
    inside = (v > low) & (v < high)
    slope = _codes(v, low, high) - jnp.where(inside, v, 0)
    dx, dstep = jnp.where(inside, cotangent, 0), slope * cotangent
    # Apart from their sum, which XLA's CPU backend computes one by one together with comparisons:
    # 10 ms and not 7 at 128x32x32x16.
    dx, dstep = jax.lax.optimization_barrier((dx, dstep))
    return dx, dstep.sum()


quantize.defvjp(_quantize_forward, _quantize_backward)
