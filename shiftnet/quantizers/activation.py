"""The interface of activation forms, which quantize the input of a layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.layouts import wide_dtype

MOMENTUM = 0.1  # weight of the new value in the running shares, as in batch norm's statistics
# A channel that has another code than its usual one less often than this is dead.
ALIVE = 1e-3
EVERY = 8  # of how many rows of pixels one is counted


class Activation(nnx.Module):
    """The input of a layer, as the layer computes with it: few values, `codes * step`.

    Zero padding and shifts come after it, so what they bring in from outside an image is 0 and
    adds nothing to a product, in forms too that cannot be 0 themselves.

    Args:
      features: channels of the input.

    Attributes:
      bits: bits per value.
      clipped: running share of the values beyond the form's range, float32 []; None once folded.
      nonzero: running share of each channel's values whose code is not 0, or is +1 for signs;
        float32 `[features]`, starting at 0.5; None once folded. Both are of every eighth row.
    """

    bits: int

    def __init__(self, features: int):
        self.features = features
        self.clipped: Any = nnx.data(nnx.BatchStat(jnp.zeros((), jnp.float32)))
        self.nonzero: Any = nnx.data(nnx.BatchStat(jnp.full(features, 0.5, jnp.float32)))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the quantized `x`, `[..., features]`, in its dtype; training updates the shares.

        It is computed in float32, or in the dtype of `x` if that is wider.
        """
        raise NotImplementedError

    def integers(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the codes of `x`, int32 of its shape, and the step, [].

        Their product is `self(x)`, to the bit in float32 and float64.
        """
        raise NotImplementedError

    def fold(self) -> None:
        """Keeps only what evaluation needs; the network can no longer be trained."""
        self.clipped = self.nonzero = None

    def unfold(self) -> None:
        """Makes what was folded trainable again; it computes the same as before."""
        Activation.__init__(self, self.features)

    def dead(self) -> jax.Array:
        """Returns which channels hardly ever change their code, bool `[features]`."""
        return self.nonzero[...] < ALIVE

    def _observe(self, outside: jax.Array, nonzero: jax.Array) -> None:
        """Moves the running shares towards a batch's; bools of the shape of `some(x)`."""
        axes = tuple(range(nonzero.ndim - 1))
        self.clipped[...] = _average(self.clipped[...], outside.mean(dtype=jnp.float32))
        self.nonzero[...] = _average(self.nonzero[...], nonzero.mean(axes, dtype=jnp.float32))


def some(x: jax.Array) -> jax.Array:
    """Returns every eighth row of images, `[N, H, W, features]`: enough for the running shares.

    Counting in all of them took as long as quantizing them. Rows and not images, as devices divide
    images among themselves. Of other arrays it returns all.
    """
    return x[:, x.shape[1] // 2 % EVERY :: EVERY] if x.ndim == 4 else x


def _average(old: jax.Array, new: jax.Array) -> jax.Array:
    return (1 - MOMENTUM) * old + MOMENTUM * new.astype(old.dtype)


def widened(x: jax.Array) -> jax.Array:
    """Returns `x` in float32, or in its own dtype if that is wider."""
    return x.astype(wide_dtype(x.dtype))
