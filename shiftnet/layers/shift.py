"""The shift as a layer."""

import jax
from flax import nnx

from shiftnet.kernels.shift import Implementation, shift


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

    def __call__(self, x: jax.Array) -> jax.Array:
        return shift(x, self.kernel_size, self.dilation, implementation=self.implementation)
