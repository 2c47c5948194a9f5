"""Weights that are sums of powers of two: Li, Dong and Wang, "Additive Powers-of-Two Quantization:
An Efficient Non-uniform Discretization for Neural Networks" (APoT), ICLR 2020, arXiv:1909.13144.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers import form

# Bits -> the terms of a magnitude, which is a sum of one number of each, in units of the smallest
# power. One bit is the sign; the paper's base of k = 2 bits per term gives 3 bits one term of four
# numbers, and 4 bits another term, of the bit that is left.
TERMS: Mapping[int, tuple[tuple[int, ...], ...]] = {
    2: ((0, 1),),
    3: ((0, 1, 2, 4),),
    4: ((0, 1, 4, 8), (0, 2)),
}
# What the published code adds to the standard deviation, and where it starts the clip.
EPSILON, CLIP = 1e-5, 3.0


class APoT(form.Rounded):
    """α · Π(clip(Ŵ / α, -1, 1)) with Ŵ = (W - mean W) / (std W + 1e-5) and a learned α.

    Π takes the nearest of the levels, whose highest is 1, and of two equally near the smaller. They
    are 0 and ± the sums of `TERMS`: 2 bits {0, ±1}, 3 bits {0, ±1, ±2, ±4} / 4, 4 bits
    {0, ±1, ±2, ±3, ±4, ±6, ±8, ±10} / 10. The gradient (the paper's reparameterised clipping
    function) is 1 to Ŵ where |Ŵ| ≤ α, else 0, and goes on to W through mean and deviation; the
    published code takes these as constants. That of α is Π(Ŵ / α) - Ŵ / α where |Ŵ| ≤ α, else
    sign(Ŵ).

    Weights have a standard deviation near 1, whatever the layer's size: made for layers before a
    batch norm.

    Latents: `unrounded` (W), and `clip` (α), float32 `[]`.
    """

    clip: nnx.Param

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 4,
        init: form.Init = form.he_normal_fan_out,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, init=init, rngs=rngs)
        _, *magnitudes = sorted(map(sum, itertools.product(*TERMS[bits])))
        self.levels = (*(-m for m in reversed(magnitudes)), 0, *magnitudes)
        self.clip = nnx.Param(jnp.full((), CLIP, jnp.float32))

    @property
    def scale(self) -> jax.Array:  # type: ignore[override]
        clip = self.clip[...]
        return jnp.maximum(clip * (1 / self.levels[-1]), jnp.finfo(clip.dtype).tiny)

    def normalized(self) -> jax.Array:
        """Returns Ŵ."""
        latent = self.unrounded[...]
        # The square root has no slope at zero, where all weights are equal.
        variance = jnp.maximum(latent.var(), jnp.finfo(latent.dtype).tiny)
        return (latent - latent.mean()) / (jnp.sqrt(variance) + EPSILON)

    def level(self) -> jax.Array:
        return self._level(self.normalized() / self.scale)

    def _level(self, steps: jax.Array) -> jax.Array:
        """Returns the nearest level of each number."""
        magnitudes = jnp.asarray(self.levels[len(self.levels) // 2 :], steps.dtype)
        middles = (magnitudes[1:] + magnitudes[:-1]) / 2
        return (
            jnp.sign(steps)
            * magnitudes[jnp.searchsorted(middles, abs(steps), method="compare_all")]
        )

    def __call__(self) -> jax.Array:
        normalized, highest = self.normalized(), self.levels[-1]
        steps = normalized / self.scale
        level, inside = self._level(steps), abs(steps) <= highest
        slope = jax.lax.stop_gradient(level - jnp.where(inside, steps, 0)) / highest
        through = jnp.where(inside, normalized, 0) + slope * self.clip[...]
        return form.straight_through(level * self.scale, through)

    def start_from(self, weight: np.ndarray) -> None:
        super().start_from(weight)
        _, scale = self.nearest(np.asarray(self.normalized()))
        self.clip.set_value(jnp.asarray(scale * self.levels[-1], jnp.float32))

    def settled(self, latent: np.ndarray, scale: float) -> np.ndarray:
        normal = (latent - latent.mean()) / max(latent.std(), 1e-30)
        return normal * (self.deviation / (self.deviation + EPSILON))

    def set_quantized(self, codes: np.ndarray, scale: np.ndarray | None = None) -> None:
        super().set_quantized(codes, scale)
        # As large as it would have started, since its size sets how fast it learns.
        self.unrounded.set_value(self.unrounded[...] * np.float32(self.deviation + EPSILON))
        self.clip.set_value(jnp.asarray(scale, jnp.float32) * self.levels[-1])
