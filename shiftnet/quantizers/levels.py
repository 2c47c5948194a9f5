"""Low-bit weights without latents, for networks that are no longer trained."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers.form import LowBitWeight


class Levels(LowBitWeight):
    """`level * scale`, the levels held as whole numbers of 8 bits (of 16 for 4-bit DenseShift).

    Args:
      weight: what it computes the same as.
    """

    def __init__(self, weight: LowBitWeight):
        super().__init__(weight.shape)
        self.levels, self.scale = weight.levels, weight.scale
        dtype = np.int8 if max(self.levels) <= np.iinfo(np.int8).max else np.int16
        level = np.asarray(self.levels, dtype)[np.asarray(weight.codes())]
        self.level = nnx.Variable(jnp.asarray(level))

    def __call__(self) -> jax.Array:
        return self.level[...].astype(jnp.float32) * self.scale
