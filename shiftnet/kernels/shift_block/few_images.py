"""The shift block in plain XLA on a few images at a time, whose expanded tensor fits the cache.

Used on a CPU where `cpu` has no compiled code: without a compiler, and for other dtypes.

The expanded tensor of a whole batch is written to memory and read again several times, each time in
pages that the system must allocate first. That of a few images fits the caches, and the same pages
are used for all of them; a small batch is computed at once. The backward pass recomputes it, which
is cheaper than reading it from memory.

With a stride s, a channel is read at every s-th row and column only, starting at one that depends
on its offset: all channels of one such phase are expanded together, at those pixels. If they are
many, the channels that read from one row form a phase of their own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import affine, pointwise_conv, wide_dtype
from shiftnet.kernels.operation import Epilogue, finish
from shiftnet.kernels.shift.xla import Stretches, inside

# Bytes of the expanded tensor of the images computed at a time, without padding. Whole networks at
# 128 images on a Xeon with 2 cores: inference with 13 MiB takes 0.72 of the time with 5 MiB at
# expansion 3, 0.87 at 6, 0.97 at 9 and the same at 1; 30 MiB are no faster. A training step with
# 13 MiB instead of 5 MiB forward takes 0.89 of the time at expansion 3 and the same at 9; more than
# 5 MiB backward gain nothing.
FORWARD_BYTES, BACKWARD_BYTES = 13 << 20, 5 << 20
# Channels per input that a row must have to form a phase of its own. A shift then selects among 3
# slices instead of 9, while narrower products and the sum of their results cost more: 0.7 to 0.9 of
# the time with 3 (expansion 9), 0.8 to 1.2 with 2, 1.1 to 3 times with 1 or less.
CHANNELS_OF_ROW = 3


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
    """Computes `shift_block` in NHWC."""
    phases, _ = _phases(x.shape, w1, b1, w2, dh, dw, stride)

    def some(images: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        x, residual = images
        products = [_product(phase.shifted(phase.expanded(x)), phase.w2) for phase in phases]
        y = functools.reduce(jnp.add, products).astype(x.dtype)
        return finish(y, Epilogue(None, out_bias, residual), out_relu)

    count = _images(x, w1, FORWARD_BYTES)
    if count == len(x):
        return some((x, residual))
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
    """Returns the gradients of `x`, `w1`, `b1` and `w2`; `dout` is that of the second product."""
    phases, order = _phases(x.shape, w1, b1, w2, dh, dw, stride)

    def gradients(x: jax.Array, dout: jax.Array) -> tuple[Any, jax.Array]:
        weights, dx = [], []
        for phase in phases:
            expanded = phase.expanded(x)
            dshifted = pointwise_conv(phase.back.line(dout), phase.w2.T, "NHWC")
            dexpanded = phase.shifted_back(dshifted, expanded)
            db1 = dexpanded.sum((0, 1, 2), dtype=wide_dtype(x.dtype))
            # XLA's library computes a wide result in half the time of a tall one.
            transposed_dw2 = _outer(dout, phase.shifted(expanded))
            weights.append((_outer(phase.pixels(x), dexpanded), db1, transposed_dw2))
            dx.append(phase.spread(_product(dexpanded, phase.w1.T), x.shape))
        return weights, functools.reduce(jnp.add, dx).astype(x.dtype)

    count = _images(x, w1, BACKWARD_BYTES)
    if count == len(x):
        sums, dx = gradients(x, dout)
    else:
        sums, dx = _loop(gradients, *_split((x, dout), count))
    back = np.argsort(order)
    dw1, db1, transposed_dw2 = (
        jnp.concatenate(parts, -1).take(back, -1) for parts in zip(*sums, strict=True)
    )
    dw2 = jax.lax.optimization_barrier(transposed_dw2).T  # or XLA transposes the product
    return dx, dw1.astype(w1.dtype), db1.astype(b1.dtype), dw2.astype(w2.dtype)


def _loop(
    gradients: Callable[..., tuple[Any, jax.Array]], xs: jax.Array, douts: jax.Array
) -> tuple[Any, jax.Array]:
    """Returns the summed gradients of the weights, and the gradients of all `xs`."""
    in_place = xs.shape == douts.shape  # then each part of dx overwrites its dout

    def step(i: int, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        sums, dxs = carry
        # Without the barrier XLA fuses this slice with its consumers, and then copies everything.
        dout = jax.lax.optimization_barrier((dxs if in_place else douts)[i])
        weights, dx = gradients(xs[i], dout)
        return jax.tree.map(jnp.add, sums, weights), dxs.at[i].set(dx)

    shapes, _ = jax.eval_shape(gradients, xs[0], douts[0])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    start = (zeros, douts if in_place else jnp.zeros_like(xs))
    sums, dxs = jax.lax.fori_loop(0, len(xs), step, start)
    return sums, _join(dxs)


def unsupported(x: jax.Array, w1: jax.Array, w2: jax.Array, *, stride: int, **_: Any) -> str | None:
    """Returns why these arguments are not supported, in one clause, or None."""
    # For 16 images of 32x32, phases take 1.2 to 1.6 times as long as plain XLA with 16 to 32
    # channels, and 0.5 to 0.7 times as long with 16 to 96.
    del w2
    inputs, expanded = w1.shape
    if not x.size:
        return f"the shape is {x.shape}, without any element"
    if stride > 1 and expanded < 4 * inputs and _images(x, w1, BACKWARD_BYTES) == len(x):
        return "the expanded tensor of all images fits the cache and has few channels"
    if stride > min(x.shape[1:3]):
        return f"the images have fewer rows or columns than the stride, {stride}"
    return None


class _Phase(NamedTuple):
    """The channels that are read from rows `row`, `row + stride` ..., and columns likewise.

    Attributes:
      row, column, stride: which pixels.
      filled: rows and columns of these; up to the size of the result, zeros follow.
      w1, b1, w2: the weights of these channels.
      shift: as large as the result, its offsets in pixels of the phase.
    """

    row: int
    column: int
    stride: int
    filled: tuple[int, int]
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    shift: Stretches

    @property
    def back(self) -> Stretches:
        return self.shift._replace(dh=-self.shift.dh, dw=-self.shift.dw)

    def pixels(self, x: jax.Array) -> jax.Array:
        mine = x[:, self.row :: self.stride, self.column :: self.stride]
        gaps = [(0, n - m) for n, m in zip(self.shift.size, self.filled, strict=True)]
        return jnp.pad(mine, [(0, 0), *gaps, (0, 0)])

    def expanded(self, x: jax.Array) -> jax.Array:
        """Returns the first product, in a line, before bias and ReLU."""
        return pointwise_conv(self.shift.line(self.pixels(x)), self.w1, "NHWC")

    def shifted(self, expanded: jax.Array) -> jax.Array:
        y = jax.nn.relu(affine(self.shift.moved(expanded), None, self.b1, "NHWC"))
        return jnp.where(inside(*self.shift, self.filled), y, 0)

    def shifted_back(self, dshifted: jax.Array, expanded: jax.Array) -> jax.Array:
        dexpanded = self.back.moved(dshifted)
        positive = affine(self.shift.unmoved(expanded), None, self.b1, "NHWC") > 0
        still = np.zeros_like(self.shift.dh)
        known = inside(*self.back) & inside(still, still, self.shift.size, self.filled)
        return jnp.where(positive & known, dexpanded, 0)

    def spread(self, dx: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns an image of the phase's pixels, with zeros at all others."""
        gaps = [
            (first, n - first - (m - 1) * self.stride - 1, self.stride - 1)
            for first, n, m in zip((self.row, self.column), shape[1:3], dx.shape[1:3], strict=True)
        ]
        return jax.lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])


def _phases(
    shape: tuple[int, ...],
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> tuple[list[_Phase], np.ndarray]:
    """Returns the phases that have channels, and the concatenated channels of all phases."""
    rows, columns = shape[1:3]
    size = (-(-rows // stride), -(-columns // stride))
    found, order = [], []
    for row, column in np.ndindex(stride, stride):
        all_rows = np.flatnonzero((dh % stride == row) & (dw % stride == column))
        if not len(all_rows):
            continue
        by_row = [all_rows[dh[all_rows] == offset] for offset in np.unique(dh[all_rows])]
        apart = min(map(len, by_row)) >= CHANNELS_OF_ROW * len(w1)
        for channels in by_row if apart else [all_rows]:
            weights = w1[:, channels], b1[channels], w2[channels]
            filled = len(range(row, rows, stride)), len(range(column, columns, stride))
            shift = Stretches(dh[channels] // stride, dw[channels] // stride, size)
            found.append(_Phase(row, column, stride, filled, *weights, shift))
            order.append(channels)
    return found, np.concatenate(order)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns a phase's part of a sum, `[N, H, W, K]`, in float32 or wider."""
    return jnp.matmul(x, w, preferred_element_type=wide_dtype(x.dtype))


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the sum of the pixels' outer products, `[C, K]`, in float32 or wider."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jnp.matmul(x.T, y, preferred_element_type=wide_dtype(x.dtype))


def _images(x: jax.Array, w1: jax.Array, most_bytes: int) -> int:
    """Returns the number of images to compute at a time: a divisor of the batch size."""
    count, height, width, _ = x.shape
    most = most_bytes // (height * width * w1.shape[1] * x.dtype.itemsize)
    return max((n for n in range(1, count + 1) if count % n == 0 and n <= most), default=1)


def _split(images: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), images)


def _join(images: jax.Array) -> jax.Array:
    return images.reshape(-1, *images.shape[2:])
