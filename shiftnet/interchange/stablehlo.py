"""A network as a program of its own, from images to logits."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export as jax_export

from shiftnet.data import RGB, augment
from shiftnet.kernels.implementations import lowered_for, only_xla
from shiftnet.layers.folding import fix_weights, fold_batch_norms
from shiftnet.quantizers import LowBitWeight

PLATFORMS = ("cpu", "cuda", "tpu")

Program = Callable[[jax.Array], jax.Array]


def program(network: nnx.Module, mean: RGB, std: RGB, platform: str | None = None) -> Program:
    """The function from uint8 `[N, H, W, 3]` to float32 logits, with batch norms folded.

    Args:
      network: a trained one; changed in place.
      mean, std: of each channel, for pixels in [0, 1].
      platform: operations are chosen for "cpu", "gpu", "tpu" or "onnx"; None leaves that to the
        device that the program runs on.
    """
    fold_batch_norms(network)
    fix_weights(network, LowBitWeight.quantized)

    def logits(images: jax.Array) -> jax.Array:
        with only_xla(), lowered_for(platform) if platform else contextlib.nullcontext():
            return network(augment.normalize(images, mean, std))

    return logits


def stablehlo(network: nnx.Module, mean: RGB, std: RGB, size: int) -> bytes:
    """Serialises a `jax.export` program: uint8 `[batch, size, size, 3]` to float32 logits.

    Args:
      network, mean, std: as of `program`.
      size: height and width of the images, in pixels.
    """
    function = jax.jit(program(network, mean, std))
    exported = jax_export.export(function, platforms=PLATFORMS)(images(size))
    return bytes(exported.serialize())


def images(size: int) -> jax.ShapeDtypeStruct:
    """The shape of a program's images: any number of them, square."""
    (batch,) = jax_export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
