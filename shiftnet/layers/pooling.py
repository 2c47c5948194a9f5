"""Pooling over windows."""

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.implementations import platform


def average_pool(x: jax.Array) -> jax.Array:
    """Takes means of 3x3 windows at stride 2, `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), C]`.

    One pixel of zeros is added around and counts: every sum is divided by 9.
    """
    # flax's avg_pool divides by an integer, which strict type promotion forbids (0.12.12).
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), padding) / 9


def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 3x3 windows at stride 2, `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), C]`.

    The gradient goes to the first of equal maxima, row by row.
    """
    return _by_place(x) if platform() == "cpu" else _max_pool(x)


def _max_pool(x: jax.Array) -> jax.Array:
    # Padded apart for jax2onnx, whose max pooling takes no padding in numbers (0.17.1); XLA joins
    # the two again, in gradients too.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")


@jax.custom_vjp
def _by_place(x: jax.Array) -> jax.Array:
    """Does the same, with a gradient that XLA vectorises on a CPU.

    The one that JAX derives is a loop over single values there: 16 images of 112x112x64 took 0.3 s
    of one core, a fifth of what a training step of ResNet-18 took both.
    """
    return _max_pool(x)


def _by_place_forward(x):
    y = _max_pool(x)
    height, width = x.shape[1:3]
    below, right = 1 + height % 2, 1 + width % 2
    padded = jnp.pad(x, ((0, 0), (1, below), (1, right), (0, 0)), constant_values=-jnp.inf)
    place = jnp.full(y.shape, -1, jnp.int8)  # of the maximum in its window, 3 * row + column
    for number in reversed(range(9)):
        row, column = divmod(number, 3)
        values = padded[:, row:, column:][:, ::2, ::2][:, : y.shape[1], : y.shape[2]]
        place = jnp.where(values == y, jnp.int8(number), place)
    return y, (place, jnp.zeros((0, height, width)))


def _by_place_backward(residuals, dy):
    place, like = residuals  # `like` has the image's size
    _, height, width, _ = dy.shape
    more = ((0, 0), (0, 1), (0, 1), (0, 0))  # windows that begin beyond the image
    place, dy = jnp.pad(place, more, constant_values=-1), jnp.pad(dy, more)

    def from_windows(row: int, column: int) -> jax.Array:
        """What the pixels at this place of a window get from it."""
        top, left = int(row == 0), int(column == 0)
        here = (slice(None), slice(top, top + height), slice(left, left + width))
        return jnp.where(place[here] == 3 * row + column, dy[here], 0)

    # Even pixels are the middle of a window, odd ones the end of one and the start of the next.
    taps = ((1,), (2, 0))
    parts = [
        [sum(from_windows(row, column) for row in rows for column in columns) for columns in taps]
        for rows in taps
    ]
    pixels = jnp.stack([jnp.stack(row, 3) for row in parts], 2)
    dx = pixels.reshape(len(dy), 2 * height, 2 * width, -1)
    return (dx[:, : like.shape[1], : like.shape[2]],)


_by_place.defvjp(_by_place_forward, _by_place_backward)
