"""Low-bit weights as packed files hold them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers import form
from shiftnet.quantizers.quantized import QuantizedWeight


class Fixed(form.LowBitWeight):
    """A low-bit weight without latents: the same weight, bit for bit, which cannot be trained.

    Args:
      weight: of any form; its levels and the shape of its scale are taken, its numbers are not.
      codes: as in `QuantizedWeight`, of the weight's shape.
      scale: float32 `scale_shape`; None where that is None, and the form's constant is taken.

    Raises:
      IndexError: for a code without a level.
    """

    def __init__(self, weight: form.LowBitWeight, codes: np.ndarray, scale: np.ndarray | None):
        form.Weight.__init__(self, weight.shape)
        if codes.max(initial=0) >= len(weight.levels):
            raise IndexError(f"code {codes.max()} is none of {len(weight.levels)} levels")
        self.levels = weight.levels
        self.scale_shape = weight.scale_shape
        self.codes = nnx.Param(jnp.asarray(codes))
        self.constant = weight.scale if scale is None else 1.0
        self.learned = nnx.data(None if scale is None else nnx.Param(jnp.asarray(scale)))

    @property
    def scale(self) -> jax.Array | float:  # type: ignore[override]
        return self.constant if self.learned is None else self.learned[...]

    def level(self) -> jax.Array:
        return jnp.asarray(self.levels, jnp.float32)[self.codes[...].astype(jnp.int32)]

    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes[...], self.scale, self.levels)
