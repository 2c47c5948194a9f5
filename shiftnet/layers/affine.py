"""Batch normalisation as it is after training: one scale and one bias a channel."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.kernels.layouts import Layout, affine, wide_dtype
from shiftnet.layers.batch_norm import EPSILON, BatchNorm


class Affine(nnx.Module):
    """`x * scale + bias`, what a `BatchNorm` does with its running statistics.

    Args:
      features: channels.

    State: `scale` and `bias` (parameters), float32 `[features]` each. `[..., features]` comes back
    in the input's dtype; there is no training with it.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))

    @classmethod
    def of(cls, norm: BatchNorm) -> "Affine":
        """What `norm` does in evaluation; computed in float64, kept in float32."""
        mean, var = (np.asarray(stat[...], np.float64) for stat in (norm.mean, norm.var))
        scale, bias = 1 / np.sqrt(var + EPSILON), np.zeros_like(mean)
        if norm.scale is not None and norm.bias is not None:
            scale = scale * np.asarray(norm.scale[...], np.float64)
            bias = np.asarray(norm.bias[...], np.float64)
        affine = cls(len(mean))
        affine.scale.set_value(jnp.asarray(scale.astype(np.float32)))
        affine.bias.set_value(jnp.asarray((bias - mean * scale).astype(np.float32)))
        return affine

    def __call__(self, x: jax.Array, *, train: bool = False, layout: Layout = "NHWC") -> jax.Array:
        _refuse(train)
        return affine(x, self.scale[...], self.bias[...], layout)

    def scale_and_bias(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Both, `[features]` each."""
        return self.scale[...].astype(dtype), self.bias[...].astype(dtype)

    def through(
        self,
        x: jax.Array,
        kernel: jax.Array,
        *,
        train: bool = False,
        layout: Layout = "NHWC",
        offsets: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `BatchNorm.through`."""
        del layout, offsets
        _refuse(train)
        scale, bias = self.scale_and_bias(wide_dtype(x.dtype))
        return (kernel.astype(scale.dtype) * scale).astype(x.dtype), bias


def _refuse(train: bool) -> None:
    if train:
        raise ValueError("a network whose batch norms are folded cannot be trained")
