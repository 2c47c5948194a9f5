"""DepthwiseResNet: the depthwise-separable rival that arXiv:1711.08141's code compares with."""

import functools

import jax
from flax import nnx

from shiftnet.layers import BatchNorm, Conv
from shiftnet.models import resnet
from shiftnet.models.resnet import Shortcut
from shiftnet.quantizers import Float, Form


class DepthwiseBlock(nnx.Module):
    """1x1 → BN → ReLU → 3x3 depthwise → BN (no ReLU) → 1x1(stride) → BN → add → ReLU."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        weights: Form = Float,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(Conv, weights=weights, rngs=rngs)
        self.conv1 = conv(in_features, middle_features, 1)
        self.bn1 = BatchNorm(middle_features)
        self.depth = conv(middle_features, middle_features, 3, groups=middle_features)
        self.bn2 = BatchNorm(middle_features)
        self.conv3 = conv(middle_features, out_features, 1, stride=stride)
        self.bn3 = BatchNorm(out_features)
        self.shortcut = Shortcut(in_features, out_features, stride, weights=weights, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.depth(y), train=train)
        y = self.bn3(self.conv3(y), train=train)
        return nnx.relu(y + self.shortcut(x, train=train))


build = functools.partial(resnet.build, block_type=DepthwiseBlock)
