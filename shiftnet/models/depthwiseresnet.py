"""DepthwiseResNet: the depthwise-separable rival that arXiv:1711.08141's code compares with."""

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.layers import BatchNorm, Conv
from shiftnet.models.resnet import ResNet, Shortcut, at_least_one, no_expansion, reduced_widths


class DepthwiseBlock(nnx.Module):
    """1x1 → BN → ReLU → 3x3 depthwise → BN (no ReLU) → 1x1(stride) → BN → add → ReLU."""

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
        self.depth = Conv(middle_features, middle_features, 3, groups=middle_features, rngs=rngs)
        self.bn2 = BatchNorm(middle_features)
        self.conv3 = Conv(middle_features, out_features, 1, stride=stride, rngs=rngs)
        self.bn3 = BatchNorm(out_features)
        self.shortcut = Shortcut(in_features, out_features, stride, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.depth(y), train=train)
        y = self.bn3(self.conv3(y), train=train)
        return nnx.relu(y + self.shortcut(x, train=train))


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
    """DepthwiseResNet: mode `"block"` gives each block `int(out / reduction)` middle channels."""
    no_expansion(expansion, "depthwiseresnet")
    inner = reduction if reduction_mode == "block" else 1.0

    def block(in_features, out_features, stride, *, rngs):
        middle = at_least_one(out_features / inner, "reduction", reduction)
        return DepthwiseBlock(in_features, out_features, stride, middle_features=middle, rngs=rngs)

    widths = reduced_widths(reduction, reduction_mode)
    return ResNet(block, depth, num_classes, widths=widths, dtype=dtype, rngs=rngs)
