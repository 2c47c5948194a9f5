"""1-bit weights: McDonnell, "Training wide residual networks for deployment using a single bit for
each weight", ICLR 2018, arXiv:1802.08530.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from shiftnet.quantizers import form


class Sign(form.LowBitWeight):
    """√(2 / (k k in_features)) · sign(latent), where sign(0) is +1; gradient 1 to the latent.

    The published code has sign(0) = 0, which one bit cannot hold.
    """

    levels = (-1, 1)
    latent: nnx.Param

    def __init__(self, shape: Sequence[int], *, init: form.Init | None = None, rngs: nnx.Rngs):
        del init  # the latents of every form of this paper start alike
        super().__init__(shape, ["latent"], rngs=rngs)
        self.scale = math.sqrt(2 / math.prod(self.shape[:-1]))

    def level(self) -> jax.Array:
        return form.sign(self.latent[...])

    def __call__(self) -> jax.Array:
        # The gradient is 1 and not the scale, as in the published code.
        return form.straight_through(super().__call__(), self.latent[...])

    def signs_of_latents(self, levels: np.ndarray) -> dict[str, np.ndarray]:
        return {"latent": levels > 0}
