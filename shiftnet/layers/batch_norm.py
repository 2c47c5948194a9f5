"""Batch normalisation with PyTorch's statistics."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.kernels.layouts import Layout, affine, per_channel, wide_dtype
from shiftnet.layers import moments
from shiftnet.layers.moments import other_axes, pixels

EPSILON = 1e-5  # PyTorch's default, which the originals use
MOMENTUM = 0.1  # weight of the new value in the running statistics; likewise


_shares = ContextVar("_shares", default=1)


@contextlib.contextmanager
def per_share(shares: int) -> Iterator[None]:
    """While training is traced within, batches `[N, ...]` are normalised in `shares` equal parts.

    Each has its own statistics, and the first one's go into the running averages, as in PyTorch's
    `DataParallel`. Only calling `BatchNorm` follows this: trace within `only_xla` too.
    """
    token = _shares.set(shares)
    try:
        yield
    finally:
        _shares.reset(token)


class BatchNorm(nnx.Module):
    """Normalises each channel by the batch's mean and variance, or by their running averages.

    `nnx.BatchNorm` keeps the biased variance in its running statistics; PyTorch, and so every
    checkpoint of the originals, keeps the unbiased one (n / (n - 1) times the biased) and
    normalises the training batch by the biased. This layer does as PyTorch does, so that training
    here and loading an original's checkpoint give the original's numbers.

    Under `jax.jit` over a sharded batch the statistics are those of the whole batch, unless it is
    traced within `per_share`.

    Args:
      features: channels.
      affine: False normalises alone, without `scale` and `bias`.

    State: `scale` and `bias` (parameters), `mean` and `var` (running statistics, `nnx.BatchStat`),
    float32 `[features]` each. Statistics are computed in float32 or wider whatever the input's
    dtype; `[..., features]`, or `[H, W, features, N]` in layout HWCN, comes back in the input's
    dtype.
    """

    def __init__(self, features: int, *, affine: bool = True):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32)) if affine else None
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))

    def __call__(self, x: jax.Array, *, train: bool = False, layout: Layout = "NHWC") -> jax.Array:
        wide = wide_dtype(x.dtype)
        if not train:
            scale, bias = self.scale_and_bias(wide)
            return affine(x, scale, bias, layout)
        shares = _shares.get()
        if shares == 1:
            y, mean, var = _normalize(x, *self._affine(wide), layout)
            self._update(mean, var, pixels(x, layout))
            return y
        parts = x.reshape(shares, -1, *x.shape[1:])
        normalize = jax.vmap(lambda part: _normalize(part, *self._affine(wide), layout))
        y, mean, var = normalize(parts)
        self._update(mean[0], var[0], pixels(x, layout) // shares)
        return y.reshape(x.shape)

    def scale_and_bias(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """What it does with its running statistics: `x * scale + bias`, `[features]` each."""
        scale, bias = self._affine(dtype)
        scale = scale * jax.lax.rsqrt(self.var[...].astype(dtype) + EPSILON)
        return scale, bias - self.mean[...].astype(dtype) * scale

    def through(
        self,
        x: jax.Array,
        kernel: jax.Array,
        *,
        train: bool = False,
        layout: Layout = "NHWC",
        offsets: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The kernel and bias of the one product that does `self(x @ kernel)`.

        In training the statistics of `x @ kernel` follow from the mean and the covariance of `x`:
        they are `mean @ kernel` and the diagonal of `kernel.T @ covariance @ kernel`. Where the
        kernel has more outputs than inputs this reads less, and the product need not exist at all.

        Args:
          x: `[..., C]`, or `[H, W, C, N]` in layout HWCN.
          kernel: `[C, features]`.
          train: as of calling it; updates the running statistics likewise.
          layout: of `x`.
          offsets: of `shift`, `(dh, dw)`, int `[features]` each, for `self(shift(x @ kernel))`,
            whose bias is added after the shift; `x` is `[N, H, W, C]` or in HWCN.

        Returns:
          `[C, features]` in the dtype of `x`, and `[features]` in float32 or wider.
        """
        wide = wide_dtype(x.dtype)
        kernel = kernel.astype(wide)
        if train:
            if offsets is None:
                mean, var = moments.of_product(x, kernel, layout)
            else:
                mean, var = moments.of_shifted_product(x, kernel, *offsets, layout)
            self._update(mean, var, pixels(x, layout))
            scale, bias = self._affine(wide)
            scale = scale * jax.lax.rsqrt(var + EPSILON)
            bias = bias - mean * scale
        else:
            scale, bias = self.scale_and_bias(wide)
            # Without the barrier XLA computes the bias again for every value that it is added to.
            # The scale has none: where the kernel is a constant XLA multiplies them once.
            bias = jax.lax.optimization_barrier(bias)
        return (kernel * scale).astype(x.dtype), bias

    def _affine(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        if self.scale is None or self.bias is None:
            shape = self.mean[...].shape
            return jnp.ones(shape, dtype), jnp.zeros(shape, dtype)
        return self.scale[...].astype(dtype), self.bias[...].astype(dtype)

    def _update(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        self.mean[...] = _average(self.mean[...], jax.lax.stop_gradient(mean))
        unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
        self.var[...] = _average(self.var[...], unbiased)


def _average(old: jax.Array, new: jax.Array) -> jax.Array:
    return (1 - MOMENTUM) * old + MOMENTUM * new.astype(old.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The normalised batch, and its mean and biased variance, which carry no gradient.

    Its own gradient, because the one that JAX derives goes over the activations more often: a
    training step of ShiftResNet20 at expansion 3 took 0.43 s on CPU with that, 0.39 s with this.
    """
    return _normalize_forward(x, scale, bias, layout)[0]


def _normalize_forward(x, scale, bias, layout):
    axes = other_axes(x, layout)
    wide = x.astype(scale.dtype)
    mean = wide.mean(axes)
    var = jnp.square(wide - per_channel(mean, layout)).mean(axes)
    inverse = jax.lax.rsqrt(var + EPSILON)
    y = affine(x, scale * inverse, bias - mean * scale * inverse, layout)
    return (y, mean, var), (x, mean, inverse, scale)


def _normalize_backward(layout, residuals, cotangents):
    x, mean, inverse, scale = residuals
    axes = other_axes(x, layout)
    count = pixels(x, layout)
    dy = cotangents[0].astype(scale.dtype)
    wide = x.astype(scale.dtype)
    # Without the barrier XLA finds `wide - mean` in the forward pass and keeps it until now, which
    # costs more memory and time than computing it anew.
    mean = jax.lax.optimization_barrier(mean)
    dbias = dy.sum(axes)
    dscale = (dy * (wide - per_channel(mean, layout))).sum(axes) * inverse
    # scale * inverse * (dy - dbias / count - normalized * dscale / count), with one factor for each
    # of dy and x, so that nothing but those two is read.
    by_dy = scale * inverse
    by_x = -by_dy * inverse * dscale / count
    rest = by_dy * dbias / count + by_x * mean
    by_dy, by_x, rest = (per_channel(value, layout) for value in (by_dy, by_x, rest))
    return (by_dy * dy + by_x * wide - rest).astype(x.dtype), dscale, dbias


_normalize.defvjp(_normalize_forward, _normalize_backward)
