"""Mean and variance of what a product gives, from those of what it is given.

The mean of `x @ kernel` is that of `x`, times `kernel`; its variances are the diagonal of
`kernel.T @ covariance @ kernel`. Neither needs the product.

Variances are the differences of larger numbers where a kernel cancels what the channels of `x` have
in common. Rounding then leaves an error below `bound = eps * (|kernel|.T @ s)^2`, where `s` are the
channels' standard deviations and `eps` is the dtype's resolution (the largest error found was 0.35
of that, over batches of 2^17 pixels), since a sum of squares cannot hold more digits. No variance
below `bound` is returned. So an inverse standard deviation has a relative error of at most
`min(1, bound / variance)`: values normalised by it can be less accurate than those normalised by
the product's own variance, but they are never inflated, and never NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import (
    CHANNELS,
    ROWS,
    Layout,
    from_nhwc,
    per_channel,
    product,
    wide_dtype,
)

# Factors that GPUs and TPUs round by default would show in variances much smaller than the largest.
EXACT = jax.lax.Precision.HIGHEST


def of_product(x: jax.Array, kernel: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of `x @ kernel`, `[features]` each, in the dtype of `kernel`."""
    total, products = (value / pixels(x, layout) for value in _sums(x, None, layout))
    var = (kernel * _exact(products, kernel)).sum(0)
    return _exact(total, kernel), jnp.maximum(var, _least_variance(products, kernel))


def of_shifted_product(
    x: jax.Array, kernel: jax.Array, dh: np.ndarray, dw: np.ndarray, layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of `shift(x @ kernel)`, `[features]` each, in the dtype of `kernel`.

    A shift drops rows and columns at the border and brings in zeros: what is summed for it are all
    pixels, without those rows and those columns, with the corners where they cross.
    """
    axis = ROWS[layout]
    height, width = x.shape[axis : axis + 2]
    rows, columns = _border(x, dh, axis), _border(x, dw, axis + 1)
    corners = _border(rows, dw, axis + 1)
    sums = [_sums(x, None, layout)]
    # Where nothing depends on it but rounding, as values far from 0 lose digits.
    centre = jax.lax.stop_gradient(sums[0][0] / pixels(x, layout))
    sums += [
        _sums(part, centre, layout, kept)
        for part, kept in ((rows, "h"), (columns, "w"), (corners, "hw"))
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
        / pixels(x, layout)
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
    least = _least_variance(sums[0][1] / pixels(x, layout), kernel)
    return mean[group, place], jnp.maximum(var[group, place], least)


def _least_variance(covariance: jax.Array, kernel: jax.Array) -> jax.Array:
    """The `bound` of this module's docstring, `[features]`, without gradients."""
    deviations = jnp.sqrt(jax.lax.stop_gradient(jnp.diagonal(covariance)))
    largest = _exact(deviations, jnp.abs(jax.lax.stop_gradient(kernel)))
    return jnp.finfo(kernel.dtype).eps * jnp.square(largest)


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=EXACT)


def pixels(x: jax.Array, layout: Layout) -> int:
    """How many, of all images."""
    return x.size // x.shape[_channels(x, layout)]


def _channels(x: jax.Array, layout: Layout) -> int:
    return x.ndim - 1 if layout == "NHWC" else CHANNELS[layout]


def other_axes(x: jax.Array, layout: Layout) -> tuple[int, ...]:
    """All but the channels'."""
    return tuple(axis for axis in range(x.ndim) if axis != _channels(x, layout))


def _border(x: jax.Array, offsets: np.ndarray, axis: int) -> jax.Array:
    """The rows, or columns, that any of the shifts drops: the first ones and the last."""
    size = x.shape[axis]
    first, last = _border_sizes(size, offsets)
    ends = (jax.lax.slice_in_dim(x, *e, axis=axis) for e in ((0, first), (size - last, size)))
    return jnp.concatenate(list(ends), axis)


def _border_sizes(size: int, offsets: np.ndarray) -> tuple[int, int]:
    first = min(max(0, *offsets.tolist()), size)
    return first, min(max(0, *(-offsets).tolist()), size - first)


def _dropped(size: int, offsets: np.ndarray) -> np.ndarray:
    """Which of them each shift drops, bool `[O, of the border]`."""
    first, last = _border_sizes(size, offsets)
    position = np.r_[0:first, size - last : size]
    read = position - offsets[:, None]  # by the output at that place
    return (read < 0) | (read >= size)


def _choose(chosen: np.ndarray, sums: jax.Array) -> jax.Array:
    """For each row of `chosen`, the sum of the `sums` it chooses."""
    axes = chosen.ndim - 1
    weights = jnp.asarray(chosen, sums.dtype)
    return jnp.tensordot(weights, sums, axes, precision=EXACT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sums(
    x: jax.Array, centre: jax.Array | None, layout: Layout, kept: str = ""
) -> tuple[jax.Array, jax.Array]:
    """Sums of `x`, `[C]`, and of the products of `x - centre`, `[C, C]`, in float32 or wider.

    Over all pixels, or of each row ("h"), column ("w") or both ("hw"), which come first then. No
    centre is the mean; it has no gradient.
    """
    return _sums_forward(x, centre, layout, kept)[0]


def _sums_forward(x, centre, layout, kept):
    wide = x.astype(wide_dtype(x.dtype))
    batch = tuple(map(layout.lower().index, kept))
    others = tuple(axis for axis in other_axes(x, layout) if axis not in batch)
    total = wide.sum(others)
    given, centre = centre, total / pixels(x, layout) if centre is None else centre
    centred = wide - per_channel(centre, layout)
    if layout == "NHWC" and not kept:  # which XLA's CPU need not transpose
        centred, others = centred.reshape(-1, centred.shape[-1]), (0,)
    dimensions = ((others, others), (batch, batch))
    products = jax.lax.dot_general(centred, centred, dimensions, precision=EXACT)
    return (total, products), (x, centre, given)


def _sums_backward(layout, kept, residuals, cotangents):
    x, centre, given = residuals
    dcentre = jax.tree.map(jnp.zeros_like, given)
    dtotal, dproducts = cotangents
    # (x - centre) @ kernel + dtotal
    kernel = dproducts + dproducts.swapaxes(-1, -2)
    rest = (dtotal - centre @ kernel).astype(x.dtype)
    kernel = kernel.astype(x.dtype)
    if not kept:
        return product(x, kernel, layout) + per_channel(rest, layout), dcentre
    axes = layout.lower()
    dx = jnp.einsum(f"{axes},{kept}ck->{axes.replace('c', 'k')}", x, kernel)
    rest = jnp.expand_dims(rest, [i for i, axis in enumerate("hw") if axis not in kept])
    return dx + from_nhwc(rest[None], layout), dcentre


_sums.defvjp(_sums_forward, _sums_backward)
