"""Low-bit shift weights by sign-sparse-shift reparametrisation (S3).

Li et al., "S3: Sign-Sparse-Shift Reparametrization for Effective Training of Low-bit Shift
Networks", NeurIPS 2021.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers import form


class S3(form.LowBitWeight):
    """sign(a) · [b > 0] · 2^s, zero or a signed power of two.

    s counts up through the shift latents t: s = 0, then s ← [t > 0] · (s + 1) for each from the
    last to the first. sign(0) is +1 and [0 > 0] is 0. The gradient passes every sign and every
    gate unchanged.

    With `bits` bits there are 2^bits - 1 levels and 2^(bits - 1) - 2 shift latents:
    2 bits {0, ±1}, 3 bits {0, ±1, ±2, ±4}, 4 bits {0, ±1, ±2, … ±64}.

    Latents: `sign` (a), `gate` (b), `shift1`, `shift2`, … (t).
    """

    sign: nnx.Param
    gate: nnx.Param

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 3,
        init: form.Init | None = None,
        rngs: nnx.Rngs,
    ):
        del init  # the published code starts all latents alike
        self.num_shifts = 2 ** (bits - 1) - 2
        shifts = [f"shift{i}" for i in range(1, self.num_shifts + 1)]
        super().__init__(shape, ["sign", "gate", *shifts], rngs=rngs)
        powers = tuple(2**s for s in range(self.num_shifts + 1))
        self.levels = (*(-p for p in reversed(powers)), 0, *powers)

    def level(self) -> jax.Array:
        unshifted = form.sign(self.sign[...]) * form.gate(self.gate[...])
        shift = jnp.zeros_like(unshifted)
        for i in range(self.num_shifts, 0, -1):
            shift = form.gate(getattr(self, f"shift{i}")[...]) * (shift + 1)
        return unshifted * form.power_of_two(shift)

    def regularizer(self) -> jax.Array:
        """Σ max(-b, 0), which keeps weights from freezing at zero; its gradient at 0 is 0."""
        return nnx.relu(-self.gate[...]).sum()

    def start_from(self, weight: np.ndarray) -> None:
        super().start_from(weight)
        # Zero has no sign: let it be that which the weight had.
        self._set_latent("sign", weight >= 0, np.abs(weight))

    def signs_of_latents(self, levels: np.ndarray) -> dict[str, np.ndarray]:
        shifts = {f"shift{i}": np.abs(levels) >= 2**i for i in range(1, self.num_shifts + 1)}
        return {"sign": levels >= 0, "gate": levels != 0, **shifts}
