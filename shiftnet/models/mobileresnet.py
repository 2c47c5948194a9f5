"""MobileResNet: blocks of two depthwise-separable convolutions without a shortcut, as in MobileNet.

A rival of the shift block on an earlier page of arXiv:1711.08141's code, which removed it later.
The blocks are those of Howard et al., "MobileNets", arXiv:1704.04861, two at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from shiftnet.layers import BatchNorm, Conv, convolve, rectifier
from shiftnet.models import resnet


class MobileBlock(nnx.Module):
    """3x3 depthwise(stride) → 1x1 → 3x3 depthwise → 1x1, each with BN → ReLU; no shortcut."""

    normalized_by: ClassVar = {
        "depth1": "depth_bn1",
        "conv1": "bn1",
        "depth2": "depth_bn2",
        "conv2": "bn2",
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        **layer: Any,
    ):
        conv: Callable[..., Conv] = functools.partial(Conv, rectified=True, **layer)
        self.depth1 = conv(in_features, in_features, 3, stride=stride, groups=in_features)
        self.depth_bn1 = BatchNorm(in_features)
        self.depth_relu1 = rectifier(in_features, **layer)
        self.conv1 = conv(in_features, middle_features, 1)
        self.bn1 = BatchNorm(middle_features)
        self.relu1 = rectifier(middle_features, **layer)
        self.depth2 = conv(middle_features, middle_features, 3, groups=middle_features)
        self.depth_bn2 = BatchNorm(middle_features)
        self.depth_relu2 = rectifier(middle_features, **layer)
        self.conv2 = conv(middle_features, out_features, 1)
        self.bn2 = BatchNorm(out_features)
        self.relu2 = rectifier(out_features, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = convolve(self.depth1, self.depth_bn1, x, self.depth_relu1, train=train)
        x = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        x = convolve(self.depth2, self.depth_bn2, x, self.depth_relu2, train=train)
        return convolve(self.conv2, self.bn2, x, self.relu2, train=train)


build = functools.partial(resnet.build, block_type=MobileBlock)
