"""The base of all networks."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.implementations import is_only_xla, local_batch, platform

# Images of 32x32 that a CPU evaluates at a time, so that their activations stay in its caches and
# what an operation costs anyway is divided by many. Of 16, 32, 64, 128 and all of 256 images, on
# two cores of a Xeon with AVX-512, 64 took 0.84 to 1.00 of the time of 32 (ShiftResNet20 at
# expansions 1 and 3, ResNet20, DepthwiseResNet20, WRN-20-2), 128 took 0.78 to 1.02 and all 0.71 to
# 1.18.
IMAGES_AT_A_TIME = 64


class Network(nnx.Module):
    """From normalised images `[N, H, W, 3]` to logits `[N, num_classes]` in the images' dtype.

    A subclass computes them in `logits`, in the precision of what it is given. It is made with the
    forms of its weights, `weights`, and of those of its first and last layer, `ends`.

    Args:
      dtype: compute in this dtype whatever the input's; None computes in the input's.

    Attributes:
      first_and_last: the names of its first convolution and its last layer.
    """

    first_and_last: ClassVar[tuple[str, str]]

    def __init__(self, dtype: jnp.dtype | None):
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        self.set_mode(train=train)

        def compute(images: jax.Array) -> jax.Array:
            y = images.astype(self.dtype or images.dtype)
            return self.logits(y, train=train).astype(images.dtype)

        if train or not _in_pieces(x):
            return compute(x)
        pieces = -(-len(x) // IMAGES_AT_A_TIME)
        missing = -len(x) % pieces
        filled = jnp.pad(x, [(0, missing), (0, 0), (0, 0), (0, 0)])
        logits = jax.lax.map(compute, filled.reshape(pieces, -1, *x.shape[1:]))
        return logits.reshape(len(filled), -1)[: len(x)]

    def set_mode(self, *, train: bool) -> None:
        """Comes before `logits`, where modules are told once whether they train."""

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        raise NotImplementedError


def norms_after(network: nnx.Module) -> dict[str, str]:
    """Returns the batch norm behind each convolution that has one, by the paths of both.

    Modules say so in `normalized_by`, by paths within them.
    """
    pairs = {}
    for path, module in nnx.iter_modules(network):
        for layer, norm in getattr(module, "normalized_by", {}).items():
            inside = [".".join((*map(str, path), name)) for name in (layer, norm)]
            pairs[inside[0]] = inside[1]
    return pairs


def _in_pieces(x: jax.Array) -> bool:
    """Tells whether a few images at a time are faster: on one CPU, where they are small."""
    if is_only_xla() or platform() != "cpu" or not all(isinstance(n, int) for n in x.shape):
        return False
    return len(x) == local_batch(x) > IMAGES_AT_A_TIME and x.shape[1] * x.shape[2] <= 32 * 32
