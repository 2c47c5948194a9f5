"""Ternary weights: Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits",
arXiv:2402.17764 (BitNet b1.58).
"""

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.quantizers import form

LEAST_SCALE = 1e-5  # "Training Tips, Code and FAQ", see `Ternary`


class Ternary(form.Rounded):
    """γ · clip(round(W / γ), -1, 1) with γ = mean |W| of the layer; gradient 1 to W.

    Halves round to even, so to zero here. γ is at least 1e-5, as in the code that the authors
    published with "The Era of 1-bit LLMs: Training Tips, Code and FAQ".

    Latents: `unrounded` (W).
    """

    levels = (-1, 0, 1)

    @property
    def scale(self) -> jax.Array:  # type: ignore[override]
        return jnp.maximum(abs(self.unrounded[...]).mean(), LEAST_SCALE)

    def level(self) -> jax.Array:
        return jnp.clip(jnp.round(self.unrounded[...] / self.scale), -1, 1)

    def __call__(self) -> jax.Array:
        return form.straight_through(super().__call__(), self.unrounded[...])

    def start_from(self, weight: np.ndarray) -> None:
        mean = np.abs(weight).mean()
        # Weights that γ would round to zeros, all of them, keep their proportions.
        super().start_from(weight * (self.deviation / mean) if 0 < mean < LEAST_SCALE else weight)

    def settled(self, latent: np.ndarray, scale: float) -> np.ndarray:
        return latent * (scale / max(np.abs(latent).mean(), 1e-30))
