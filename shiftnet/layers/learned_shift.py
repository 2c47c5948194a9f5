"""Shifts whose offsets are learned.

Jeon and Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018,
arXiv:1806.07370 ("active"); Chen et al., "All You Need is a Few Shifts: Designing Efficient
Convolutional Neural Networks for Image Classification", CVPR 2019, arXiv:1903.05285 ("sparse").
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.errors import unknown
from shiftnet.kernels import checks
from shiftnet.kernels.conv import conv
from shiftnet.kernels.layouts import wide_dtype
from shiftnet.kernels.shift import Offsets, shift
from shiftnet.quantizers.form import straight_through

KINDS = ("active", "sparse")
REACH = 3  # pixels that an offset may have in each direction; ours, the papers set no limit
# Length of the gradient of one channel's offsets, once it is normalized: the multiplier of their
# learning rate in the code published with arXiv:1806.07370.
ACTIVE_RATE = 0.001


class LearnedShift(nnx.Module):
    """Moves every channel by an offset of its own, which training changes; zeros come in.

    "active": offsets are real numbers, and the shift interpolates bilinearly. Their gradient is
    divided by its length over the two offsets of a channel, so that only its direction counts.

    "sparse": offsets are rounded (ties to even). The gradient to the images is that of this shift,
    the gradient to the offsets that of the bilinear one at the real offsets. `penalty` pulls
    offsets to zero, where a channel need not move.

    The derivative at whole offsets, where the bilinear shift has a kink, is the mean of both
    sides'. Offsets beyond ±`REACH` count as ±`REACH`, and keep their gradient, the one just inside.

    Args:
      features: channels.
      kind: `"active"` or `"sparse"`.
      rngs: the `params` stream draws the offsets, uniform in [-1, 1).

    Attributes:
      rows, columns: parameters, float32 `[features]` each: the pixel (h, w) reads from
        (h + rows, w + columns).
      offsets: the rounded ones as constants of the program, once folded; None before, and for
        `"active"`.

    Raises:
      UserError: for an unknown kind.
      ValueError: when called on an input that is not floating or has other channels.
    """

    def __init__(self, features: int, kind: str, *, rngs: nnx.Rngs):
        if kind not in KINDS:
            raise unknown("kind of learned shift", kind, KINDS)
        draws = jax.random.uniform(rngs.params(), (2, features), jnp.float32, -1, 1)
        self.rows, self.columns = nnx.Param(draws[0]), nnx.Param(draws[1])
        self.kind = kind
        self.offsets: Offsets | None = None

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Shifts `[N, H, W, features]`, floating; the result has its shape and dtype."""
        checks.images("LearnedShift", x, self.rows.shape[0])
        if self.offsets is not None:
            return shift(x, offsets=self.offsets)
        wide = wide_dtype(x.dtype)
        rows, columns = self.rows[...].astype(wide), self.columns[...].astype(wide)
        if self.kind == "sparse" and not train:
            return _moved(x, _rounded(rows), _rounded(columns))
        if self.kind == "active":
            rows, columns = normalized_gradient(rows, columns)
        kernel = bilinear(_within(rows), _within(columns))
        if self.kind == "sparse":
            kernel = straight_through(bilinear(_rounded(rows), _rounded(columns)), kernel)
        return conv(x, kernel.astype(x.dtype), groups=x.shape[-1])

    def fold(self) -> None:
        """Makes rounded offsets constants, so that shifts take the fast kernels."""
        if self.kind == "sparse":
            for offsets in (self.rows, self.columns):
                offsets.set_value(_rounded(offsets[...]))
            rows, columns = (np.asarray(o[...]).astype(int) for o in (self.rows, self.columns))
            self.offsets = Offsets(tuple(rows.tolist()), tuple(columns.tolist()))

    def penalty(self) -> jax.Array | float:
        """Returns the sum of the offsets' magnitudes; 0 for `"active"`."""
        if self.kind == "active":
            return 0.0
        return _magnitude(self.rows[...]).sum() + _magnitude(self.columns[...]).sum()


def shift_penalty(network: nnx.Module) -> jax.Array | float:
    """Returns the sum of all shifts' penalties."""
    shifts = [m for _, m in nnx.iter_modules(network) if isinstance(m, LearnedShift)]
    return sum((module.penalty() for module in shifts), start=0.0)


def fold_shifts(network: nnx.Module) -> None:
    """Makes the rounded offsets of every learned shift constants of the network."""
    for _, module in nnx.iter_modules(network):
        if isinstance(module, LearnedShift):
            module.fold()


def bilinear(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns the depthwise kernel of a bilinear shift by these offsets.

    Args:
      rows, columns: `[C]`, each within ±`REACH`.

    Returns:
      `[2 * REACH + 1, 2 * REACH + 1, 1, C]` in their dtype.
    """
    taps = jnp.arange(-REACH, REACH + 1, dtype=rows.dtype)[:, None]
    by_row, by_column = (jnp.maximum(0, 1 - _magnitude(taps - o)) for o in (rows, columns))
    return (by_row[:, None] * by_column)[:, :, None]


def _magnitude(x: jax.Array) -> jax.Array:
    """|x|, with the derivative 0 at 0; that of `jnp.abs` is 1 there (JAX 0.11)."""
    return jnp.maximum(x, -x)


def _within(offsets: jax.Array) -> jax.Array:
    # At ±REACH itself the derivative needs the tap beyond, which the kernel does not have.
    most = np.nextafter(np.array(REACH, offsets.dtype), np.array(0, offsets.dtype))
    return straight_through(jnp.clip(offsets, -most, most), offsets)


def _rounded(offsets: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(offsets), -REACH, REACH)


def _moved(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The shift by whole offsets that are not known while the program is traced."""
    _, height, width, channels = x.shape
    h = jnp.arange(height, dtype=jnp.int32)[:, None, None] + rows.astype(jnp.int32)
    w = jnp.arange(width, dtype=jnp.int32)[:, None] + columns.astype(jnp.int32)
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    h, w = h.clip(0, height - 1), w.clip(0, width - 1)
    position = (h * width + w) * channels + jnp.arange(channels, dtype=jnp.int32)
    values = x.reshape(len(x), position.size)[:, position.reshape(-1)].reshape(x.shape)
    return jnp.where(inside, values, jnp.zeros((), x.dtype))


@jax.custom_vjp
def normalized_gradient(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns its arguments, with gradients of length `ACTIVE_RATE` per channel, or zero."""
    return rows, columns


def _normalized_forward(rows, columns):
    return (rows, columns), None


def _normalized_backward(_, cotangents):
    length = jnp.sqrt(sum(jnp.square(gradient) for gradient in cotangents))
    factor = jnp.where(length > 0, ACTIVE_RATE / jnp.where(length > 0, length, 1), 0)
    return tuple(gradient * factor for gradient in cotangents)


normalized_gradient.defvjp(_normalized_forward, _normalized_backward)
