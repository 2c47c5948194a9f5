"""Mean and variance of the result of a 1x1 convolution, from the moments of its input.

The mean of `x @ kernel` is that of `x`, times `kernel`; its variances are the diagonal of
`kernel.T @ covariance @ kernel`. Neither needs the product.

Variances are the differences of larger numbers where a kernel cancels what the channels of `x` have
in common. Rounding then leaves an error of about `bound = eps * (|kernel|.T @ s)^2`, where `s` are
the channels' standard deviations and `eps` is the dtype's resolution, since a sum of squares cannot
hold more digits: of batches of 2^17 pixels it was 0.35 to 2 of that, in plain XLA on a CPU of 2^20
up to 11. No variance below `bound` is returned. So where channels nearly cancel, inverse standard
deviations are less accurate than the product's own variance would make them (2.1 times too large at
most, of all that was tried), but they are never NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.covariance import covariance
from shiftnet.kernels.covariance.xla import EXACT
from shiftnet.kernels.layouts import pixels, pointwise_conv


def of_product(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of `x @ kernel`, `[features]` each, in the dtype of `kernel`.

    Args:
      x: `[..., C]`.
      kernel: `[C, features]`.
    """
    total, products = (value / pixels(x) for value in _sums(x, None))
    var = (kernel * _exact(products, kernel)).sum(0)
    return _exact(total, kernel), jnp.maximum(var, _least_variance(products, kernel))


def of_shifted_product(
    x: jax.Array, kernel: jax.Array, dh: np.ndarray, dw: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of `shift(x @ kernel)`, in the dtype of `kernel`.

    A shift drops rows and columns at the border and brings in zeros. So its sums are those over all
    pixels, less those rows and those columns, plus the corners where they cross.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[C, features]`.
      dh, dw: offsets, int `[features]` each.

    Returns:
      `[features]` each.
    """
    height, width = x.shape[1:3]
    rows, columns = _border(x, dh, 1), _border(x, dw, 2)
    corners = _border(rows, dw, 2)
    sums = [_sums(x, None)]
    # Where nothing depends on it but rounding, as values far from 0 lose digits.
    centre = jax.lax.stop_gradient(sums[0][0] / pixels(x))
    sums += [
        _sums(part, centre, kept) for part, kept in ((rows, "h"), (columns, "w"), (corners, "hw"))
    ]

    # Channels by offset, `[O, M]`: which ones, as many as the most have; and where each one is.
    offsets, group = np.unique(np.stack([dh, dw]), axis=1, return_inverse=True)
    group = group.ravel()  # NumPy 2.0 gives it another shape
    members = [np.flatnonzero(group == one) for one in range(offsets.shape[1])]
    table = np.stack([np.resize(channels, max(map(len, members))) for channels in members])
    place = np.zeros_like(group)
    for channels in members:
        place[channels] = np.arange(len(channels))
    w = kernel[:, table].transpose(1, 0, 2)  # [O, C, M]

    drops = [_dropped(height, offsets[0]), _dropped(width, offsets[1])]
    both = drops[0][:, :, None] & drops[1][:, None]
    total, products = (
        (every - _choose(drops[0], row) - _choose(drops[1], column) + _choose(both, corner))
        / pixels(x)
        for every, row, column, corner in zip(*sums, strict=True)
    )
    mean = _exact(total[:, None], w)[:, 0]
    # A pixel that is kept is `at` and what the products are of; one that is brought in is 0.
    at = _exact(centre, w)
    kept = [np.maximum(0, 1 - abs(o) / n) for o, n in zip(offsets, (height, width), strict=True)]
    share = jnp.asarray(kept[0] * kept[1], kernel.dtype)[:, None]
    rest = mean - share * at
    square = (w * _exact(products, w)).sum(1)
    var = square - rest * rest + (1 - share) * at * (2 * rest + share * at)
    least = _least_variance(sums[0][1] / pixels(x), kernel)
    return mean[group, place], jnp.maximum(var[group, place], least)


def _least_variance(covariance: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the `bound` of this module's docstring, `[features]`, without gradients."""
    # Of a channel that is nearly constant, rounding may leave less than nothing.
    variances = jnp.maximum(jax.lax.stop_gradient(jnp.diagonal(covariance)), 0)
    deviations = jnp.sqrt(variances)
    largest = _exact(deviations, jnp.abs(jax.lax.stop_gradient(kernel)))
    return jnp.finfo(kernel.dtype).eps * jnp.square(largest)


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=EXACT)


def _border(x: jax.Array, offsets: np.ndarray, axis: int) -> jax.Array:
    """Returns the rows, or columns, that any of the shifts drops: the first ones and the last."""
    size = x.shape[axis]
    first, last = _border_sizes(size, offsets)
    ends = (jax.lax.slice_in_dim(x, *e, axis=axis) for e in ((0, first), (size - last, size)))
    return jnp.concatenate(list(ends), axis)


def _border_sizes(size: int, offsets: np.ndarray) -> tuple[int, int]:
    first = min(max(0, *offsets.tolist()), size)
    return first, min(max(0, *(-offsets).tolist()), size - first)


def _dropped(size: int, offsets: np.ndarray) -> np.ndarray:
    """Returns which of them each shift drops, bool `[O, of the border]`."""
    first, last = _border_sizes(size, offsets)
    position = np.r_[0:first, size - last : size]
    read = position - offsets[:, None]  # by the output at that place
    return (read < 0) | (read >= size)


def _choose(chosen: np.ndarray, sums: jax.Array) -> jax.Array:
    """Returns, for each row of `chosen`, the sum of the `sums` that it chooses."""
    axes = chosen.ndim - 1
    weights = jnp.asarray(chosen, sums.dtype)
    return jnp.tensordot(weights, sums, axes, precision=EXACT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sums(x: jax.Array, centre: jax.Array | None, kept: str = "") -> tuple[jax.Array, jax.Array]:
    """Returns the sum of `x`, `[C]`, and that of the outer products of `x - centre`, `[C, C]`.

    Both are taken in float32 or wider, over all pixels, or for each row ("h"), column ("w") or both
    ("hw"), which are the first axes then. Without a centre it is the mean. It has no gradient.
    """
    return _sums_forward(x, centre, kept)[0]


def _sums_forward(x, centre, kept):
    total, products = covariance(x, centre, kept)
    middle = total / pixels(x) if centre is None else centre
    return (total, products), (x, middle, centre)


def _sums_backward(kept, residuals, cotangents):
    x, centre, given = residuals
    dcentre = jax.tree.map(jnp.zeros_like, given)
    dtotal, dproducts = cotangents
    # (x - centre) @ kernel + dtotal
    kernel = dproducts + dproducts.swapaxes(-1, -2)
    rest = (dtotal - centre @ kernel).astype(x.dtype)
    kernel = kernel.astype(x.dtype)
    if not kept:
        return pointwise_conv(x, kernel) + rest, dcentre
    dx = jnp.einsum(f"nhwc,{kept}ck->nhwk", x, kernel)
    return dx + jnp.expand_dims(
        rest, [i for i, axis in enumerate("hw") if axis not in kept]
    ), dcentre


_sums.defvjp(_sums_forward, _sums_backward)
