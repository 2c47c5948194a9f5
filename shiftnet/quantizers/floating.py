"""The weight as it is."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from shiftnet.quantizers.form import Weight
from shiftnet.quantizers.initializers import torch_uniform


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

    @classmethod
    def of(cls, weight: Weight) -> "Float":
        """What `weight` is now, without its latents."""
        return cls(weight.shape, init=lambda *_: _value(weight), rngs=nnx.Rngs(0))

    def __call__(self) -> jax.Array:
        return self.value[...]


@nnx.jit
def _value(weight: Weight) -> jax.Array:
    return weight()
