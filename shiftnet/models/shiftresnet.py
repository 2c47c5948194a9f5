"""ShiftResNet: the 3x3 convolutions of a residual network replaced by shifts.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions",
arXiv:1711.08141, in the form of its published code.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.kernels.implementations import best_layout, is_only_xla, platform
from shiftnet.kernels.layouts import Layout, from_nhwc, to_nhwc
from shiftnet.kernels.shift_block import shift_block
from shiftnet.layers import BatchNorm, Conv, Shift
from shiftnet.models.resnet import ResNet, Shortcut, at_least_one, reduced_widths


class ShiftConvBlock(nnx.Module):
    """1x1 → BN → ReLU → shift → 1x1(stride) → BN → ReLU → add, with no ReLU after the addition.

    That is what it does, and under `only_xla` how. Otherwise it runs as `shift_block`: the first
    batch norm goes into the weights of the first convolution, in training too, so that the expanded
    tensor is never normalised, nor needed but inside of one operation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        rngs: nnx.Rngs,
    ):
        self.conv1 = Conv(in_features, middle_features, 1, rngs=rngs)
        self.bn1 = BatchNorm(middle_features)
        self.shift = Shift(3)
        self.conv2 = Conv(middle_features, out_features, 1, stride=stride, rngs=rngs)
        self.bn2 = BatchNorm(out_features)
        self.shortcut = Shortcut(in_features, out_features, stride, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False, layout: Layout = "NHWC") -> jax.Array:
        if is_only_xla():
            y = nnx.relu(self.bn1(self.conv1(x), train=train))
            y = nnx.relu(self.bn2(self.conv2(self.shift(y)), train=train))
            return y + self.shortcut(x, train=train)
        if train and platform() == "cpu":  # where XLA would compute it several times; a TPU loses
            x = jax.lax.optimization_barrier(x)
        stride = self.conv2.stride
        w1, b1 = self.bn1.through(x, self.conv1.matrix, train=train, layout=layout)
        w2 = self.conv2.matrix
        shortcut = self.shortcut(x, train=train, layout=layout)
        if train:
            y = shift_block(x, w1, b1, w2.astype(x.dtype), stride=stride)
            return nnx.relu(self.bn2(y, train=True, layout=layout)) + shortcut
        w2, b2 = self.bn2.through(x, w2)
        return shift_block(
            *(x, w1, b1, w2),
            stride=stride,
            out_bias=b2,
            out_relu=True,
            residual=shortcut,
        )


class ShiftResNet(ResNet):
    """A `ResNet` whose blocks are `ShiftConvBlock`s."""

    def body(self, x: jax.Array, *, train: bool) -> jax.Array:
        layout: Layout = "NHWC" if is_only_xla() else best_layout(len(x))
        x = from_nhwc(x, layout)
        for block in self.blocks():
            x = block(x, train=train, layout=layout)
        return to_nhwc(x, layout)


def build(
    depth: int,
    num_classes: int,
    *,
    expansion: float,
    reduction: float,
    reduction_mode: str,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
) -> ResNet:
    """ShiftResNet: each block has `int(out * expansion)` middle channels."""
    if reduction != 1 and reduction_mode == "block":
        raise UserError(
            "model.reduction must be 1 for a shiftresnet in reduction_mode 'block' "
            f"(model.expansion sets its middle channels), got {reduction}"
        )

    def block(in_features, out_features, stride, *, rngs):
        middle = at_least_one(out_features * expansion, "expansion", expansion)
        return ShiftConvBlock(in_features, out_features, stride, middle_features=middle, rngs=rngs)

    widths = reduced_widths(reduction, reduction_mode)
    return ShiftResNet(block, depth, num_classes, widths=widths, dtype=dtype, rngs=rngs)
