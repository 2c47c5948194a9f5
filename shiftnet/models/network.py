"""What every network is."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.implementations import is_only_xla, local_batch, platform

# Images of 32x32 that a CPU evaluates at a time, so that their activations stay in its caches. Of
# 8, 16, 32 and all of 128, 32 was the fastest for ShiftResNet20 and ResNet20 on two cores of a Xeon
# (0.7 and 0.85 of the time of all at once), and for a WRN-20-1 no slower.
IMAGES_AT_A_TIME = 32


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
        y = x.astype(self.dtype or x.dtype)
        if train or not _in_pieces(x):
            return self.logits(y, train=train).astype(x.dtype)

        def few(images: jax.Array) -> jax.Array:
            return self.logits(images, train=False).astype(x.dtype)

        count, whole = len(x), len(x) // IMAGES_AT_A_TIME * IMAGES_AT_A_TIME
        pieces = y[:whole].reshape(-1, IMAGES_AT_A_TIME, *y.shape[1:])
        logits = jax.lax.map(few, pieces).reshape(whole, -1)
        return logits if whole == count else jnp.concatenate([logits, few(y[whole:])])

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        raise NotImplementedError


def _in_pieces(x: jax.Array) -> bool:
    """Whether a few of these images at a time are faster: on one CPU, and where they are small."""
    if is_only_xla() or platform() != "cpu" or not all(isinstance(n, int) for n in x.shape):
        return False
    return len(x) == local_batch(x) > IMAGES_AT_A_TIME and x.shape[1] * x.shape[2] <= 32 * 32
