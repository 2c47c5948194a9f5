"""The shift block on a CPU: a few images at a time, whose expanded tensor stays in the cache.

The expanded tensor of a whole batch goes to memory and back several times, and each time into pages
that the system must first hand out. Of a few images it fits the second-level cache, and the same
pages serve all of them. The backward pass computes it again, which is cheaper than fetching it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import affine, product, wide_dtype
from shiftnet.kernels.shift import xla as shift
from shiftnet.kernels.shift_pointwise.xla import epilogue

EXPANDED_BYTES = 6 << 20  # of the images taken at a time; 3 to 12 MiB are as fast on a Xeon


def forward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """As `shift_block`, in NHWC."""

    def some(images: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        x, residual = images
        shifted = _shifted(_expanded(x, w1, b1), dh, dw, stride)
        y = product(shifted, w2, "NHWC")
        return epilogue(y, None, out_bias, residual, relu=out_relu, layout="NHWC")

    count = _images(x, w1)
    return _join(jax.lax.map(some, _split((x, residual), count)))


def backward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    dout: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of `x`, `w1`, `b1` and `w2`, given that of the second product."""
    xs, douts = _split((x, dout), _images(x, w1))
    in_place = xs.shape == douts.shape  # then each share of dx takes the place of its dout

    def some(i: int, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        sums, dxs = carry
        x, dout = xs[i], (dxs if in_place else douts)[i]
        # Without the barrier XLA adds the bias and takes the ReLU again in each of its uses, which
        # read it value by value: an eighth of the time.
        expanded = jax.lax.optimization_barrier(_expanded(x, w1, b1))
        dw2 = _outer(_shifted(expanded, dh, dw, stride), dout)
        dshifted = product(dout, w2.T, "NHWC")
        if stride > 1:
            gaps = [
                (0, size - (out - 1) * stride - 1, stride - 1)
                for size, out in zip(x.shape[1:3], dout.shape[1:3], strict=True)
            ]
            zero = jnp.zeros((), dshifted.dtype)
            dshifted = jax.lax.pad(dshifted, zero, [(0, 0, 0), *gaps, (0, 0, 0)])
        dexpanded = jnp.where(expanded > 0, shift.gather(dshifted, -dh, -dw), 0)
        db1 = dexpanded.sum((0, 1, 2), dtype=wide_dtype(x.dtype))
        here = (_outer(x, dexpanded), db1, dw2)
        dx = product(dexpanded, w1.T, "NHWC")
        return jax.tree.map(jnp.add, sums, here), dxs.at[i].set(dx)

    weights = (w1, b1, w2)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(x.dtype)), weights)
    start = (zeros, douts if in_place else jnp.zeros_like(xs))
    sums, dxs = jax.lax.fori_loop(0, len(xs), some, start)
    return _join(dxs), *(total.astype(w.dtype) for total, w in zip(sums, weights, strict=True))


def unsupported(x: jax.Array, w1: jax.Array, **_: Any) -> str | None:
    """Why it does not take these arguments; None when it does."""
    if _images(x, w1) == len(x):
        return "the expanded tensor of all images fits the cache"
    return None


def _expanded(x: jax.Array, w1: jax.Array, b1: jax.Array) -> jax.Array:
    return jax.nn.relu(affine(product(x, w1, "NHWC"), None, b1, "NHWC"))


def _shifted(x: jax.Array, dh: np.ndarray, dw: np.ndarray, stride: int) -> jax.Array:
    return shift.gather(x, dh, dw)[:, ::stride, ::stride]


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum over all pixels of their outer products, `[C, K]`, in float32 or wider."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jnp.matmul(x.T, y, preferred_element_type=wide_dtype(x.dtype))


def _images(x: jax.Array, w1: jax.Array) -> int:
    """How many images to take at a time: a divisor of all."""
    count, height, width, _ = x.shape
    most = EXPANDED_BYTES // (height * width * w1.shape[1] * x.dtype.itemsize)
    return max((n for n in range(1, count + 1) if count % n == 0 and n <= most), default=1)


def _split(images: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), images)


def _join(images: jax.Array) -> jax.Array:
    return images.reshape(-1, *images.shape[2:])
