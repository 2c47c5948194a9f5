"""Networks after training, without running statistics or latents."""

from collections.abc import Callable

from flax import nnx

from shiftnet.layers import BatchNorm, Conv, Linear
from shiftnet.layers.affine import Affine
from shiftnet.quantizers import Float, LowBitWeight, Weight


def fold_batch_norms(network: nnx.Module, fold: Callable[[BatchNorm], Affine] = Affine.of) -> None:
    """Puts an `Affine` in the place of every `BatchNorm`; the network can no longer be trained.

    Args:
      network: changed in place.
      fold: makes the one of the other.
    """
    for _, parent in list(nnx.iter_modules(network)):
        if isinstance(parent, nnx.List):
            for index, child in enumerate(parent):
                if isinstance(child, BatchNorm):
                    parent[index] = fold(child)
        for name, child in list(vars(parent).items()):
            if isinstance(child, BatchNorm):
                setattr(parent, name, fold(child))


def fix_weights(network: nnx.Module, fix: Callable[[LowBitWeight], Weight] = Float.of) -> None:
    """Puts a weight of the same value, without latents, in the place of every low-bit one.

    Args:
      network: changed in place.
      fix: makes the one of the other.
    """
    for _, layer in list(nnx.iter_modules(network)):
        if isinstance(layer, Conv | Linear) and isinstance(layer.weight, LowBitWeight):
            layer.weight = fix(layer.weight)
