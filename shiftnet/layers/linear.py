"""The linear layer."""

import jax
from flax import nnx

from shiftnet.layers.initializers import torch_uniform, torch_uniform_bias


class Linear(nnx.Module):
    """`x @ kernel + bias`, from `[..., in_features]` to `[..., out_features]` in the input's dtype.

    Args:
      in_features: input channels.
      out_features: output channels.
      rngs: the `params` stream draws `kernel`, float32 `[in_features, out_features]`, and `bias`,
        float32 `[out_features]`.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(torch_uniform(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(torch_uniform_bias(rngs.params(), out_features, in_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)
