"""What every weight form is: latent parameters in, the weight that a layer computes with out."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.quantizers.initializers import he_normal_fan_out


class Weight(nnx.Module):
    """The weight of one convolution or linear layer.

    A subclass keeps its latents as `nnx.Param`s of the weight's shape, and is called without
    arguments for the weight, in the latents' dtype.

    Attributes:
      shape: `[k, k, in_features, out_features]` or `[in_features, out_features]`.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)

    def __call__(self) -> jax.Array:
        raise NotImplementedError

    @property
    def bits(self) -> int:
        """Of one weight in a packed file."""
        return 32

    @property
    def size(self) -> int:
        """Number of weights; their latents may be more."""
        return math.prod(self.shape)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all weights at their packed width, rounded up."""
        return -(-self.size * self.bits // 8)

    def regularizer(self) -> jax.Array | None:
        """What this form adds to the loss, before its factor; None where it adds nothing."""
        return None


class LowBitWeight(Weight):
    """A weight with few values: `levels[code] * scale`, `code` an index of `bits` bits.

    Attributes:
      levels: the whole numbers that a weight can be, rising.
      scale: what they are multiplied by.
    """

    levels: tuple[int, ...]
    scale: float = 1.0

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    def codes(self) -> jax.Array:
        """The index of each weight's level, uint8 of the weight's shape."""
        weight = self()
        levels = jnp.asarray(self.levels, weight.dtype)
        # Rounded, since the compiler may divide by multiplying, which is not exact.
        return jnp.searchsorted(levels, jnp.round(weight / self.scale)).astype(jnp.uint8)

    def set_codes(self, codes: np.ndarray) -> None:
        """Sets the latents so that the weights have these codes.

        Each latent becomes plus or minus the standard deviation that it would have started with:
        what is left of a weight whose latents are not known, to compute with or to train on from.

        Args:
          codes: of the weight's shape, as `codes` returns them.
        """
        deviation = np.float32(math.sqrt(2 / (self.size / self.shape[-2])))
        signs = self.signs_of_latents(np.asarray(self.levels)[codes])
        for name, sign_of in signs.items():
            getattr(self, name).set_value(jnp.asarray(np.where(sign_of, deviation, -deviation)))

    def signs_of_latents(self, levels: np.ndarray) -> dict[str, np.ndarray]:
        """For weights at these levels, whether each latent is above zero, by its name."""
        raise NotImplementedError


def latent(shape: Sequence[int], rngs: nnx.Rngs) -> nnx.Param:
    """A latent as low-bit weights start: float32, N(0, 2 / (k k out_features))."""
    return nnx.Param(he_normal_fan_out(rngs.params(), tuple(shape)))


@jax.custom_jvp
def straight_through(value: jax.Array, through: jax.Array) -> jax.Array:
    """`value`, with the gradient as if it were `through`."""
    del through
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[1]


def sign(x: jax.Array) -> jax.Array:
    """±1, +1 at zero; the gradient is the identity."""
    return straight_through(jnp.where(x >= 0, 1, -1).astype(x.dtype), x)


def gate(x: jax.Array) -> jax.Array:
    """1 above zero, else 0; the gradient is the identity."""
    return straight_through((x > 0).astype(x.dtype), x)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent for whole exponents from 0 to 30, exactly; `jnp.exp2` rounds on some devices."""
    power = jnp.left_shift(1, exponent.astype(jnp.int32)).astype(exponent.dtype)
    return straight_through(power, math.log(2) * jax.lax.stop_gradient(power) * exponent)
