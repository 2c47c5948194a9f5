"""What stands where a network has its ReLUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class RPReLU(nnx.Module):
    """ζ + (x - γ) where x > γ, else ζ + β · (x - γ): a PReLU that is shifted both ways.

    Liu et al., "ReActNet", ECCV 2020, arXiv:2003.03488, equation 5.

    Args:
      features: channels.

    Attributes:
      slope: β, float32 `[features]`, starting at 0.25 as PyTorch's PReLU.
      shift_in: γ, starting at 0.
      shift_out: ζ, starting at 0.
    """

    def __init__(self, features: int):
        self.slope = nnx.Param(jnp.full(features, 0.25, jnp.float32))
        self.shift_in = nnx.Param(jnp.zeros(features, jnp.float32))
        self.shift_out = nnx.Param(jnp.zeros(features, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        slope, shift_in, shift_out = (
            parameter[...].astype(x.dtype)
            for parameter in (self.slope, self.shift_in, self.shift_out)
        )
        centred = x - shift_in
        return jnp.where(centred > 0, centred, slope * centred) + shift_out


def rectifier(
    features: int, *, activations: str = "float", **_: Any
) -> Callable[[jax.Array], jax.Array]:
    """Returns what a block with these activations has in place of its ReLU.

    A sign takes the place of a ReLU: what comes before it must have both signs, so there is
    nothing else there (as in Bi-Real Net, arXiv:1808.00278), or ReActNet's `RPReLU`.

    Args:
      features: channels.
      activations: the form of the convolutions' inputs; the other options of layers are ignored.
    """
    if activations == "sign":
        return _identity
    return RPReLU(features) if activations == "rsign" else relu


# Functions of this module, so that networks can be pickled.


def relu(x: jax.Array) -> jax.Array:
    """Returns the larger of `x` and 0."""
    return nnx.relu(x)


def _identity(x: jax.Array) -> jax.Array:
    return x
