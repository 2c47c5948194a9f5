"""What every network is."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx


class Network(nnx.Module):
    """From normalised images `[N, H, W, 3]` to logits `[N, num_classes]` in the images' dtype.

    A subclass computes them in `logits`, in the precision of what it is given.

    Args:
      dtype: compute in this dtype whatever the input's; None computes in the input's.

    Attributes:
      first_and_last: the paths of its first convolution and its last layer.
    """

    first_and_last: ClassVar[tuple[str, str]]

    def __init__(self, dtype: jnp.dtype | None):
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return self.logits(x.astype(self.dtype or x.dtype), train=train).astype(x.dtype)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        raise NotImplementedError
