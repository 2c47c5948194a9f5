"""Batch normalisation in training, and the ReLU behind it."""

import functools
from typing import Any, Literal, NamedTuple

import jax

from shiftnet.kernels import checks, implementations
from shiftnet.kernels.batch_norm import cpu, xla
from shiftnet.kernels.operation import differentiable

__all__ = ["Implementation", "batch_norm"]

Implementation = Literal["xla", "cpu"]


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    relu: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by the mean and the variance of the batch.

    It is no `Operation`, since the statistics are those of the whole batch, wherever that lies:
    over several devices the compiler divides the plain form.

    Args:
      x: `[..., C]`, floating.
      scale, bias: `[C]`, float32 or wider: what normalised values are multiplied by, and what is
        added to them.
      epsilon: added to the variance.
      relu: whether negative results become 0.
      implementation: `"cpu"` is C++ that is compiled at its first use, float32; `"xla"` is plain
        XLA. None takes the CPU's there if it supports the arguments and one device has the batch.

    Returns:
      The result in the dtype of `x`; the mean and the biased variance, `[C]` in the dtype of
      `scale`, which carry no gradient.

    Raises:
      ValueError: for shapes that do not fit, an unknown `implementation`, or one that does not
        support the arguments.
    """
    checks.shaped("batch_norm", x.shape[-1:], scale=scale, bias=bias)
    if implementation not in (None, "xla", "cpu"):
        raise ValueError(
            f"unknown implementation {implementation!r} of batch_norm; known: xla, cpu"
        )
    if implementation == "cpu" and (reason := cpu.unsupported(x, scale)):
        raise ValueError(f"batch_norm has no 'cpu' for this: {reason}")
    return _batch_norm(_Setting(relu, epsilon, implementation or _choice(x, scale)), x, scale, bias)


def _choice(x: jax.Array, scale: jax.Array) -> str | None:
    """The implementation: None is the CPU's where the program is lowered for one."""
    if (
        implementations.is_only_xla()
        or implementations.platform() != "cpu"
        or not all(isinstance(size, int) for size in x.shape)
        or implementations.division(x) is not None
        or cpu.unsupported(x, scale) is not None
    ):
        return "xla"
    return None


class _Setting(NamedTuple):
    relu: bool
    epsilon: float
    implementation: str | None

    def run(self, name: str, *arrays: jax.Array) -> Any:
        """Calls the function of this name of one of the implementations."""
        plain, kernel = (
            functools.partial(getattr(module, name), relu=self.relu, epsilon=self.epsilon)
            for module in (xla, cpu)
        )
        if self.implementation == "xla":
            return plain(*arrays)
        call = differentiable(kernel, plain)
        if self.implementation == "cpu":
            return call(*arrays)
        return jax.lax.platform_dependent(*arrays, cpu=call, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(setting, x, scale, bias):
    return setting.run("forward", x, scale, bias)


def _forward(setting, x, scale, bias):
    y, mean, var = _batch_norm(setting, x, scale, bias)
    return (y, mean, var), (x, mean, var, scale, bias)


def _backward(setting, residuals, cotangents):
    return setting.run("backward", *residuals, cotangents[0])


_batch_norm.defvjp(_forward, _backward)
