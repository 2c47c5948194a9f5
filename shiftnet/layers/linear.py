"""The linear layer."""

import jax
from flax import nnx

from shiftnet import quantizers
from shiftnet.kernels import checks
from shiftnet.quantizers.form import Form
from shiftnet.quantizers.initializers import torch_uniform, torch_uniform_bias


class Linear(nnx.Module):
    """`x @ weight + bias`, from `[..., in_features]` to `[..., out_features]` in the input's dtype.

    Args:
      in_features: input channels.
      out_features: output channels.
      weights: the form of the weight: a name in `shiftnet.quantizers.FORMS`, or what makes one.
      bits: bits per weight, where the named form has a choice; 0 for its own number.
      rngs: the `params` stream draws `weight`, `[in_features, out_features]`, and `bias`, float32
        `[out_features]`.

    Raises:
      UserError: for a form, or a number of bits, that does not exist.
      ValueError: when called on an input that is not floating or has other channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weights: str | Form = "float",
        bits: int = 0,
        rngs: nnx.Rngs,
    ):
        form = quantizers.make(weights, bits) if isinstance(weights, str) else weights
        self.weight = form((in_features, out_features), init=torch_uniform, rngs=rngs)
        self.bias = nnx.Param(torch_uniform_bias(rngs.params(), out_features, in_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        checks.channels("Linear", x, self.weight.shape[0])
        return x @ self.weight().astype(x.dtype) + self.bias[...].astype(x.dtype)
