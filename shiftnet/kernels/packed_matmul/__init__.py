"""Products with matrices of low-bit weights that stay packed in memory.

A product of a few rows with a large matrix waits for the matrix to be read, so a matrix of 1 to 4
bits a weight is left packed (`packed.py` says how) and expanded on the chip, tile by tile.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import implementations
from shiftnet.kernels.packed_matmul import gpu, tpu, xla
from shiftnet.kernels.packed_matmul.packed import PackedMatrix, pack

__all__ = ["Implementation", "PackedMatrix", "expand", "pack", "packed_matmul"]

Implementation = Literal["xla", "tpu", "gpu"]


def packed_matmul(
    x: jax.Array, packed: PackedMatrix, *, implementation: Implementation | None = None
) -> jax.Array:
    """`x @ expand(packed)`: accumulated in float32, multiplied by the scale, rounded once.

    What is accumulated can be 4 times the product with the levels, and overflows that much sooner.

    Differentiable in x, `dx = dy @ expand(packed)^T`, and in the scale; the packed weights have no
    gradient, and the gradients are computed by expanding all weights.

    Args:
      x: `[..., K]`, floating. The kernels take bfloat16 and float32, which they split into three
        bfloat16 parts, so that no digit is lost.
      packed: of shape `(K, M)`, from `pack`.
      implementation: `"xla"` expands the whole matrix first, `"tpu"` and `"gpu"` (Hopper) expand
        on the chip. None takes the device's kernel where that supports the arguments (up to 64
        rows, 21 in float32), else `"xla"`: always so on a CPU.

    Returns:
      `[..., M]` of x's dtype.

    Raises:
      ValueError: for an x that is not floating or does not end in K, an unknown `implementation`,
        or one that does not support the arguments; the message says why.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"packed_matmul needs a floating x, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != packed.shape[0]:
        raise ValueError(f"packed_matmul needs x [..., {packed.shape[0]}], got {x.shape}")
    rows = math.prod(x.shape[:-1])
    product = _matmul(x.reshape(rows, x.shape[-1]), packed, implementation)
    return product.reshape(*x.shape[:-1], packed.shape[1])


def expand(packed: PackedMatrix, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The weights, `levels[codes] * scale`, `[K, M]`."""
    return (xla.powers(packed, jnp.float32) * xla.factors(packed)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, packed: PackedMatrix, implementation: Implementation | None) -> jax.Array:
    return implementations.run(
        "packed_matmul",
        implementation,
        {"xla": xla.matmul, "tpu": tpu.matmul, "gpu": gpu.matmul},
        {"tpu": lambda: tpu.unsupported(x, packed), "gpu": lambda: gpu.unsupported(x, packed)},
        x,
        packed,
    )


def _forward(x, packed, implementation):
    return _matmul(x, packed, implementation), (x, packed)


def _backward(implementation, residuals, dy):
    del implementation
    x, packed = residuals
    dtype = xla.accumulator(x.dtype)
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    powers, factors, dy = xla.powers(packed, dtype), xla.factors(packed), dy.astype(dtype)
    dx = dot(dy * factors.astype(dtype), powers.T).astype(x.dtype)
    unscaled = dot(x.astype(dtype), powers) * xla.unit(packed).astype(dtype)
    dscale = jnp.sum(dy * unscaled, axis=0).astype(packed.scale.dtype)
    dscale = jnp.pad(dscale, (0, packed.scale.size - dscale.size))
    no_gradient: Any = np.zeros(packed.words.shape, jax.dtypes.float0)
    return dx, dataclasses.replace(packed, words=no_gradient, scale=dscale)


_matmul.defvjp(_forward, _backward)
