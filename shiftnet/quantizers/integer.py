"""Integer weights with a learned step: Esser et al., "Learned Step Size Quantization" (LSQ),
ICLR 2020, arXiv:1902.08153.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers import form
from shiftnet.quantizers.learned_step import quantize


class Int(form.Rounded):
    """s · round(clip(W / s, -Qn, Qp)) with Qn = 2^(bits - 1) and Qp = 2^(bits - 1) - 1.

    Halves round to even. The gradient is 1 to W where -Qn < W / s < Qp, else 0. That of s is
    round(W / s) - W / s there, else -Qn below and Qp above, times 1 / √(N Qp) for N weights. s
    starts at 2 mean |W| / √Qp.

    Latents: `unrounded` (W), and `step` (s), float32 `[]`.
    """

    step: nnx.Param

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 8,
        init: form.Init = form.he_normal_fan_out,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, init=init, rngs=rngs)
        self.levels = tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        self.step = nnx.Param(2 * abs(self.unrounded[...]).mean() / math.sqrt(self.levels[-1]))

    @property
    def scale(self) -> jax.Array:  # type: ignore[override]
        step = self.step[...]
        return jnp.maximum(step, jnp.finfo(step.dtype).tiny)

    def level(self) -> jax.Array:
        steps = self.unrounded[...] / self.scale
        return jnp.round(jnp.clip(steps, self.levels[0], self.levels[-1]))

    def __call__(self) -> jax.Array:
        factor = 1 / math.sqrt(self.size * self.levels[-1])
        step = form.straight_through(self.scale, factor * self.step[...])
        return quantize(self.unrounded[...], step, self.levels[0], self.levels[-1])

    def start_from(self, weight: np.ndarray) -> None:
        _, step = self.nearest(weight)
        super().start_from(weight)
        self.step.set_value(jnp.asarray(step, jnp.float32))

    def set_quantized(self, codes: np.ndarray, scale: np.ndarray | None = None) -> None:
        super().set_quantized(codes, scale)
        self.step.set_value(jnp.asarray(scale, jnp.float32))
