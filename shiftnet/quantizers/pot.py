"""Power-of-two weights that are rounded from float ones.

Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks", CVPR Workshops 2021,
arXiv:1905.13298: its DeepShift-Q, with a scale.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers import form


class PoT(form.Rounded):
    """γ · sign(W) · 2^round(log2(|W| / γ)), zero below and the highest power above the window.

    With `bits` bits there are 2^(bits - 1) - 1 powers and zero, so 2^bits - 1 levels, as in
    DeepShift-Q: 2 bits {0, ±1}, 3 bits {0, ±1, ±2, ±4}, 4 bits {0, ±1, … ±64}, 5 bits
    {0, ±1, … ±16384}. DeepShift-Q has γ so that the highest level is 1, whatever the weights, and
    raises what is below the lowest power to that. Here the highest level is 2^(bits - 2) · mean |W|
    of the layer, so that the levels lie where the weights are at 2 and 3 bits too, and what rounds
    to a power below the lowest is zero. The gradient is 1 to W, as in DeepShift-Q.

    Latents: `unrounded` (W).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 5,
        init: form.Init = form.he_normal_fan_out,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, init=init, rngs=rngs)
        powers = tuple(2**s for s in range(2 ** (bits - 1) - 1))
        self.levels = (*(-p for p in reversed(powers)), 0, *powers)
        self.scale_of_mean = 2 ** (bits - 2) / powers[-1]

    @property
    def scale(self) -> jax.Array:  # type: ignore[override]
        mean = abs(self.unrounded[...]).mean()
        return jnp.maximum(mean * self.scale_of_mean, jnp.finfo(mean.dtype).tiny)

    def level(self) -> jax.Array:
        latent = jax.lax.stop_gradient(self.unrounded[...])
        fraction, exponent = jnp.frexp(abs(latent) / self.scale)  # fraction from 1/2 to below 1
        exponent -= (fraction < math.sqrt(1 / 2)).astype(exponent.dtype)  # log2, rounded
        highest = len(self.levels) // 2 - 1
        power = form.power_of_two(jnp.clip(exponent, 0, highest).astype(latent.dtype))
        return jnp.where(exponent < 0, 0, jnp.sign(latent) * power)

    def __call__(self) -> jax.Array:
        return form.straight_through(super().__call__(), self.unrounded[...])

    @property
    def edges(self) -> np.ndarray:
        powers = np.exp2(np.arange(len(self.levels) // 2) - 0.5)
        return np.concatenate([-powers[::-1], powers])

    def settled(self, latent: np.ndarray, scale: float) -> np.ndarray:
        return latent * (scale / self.scale_of_mean / max(np.abs(latent).mean(), 1e-30))
