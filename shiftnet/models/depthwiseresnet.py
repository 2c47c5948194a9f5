"""DepthwiseResNet: the depthwise-separable rival that arXiv:1711.08141's code compares with."""

import functools
from typing import Any, ClassVar

import jax
from flax import nnx

from shiftnet.layers import BatchNorm, Conv, convolve, rectifier
from shiftnet.models import resnet
from shiftnet.models.drop_path import path_dropper
from shiftnet.models.resnet import Shortcut


class DepthwiseBlock(nnx.Module):
    """1x1 → BN → ReLU → 3x3 depthwise → BN (no ReLU) → 1x1(stride) → BN → add → ReLU.

    Nothing is added without `skip`.
    """

    normalized_by: ClassVar = {"conv1": "bn1", "depth": "bn2", "conv3": "bn3"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        skip: bool = True,
        **layer: Any,
    ):
        self.conv1 = Conv(in_features, middle_features, 1, rectified=True, **layer)
        self.bn1 = BatchNorm(middle_features)
        self.relu1 = rectifier(middle_features, **layer)
        self.depth = Conv(
            middle_features, middle_features, 3, groups=middle_features, rectified=True, **layer
        )
        self.bn2 = BatchNorm(middle_features)
        self.conv3 = Conv(middle_features, out_features, 1, stride=stride, **layer)
        self.bn3 = BatchNorm(out_features)
        shortcut = functools.partial(Shortcut, in_features, out_features, stride, rectified=True)
        self.shortcut = shortcut(**layer) if skip else None
        self.relu2 = rectifier(out_features, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        y = convolve(self.depth, self.bn2, y, train=train)
        last: dict[str, Any] = {}
        if self.shortcut is not None:
            last = {"residual": self.shortcut(x, train=train), "drop": path_dropper()}
        return convolve(self.conv3, self.bn3, y, self.relu2, train=train, **last)


def build(depth: int, num_classes: int, *, depthwise_skip: bool, **options: Any) -> resnet.ResNet:
    """Builds a DepthwiseResNet; the options are those of `resnet.build`."""
    block = functools.partial(DepthwiseBlock, skip=depthwise_skip)
    return resnet.build(depth, num_classes, block_type=block, **options)
