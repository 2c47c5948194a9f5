"""The linear layer."""

import jax
from flax import nnx

from shiftnet.quantizers import Float, Weight
from shiftnet.quantizers.initializers import torch_uniform_bias


class Linear(nnx.Module):
    """`x @ weight + bias`, from `[..., in_features]` to `[..., out_features]` in the input's dtype.

    Args:
      in_features: input channels.
      out_features: output channels.
      rngs: the `params` stream draws `weight`, `[in_features, out_features]`, a `Float` that
        another weight form can replace, and `bias`, float32 `[out_features]`.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.weight: Weight = Float((in_features, out_features), rngs=rngs)
        self.bias = nnx.Param(torch_uniform_bias(rngs.params(), out_features, in_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight().astype(x.dtype) + self.bias[...].astype(x.dtype)
