"""A two-dimensional convolution without bias."""

import functools
from typing import Literal, NamedTuple

import jax

from shiftnet.kernels import checks, implementations
from shiftnet.kernels.conv import cpu, xla

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
    """Convolves images by a square window of an odd side, padded by half its side with zeros.

    Args:
      x: `[N, H, W, C]`, floating.
      w: `[k, k, C / groups, K]`, k odd, in the dtype of `x`.
      stride: in pixels, both ways.
      groups: into which the channels are divided, of `x` and of the result: 1, or C for a
        depthwise convolution, or a number between that divides C and K.
      implementation: `"cpu"` is C++ that is compiled at its first use, float32; `"xla"` is plain
        XLA. None takes the CPU's there if it supports the arguments and a compiler was found,
        else `"xla"`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), K]` in the dtype of `x`.

    Raises:
      ValueError: for shapes or dtypes that do not fit, a `stride` or `groups` that is no whole
        number of at least 1, an unknown `implementation`, or one that does not support the
        arguments.
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
    return _conv(_Setting(stride, groups, implementation), x, w)


class _Setting(NamedTuple):
    stride: int
    groups: int
    implementation: str | None

    def run(self, calls, x, w, *rest):
        """Runs one of `calls`."""
        reason = functools.partial(
            cpu.unsupported, x, w, backward=bool(rest), stride=self.stride, groups=self.groups
        )
        return implementations.run("conv", self.implementation, calls, {"cpu": reason}, x, w, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(setting, x, w):
    core = {"stride": setting.stride, "groups": setting.groups}
    calls = {
        "xla": functools.partial(xla.forward, **core),
        "cpu": functools.partial(cpu.forward, **core),
    }
    return implementations.on_shares(functools.partial(setting.run, calls), (x, w), (0, None), 0)


def _forward(setting, x, w):
    return _conv(setting, x, w), (x, w)


def _backward(setting, residuals, dout):
    core = {"stride": setting.stride, "groups": setting.groups}

    def plain(x, w, dout):
        return jax.vjp(functools.partial(xla.forward, **core), x, w)[1](dout)

    calls = {"xla": plain, "cpu": functools.partial(cpu.backward, **core)}
    return implementations.on_shares(
        functools.partial(setting.run, calls), (*residuals, dout), (0, None, 0), (0, None)
    )


_conv.defvjp(_forward, _backward)
