"""Batch normalisation with PyTorch's statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.kernels import checks
from shiftnet.kernels.batch_norm import batch_norm
from shiftnet.kernels.layouts import affine, pixels, wide_dtype
from shiftnet.kernels.operation import Epilogue, Relu, finish

EPSILON = 1e-5  # PyTorch's default, which the originals use
MOMENTUM = 0.1  # weight of the new value in the running statistics; likewise


class BatchNorm(nnx.Module):
    """Normalises each channel by the batch's mean and variance, or by their running averages.

    `nnx.BatchNorm` keeps the biased variance in its running statistics; PyTorch, and so every
    checkpoint of the originals, keeps the unbiased one (n / (n - 1) times the biased) and
    normalises the training batch by the biased. This layer does as PyTorch does, so that training
    here and loading an original's checkpoint give the original's numbers.

    Under `jax.jit` over a sharded batch the statistics are those of the whole batch; within
    `jax.shard_map` they are those of the device's part.

    Args:
      features: channels.
      affine: False normalises alone, without `scale` and `bias`.

    Calling it takes a ReLU and an addition after it, `out_relu` and `residual` of
    `shiftnet.kernels.batch_norm`, which on a CPU are part of the same passes in training.

    State: `scale` and `bias` (parameters), `mean` and `var` (running statistics, `nnx.BatchStat`),
    float32 `[features]` each. Statistics are computed in float32 or wider whatever the input's
    dtype; `[..., features]` comes back in the input's dtype. After `fold` there are no running
    statistics, and no training.

    Raises:
      ValueError: when called on an input that is not floating, has other channels, or, in training,
        has no pixels.
    """

    def __init__(self, features: int, *, affine: bool = True):
        self.features = features
        self.scale = nnx.data(nnx.Param(jnp.ones(features, jnp.float32)) if affine else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros(features, jnp.float32)) if affine else None)
        self.mean: Any = nnx.data(nnx.BatchStat(jnp.zeros(features, jnp.float32)))
        self.var: Any = nnx.data(nnx.BatchStat(jnp.ones(features, jnp.float32)))

    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        out_relu: Relu = False,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        checks.channels("BatchNorm", x, self.features)
        wide = wide_dtype(x.dtype)
        if not train:
            y = affine(x, *self.scale_and_bias(wide))
            return finish(y, Epilogue(residual=residual), out_relu)
        if x.size == 0:
            raise ValueError(f"BatchNorm needs pixels to train on, got the shape {x.shape}")
        after: dict[str, Any] = {"out_relu": out_relu, "residual": residual}
        y, mean, var = batch_norm(x, *self._affine(wide), epsilon=EPSILON, **after)
        self.update(mean, var, pixels(x))
        return y

    def scale_and_bias(
        self, dtype: jnp.dtype, statistics: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what it multiplies by and then adds, `[features]` each.

        Args:
          dtype: of the results.
          statistics: mean and biased variance, `[features]` each; None takes the running ones.
        """
        scale, bias = self._affine(dtype)
        if statistics is None:
            if self.mean is None or self.var is None:
                return scale, bias
            statistics = self.mean[...].astype(dtype), self.var[...].astype(dtype)
        mean, var = statistics
        scale = scale * jax.lax.rsqrt(var + EPSILON)
        return scale, bias - mean * scale

    def update(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        """Moves the running statistics towards those of a batch.

        Args:
          mean: `[features]`.
          var: biased, `[features]`.
          count: pixels that they are taken over.

        Raises:
          ValueError: where the running statistics are folded.
        """
        if self.mean is None or self.var is None:
            raise ValueError("a network whose batch norms are folded cannot be trained")
        self.mean[...] = _average(self.mean[...], jax.lax.stop_gradient(mean))
        unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
        self.var[...] = _average(self.var[...], unbiased)

    def fold(self) -> None:
        """Makes the running statistics part of `scale` and `bias`, computed in float64."""
        if self.mean is None or self.var is None:
            return
        mean, var = (np.asarray(stat[...], np.float64) for stat in (self.mean, self.var))
        scale, bias = 1 / np.sqrt(var + EPSILON), np.zeros_like(mean)
        if self.scale is not None and self.bias is not None:
            scale = scale * np.asarray(self.scale[...], np.float64)
            bias = np.asarray(self.bias[...], np.float64)
        self.set_folded(*(jnp.asarray(v, jnp.float32) for v in (scale, bias - mean * scale)))

    def set_folded(self, scale: jax.Array, bias: jax.Array) -> None:
        """Sets `scale` and `bias`, float32 `[features]` each, and drops the running statistics."""
        self.scale, self.bias = nnx.Param(scale), nnx.Param(bias)
        self.mean = self.var = None

    def _affine(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        if self.scale is None or self.bias is None:
            return jnp.ones(self.features, dtype), jnp.zeros(self.features, dtype)
        return self.scale[...].astype(dtype), self.bias[...].astype(dtype)


def _average(old: jax.Array, new: jax.Array) -> jax.Array:
    return (1 - MOMENTUM) * old + MOMENTUM * new.astype(old.dtype)
