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

from benchmarks.packed_matmul import gpu, tpu, xla
from benchmarks.packed_matmul.packed import PackedMatrix, pack
from shiftnet.kernels.operation import Kernel, Operation

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
    product = OPERATION(x.reshape(rows, x.shape[-1]), packed, implementation=implementation)
    return product.reshape(*x.shape[:-1], packed.shape[1])


def expand(packed: PackedMatrix, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The weights, `levels[codes] * scale`, `[K, M]`."""
    return (xla.powers(packed, jnp.float32) * xla.factors(packed)).astype(dtype)


@jax.custom_vjp
def _reference(x: jax.Array, packed: PackedMatrix) -> jax.Array:
    return xla.matmul(x, packed)


def _forward(x, packed):
    return xla.matmul(x, packed), (x, packed)


def _backward(residuals, dy):
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


_reference.defvjp(_forward, _backward)


def _kernel(module: Any) -> Kernel:
    return Kernel(
        module.matmul, unsupported=lambda x, packed, backward: module.unsupported(x, packed)
    )


OPERATION = Operation(
    "packed_matmul", _reference, {"tpu": _kernel(tpu), "gpu": _kernel(gpu)}, images=(False, False)
)
