"""Float weights."""

from collections.abc import Sequence

import jax
from flax import nnx

from shiftnet.quantizers.form import Init, Weight
from shiftnet.quantizers.initializers import torch_uniform


class Float(Weight):
    """A weight that is its own latent, `value`.

    Args:
      shape: of the weight.
      init: draws it, `init(key, shape)`.
      rngs: the `params` stream.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        init: Init = torch_uniform,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape)
        self.value = nnx.Param(init(rngs.params(), self.shape))

    @classmethod
    def of(cls, weight: Weight) -> "Float":
        """Returns the present value of `weight`, without its latents."""
        return cls(weight.shape, init=lambda *_: _value(weight), rngs=nnx.Rngs(0))

    def __call__(self) -> jax.Array:
        return self.value[...]


@nnx.jit
def _value(weight: Weight) -> jax.Array:
    return weight()
