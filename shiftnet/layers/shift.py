"""The shift as a layer."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from shiftnet.errors import unknown
from shiftnet.kernels.shift import Implementation, channel_offsets, shift
from shiftnet.layers.learned_shift import KINDS, LearnedShift


class Shift(nnx.Module):
    """Moves every channel by its own fixed offset: a layer with no parameters and no arithmetic.

    Followed by a 1x1 convolution it takes the place of a k x k convolution:

        nnx.Sequential(Shift(3), Conv(64, 128, 1, rngs=rngs))

    Args:
      kernel_size: side k of the neighbourhood that channels are dealt out to.
      dilation: distance between neighbours in pixels.
      implementation: as of `shiftnet.kernels.shift.shift`; None chooses by the device.

    Calling it on `[..., H, W, C]` of any dtype returns the same shape and dtype; what moves where
    is said at `shiftnet.kernels.shift.shift`, which also raises the errors.
    """

    def __init__(
        self,
        kernel_size: int = 3,
        dilation: int = 1,
        *,
        implementation: Implementation | None = None,
    ):
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.implementation = implementation

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        return shift(x, self.kernel_size, self.dilation, implementation=self.implementation)


def make_shift(
    features: int, kernel_size: int = 3, kind: str = "fixed", *, rngs: nnx.Rngs
) -> Shift | LearnedShift:
    """Makes the shift of a block: by fixed offsets within `kernel_size`, or by learned ones.

    Args:
      features: channels.
      kernel_size: of a fixed shift.
      kind: `"fixed"`, or a kind of `LearnedShift`.
      rngs: draws learned offsets.

    Raises:
      UserError: for an unknown kind.
    """
    if kind not in ("fixed", *KINDS):
        raise unknown("kind of shift", kind, ("fixed", *KINDS))
    return Shift(kernel_size) if kind == "fixed" else LearnedShift(features, kind, rngs=rngs)


def constants(layer: Shift | LearnedShift) -> dict[str, Any] | None:
    """Returns what an operation with a shift in it takes of the layer; None if that is learned.

    Args:
      layer: learned offsets are known once they are folded.
    """
    if isinstance(layer, Shift):
        return {"kernel_size": layer.kernel_size, "dilation": layer.dilation}
    return None if layer.offsets is None else {"offsets": layer.offsets}


def offsets_of(layer: Shift | LearnedShift, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the offsets `(dh, dw)` of a layer with so many channels, int32 `[features]` each.

    Raises:
      ValueError: where they are learned and not folded yet.
    """
    if isinstance(layer, Shift):
        return channel_offsets(features, layer.kernel_size, layer.dilation)
    if layer.offsets is None:
        raise ValueError("the offsets of a shift that is still learned are no constants")
    dh, dw = (np.array(offsets, np.int32) for offsets in layer.offsets)
    return dh, dw
