"""The weight as it is."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from shiftnet.weights.form import Weight
from shiftnet.weights.initializers import torch_uniform


class Float(Weight):
    """Its own latent, `value`.

    Args:
      shape: of the weight.
      init: draws it, `init(key, shape)`.
      rngs: the `params` stream.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        init: Callable[..., jax.Array] = torch_uniform,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape)
        self.value = nnx.Param(init(rngs.params(), self.shape))

    def __call__(self) -> jax.Array:
        return self.value[...]
