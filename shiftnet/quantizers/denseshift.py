"""Zero-free low-bit shift weights (DenseShift).

Li et al., "DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Networks", ICCV 2023,
in the form of the code published with S3.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers import form


class DenseShift(form.LowBitWeight):
    """sign(a) · 2^s, a signed power of two and never zero.

    s counts up through the shift latents t: s = 0, then s ← (s + 1) · [t > 0] for each from the
    first to the last. sign(0) is +1 and [0 > 0] is 0. The gradient passes the sign and the gates
    unchanged, and goes through sign(a) · √(s + 1) in place of the power.

    With `bits` bits there are 2^bits levels and 2^(bits - 1) - 1 shift latents: 2 bits {±1, ±2},
    3 bits {±1, ±2, ±4, ±8}, 4 bits {±1, … ±128}.

    Latents: `sign` (a), `shift1`, `shift2`, … (t).
    """

    sign: nnx.Param

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 3,
        init: form.Init | None = None,
        rngs: nnx.Rngs,
    ):
        del init  # the published code starts all latents alike
        self.num_shifts = 2 ** (bits - 1) - 1
        shifts = [f"shift{i}" for i in range(1, self.num_shifts + 1)]
        super().__init__(shape, ["sign", *shifts], rngs=rngs)
        powers = tuple(2**s for s in range(self.num_shifts + 1))
        self.levels = (*(-p for p in reversed(powers)), *powers)

    def level(self) -> jax.Array:
        sign = form.sign(self.sign[...])
        shift = jnp.zeros_like(sign)
        for i in range(1, self.num_shifts + 1):
            shift = (shift + 1) * form.gate(getattr(self, f"shift{i}")[...])
        return form.straight_through(sign * form.power_of_two(shift), sign * jnp.sqrt(shift + 1))

    def signs_of_latents(self, levels: np.ndarray) -> dict[str, np.ndarray]:
        count = self.num_shifts
        # The last gate must be open for a shift of 1, the last two for 2, and so on.
        shifts = {f"shift{i}": np.abs(levels) > 2 ** (count - i) for i in range(1, count + 1)}
        return {"sign": levels > 0, **shifts}
