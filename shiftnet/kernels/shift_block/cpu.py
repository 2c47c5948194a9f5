"""The shift block on a CPU: a few images at a time, whose expanded tensor stays in the cache.

The expanded tensor of a whole batch goes to memory and back several times, and each time into pages
that the system must first hand out. Of a few images it fits the second-level cache, and the same
pages serve all of them. The backward pass computes it again, which is cheaper than fetching it.

With a stride s, a channel is read at every s-th row and column only, from one that its offset says:
all channels of one such phase are expanded together, at those pixels.
"""

import functools
from typing import Any, NamedTuple

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
    phases, _ = _phases(x.shape, w1, b1, w2, dh, dw, stride)

    def some(images: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        x, residual = images
        products = [product(phase.shifted(phase.expanded(x)), phase.w2, "NHWC") for phase in phases]
        y = functools.reduce(jnp.add, products)
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
    phases, order = _phases(x.shape, w1, b1, w2, dh, dw, stride)
    xs, douts = _split((x, dout), _images(x, w1))
    in_place = xs.shape == douts.shape  # then each share of dx takes the place of its dout

    def some(i: int, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        sums, dxs = carry
        x, dout = xs[i], (dxs if in_place else douts)[i]
        here, dx = [], []
        for phase in phases:
            # Without the barrier XLA adds the bias and takes the ReLU again in each of its uses,
            # which read it value by value: an eighth of the time.
            expanded = jax.lax.optimization_barrier(phase.expanded(x))
            dw2 = _outer(phase.shifted(expanded), dout)
            dshifted = phase.shifted_back(product(dout, phase.w2.T, "NHWC"), expanded)
            dexpanded = jnp.where(expanded > 0, dshifted, 0)
            db1 = dexpanded.sum((0, 1, 2), dtype=wide_dtype(x.dtype))
            here.append((_outer(phase.pixels(x), dexpanded), db1, dw2))
            dx.append(phase.spread(product(dexpanded, phase.w1.T, "NHWC"), x.shape))
        sums = jax.tree.map(jnp.add, sums, here)
        return sums, dxs.at[i].set(functools.reduce(jnp.add, dx))

    wide = wide_dtype(x.dtype)
    zeros = [
        tuple(jnp.zeros(w.shape, wide) for w in (phase.w1, phase.b1, phase.w2)) for phase in phases
    ]
    start = (zeros, douts if in_place else jnp.zeros_like(xs))
    sums, dxs = jax.lax.fori_loop(0, len(xs), some, start)
    back = np.argsort(order)
    dw1, db1, dw2 = (
        jnp.concatenate(parts, axis).take(back, axis).astype(w.dtype)
        for parts, axis, w in zip(zip(*sums, strict=True), (1, 0, 0), (w1, b1, w2), strict=True)
    )
    return _join(dxs), dw1, db1, dw2


def unsupported(x: jax.Array, w1: jax.Array, *, stride: int, **_: Any) -> str | None:
    """Why it does not take these arguments; None when it does."""
    # With a stride, phases are faster all the same, but with few channels to expand to: 0.9 ms in
    # place of 0.6 ms for 16 images of 32x32 and 16 to 32 channels, 1.3 in place of 1.5 for 96.
    inputs, expanded = w1.shape
    if _images(x, w1) == len(x) and (stride == 1 or expanded < 4 * inputs):
        return "the expanded tensor of all images fits the cache"
    if stride > min(x.shape[1:3]):
        return f"the images have fewer rows or columns than the stride, {stride}"
    return None


class _Phase(NamedTuple):
    """The channels that are read from rows `row`, `row + stride` ..., and columns likewise.

    Attributes:
      row, column, stride: which pixels.
      w1, b1, w2: the weights of these channels.
      dh, dw: their offsets, in pixels of the phase.
      size: rows and columns of the result.
    """

    row: int
    column: int
    stride: int
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    dh: np.ndarray
    dw: np.ndarray
    size: tuple[int, int]

    def pixels(self, x: jax.Array) -> jax.Array:
        return x[:, self.row :: self.stride, self.column :: self.stride]

    def expanded(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(affine(product(self.pixels(x), self.w1, "NHWC"), None, self.b1, "NHWC"))

    def shifted(self, expanded: jax.Array) -> jax.Array:
        # Where an odd size leaves the phase a row or column less, zeros take its place.
        gaps = [(0, n - m) for n, m in zip(self.size, expanded.shape[1:3], strict=True)]
        return shift.gather(jnp.pad(expanded, [(0, 0), *gaps, (0, 0)]), self.dh, self.dw)

    def shifted_back(self, dshifted: jax.Array, like: jax.Array) -> jax.Array:
        moved = shift.gather(dshifted, -self.dh, -self.dw)
        return moved[:, : like.shape[1], : like.shape[2]]

    def spread(self, dx: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The phase's pixels in their places, among zeros."""
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
    """The phases that have channels, and these channels, one phase's after the other's."""
    size = (-(-shape[1] // stride), -(-shape[2] // stride))
    found, order = [], []
    for row, column in np.ndindex(stride, stride):
        channels = np.flatnonzero((dh % stride == row) & (dw % stride == column))
        if len(channels):
            weights = w1[:, channels], b1[channels], w2[channels]
            offsets = dh[channels] // stride, dw[channels] // stride
            found.append(_Phase(row, column, stride, *weights, *offsets, size))
            order.append(channels)
    return found, np.concatenate(order)


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
