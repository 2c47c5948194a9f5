"""Activations of one bit.

Hubara et al., "Binarized Neural Networks", NeurIPS 2016, arXiv:1602.02830; with thresholds, Liu et
al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions", ECCV
2020, arXiv:2003.03488.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.quantizers.activation import ALIVE, Activation, some, widened
from shiftnet.quantizers.form import straight_through


class SignActivation(Activation):
    """±1, and +1 at zero; the gradient is 1 where |x| <= 1, else 0 (clipped straight-through).

    A batch norm behind the layer makes any other magnitude the same.

    Args:
      features: channels of the input.
      rectified: accepted for the forms' common interface; blocks rectify nothing before a sign.
    """

    bits = 1

    def __init__(self, features: int, *, rectified: bool = False):
        del rectified
        super().__init__(features)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        centred = self._centred(widened(x))
        if train:
            if self.clipped is None:
                raise ValueError("a network whose activations are folded cannot be trained")
            few = some(centred)
            self._observe(jnp.abs(few) > 1, few >= 0)
        signs = jnp.where(centred >= 0, 1, -1).astype(centred.dtype)
        return straight_through(signs, hard_tanh(centred)).astype(x.dtype)

    def integers(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        centred = self._centred(widened(x))
        return jnp.where(centred >= 0, 1, -1).astype(jnp.int32), jnp.ones((), centred.dtype)

    def _centred(self, x: jax.Array) -> jax.Array:
        return x

    def dead(self) -> jax.Array:
        positive = self.nonzero[...]
        return (positive < ALIVE) | (positive > 1 - ALIVE)


class ShiftedSign(SignActivation):
    """sign(x - α) with a learned threshold per channel (ReActNet's RSign).

    Attributes:
      threshold: α, float32 `[features]`, starting at 0.
    """

    def __init__(self, features: int, *, rectified: bool = False):
        super().__init__(features, rectified=rectified)
        self.threshold = nnx.Param(jnp.zeros(features, jnp.float32))

    def _centred(self, x: jax.Array) -> jax.Array:
        return x - self.threshold[...].astype(x.dtype)


@jax.custom_jvp
def hard_tanh(x: jax.Array) -> jax.Array:
    """Returns `x` clipped to [-1, 1]; the derivative at the ends is 1."""
    return jnp.clip(x, -1, 1)


@hard_tanh.defjvp
def _hard_tanh_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return hard_tanh(x), jnp.where(jnp.abs(x) <= 1, dx, 0)
