"""ShuffleResNet: blocks of grouped 1x1 convolutions and a channel shuffle, as in ShuffleNet.

A rival of the shift block on an earlier page of arXiv:1711.08141's code, which removed it later.
Zhang et al., arXiv:1707.01083, have no ReLU after the depthwise convolution; that code has one.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.layers import BatchNorm, Conv, convolve, rectifier
from shiftnet.models import resnet
from shiftnet.models.drop_path import drop_path
from shiftnet.models.resnet import Shortcut

GROUPS = 4


class ShuffleBlock(nnx.Module):
    """1x1 in 4 groups → BN → ReLU → shuffle → 3x3 depthwise(stride) → BN → ReLU → 1x1 in 4 groups
    → BN → add → ReLU.

    That code's shortcut has stride 2 wherever it is a convolution; this one has the block's, which
    is the same in every network.

    Raises:
      UserError: for channels that do not divide into 4 groups.
    """

    normalized_by: ClassVar = {"conv1": "bn1", "depth": "bn2", "conv3": "bn3"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        **layer: Any,
    ):
        for features in (in_features, middle_features, out_features):
            if features % GROUPS:
                raise UserError(
                    f"a shuffleresnet's channels must be multiples of {GROUPS}, found {features}"
                )
        conv: Callable[..., Conv] = functools.partial(Conv, rectified=True, **layer)
        self.conv1 = conv(in_features, middle_features, 1, groups=GROUPS)
        self.bn1 = BatchNorm(middle_features)
        self.relu1 = rectifier(middle_features, **layer)
        self.depth = conv(
            middle_features, middle_features, 3, stride=stride, groups=middle_features
        )
        self.bn2 = BatchNorm(middle_features)
        self.relu2 = rectifier(middle_features, **layer)
        self.conv3 = conv(middle_features, out_features, 1, groups=GROUPS)
        self.bn3 = BatchNorm(out_features)
        self.shortcut = Shortcut(in_features, out_features, stride, rectified=True, **layer)
        self.relu3 = rectifier(out_features, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        y = channel_shuffle(y, GROUPS)
        y = convolve(self.depth, self.bn2, y, self.relu2, train=train)
        last: dict[str, Any] = {"residual": self.shortcut(x, train=train), "drop": drop_path}
        return convolve(self.conv3, self.bn3, y, self.relu3, train=train, **last)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Deals out the channels of each group: of `[..., C]`, group i's channel j becomes channel
    j · groups + i.
    """
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return grouped.swapaxes(-1, -2).reshape(x.shape)


build = functools.partial(resnet.build, block_type=ShuffleBlock, multiple=GROUPS)
