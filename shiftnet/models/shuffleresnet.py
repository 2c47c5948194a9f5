"""ShuffleResNet: blocks of grouped 1x1 convolutions and a channel shuffle, as in ShuffleNet.

A rival of the shift block on an earlier page of arXiv:1711.08141's code, which removed it later.
Zhang et al., arXiv:1707.01083, have no ReLU after the depthwise convolution; that code has one.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.kernels.implementations import platform
from shiftnet.kernels.layouts import affine, pointwise_conv
from shiftnet.layers import BatchNorm, Conv, convolve, fold_batch_norm, rectifier
from shiftnet.models import resnet
from shiftnet.models.drop_path import path_dropper
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
        if not train and self._as_products():
            return self._products(x)
        y = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        y = channel_shuffle(y, GROUPS)
        y = convolve(self.depth, self.bn2, y, self.relu2, train=train)
        last: dict[str, Any] = {"residual": self.shortcut(x, train=train), "drop": path_dropper()}
        return convolve(self.conv3, self.bn3, y, self.relu3, train=train, **last)

    def _as_products(self) -> bool:
        """Tells whether `_products` serves: on accelerators, with layers that only compute."""
        pairs = (self.conv1, self.bn1), (self.conv3, self.bn3)
        own = any(type(conv) is not Conv or type(norm) is not BatchNorm for conv, norm in pairs)
        quantized = any(conv.activation is not None for conv, _ in pairs)
        return platform() in ("gpu", "tpu") and not own and not quantized

    def _products(self, x: jax.Array) -> jax.Array:
        """Evaluates the block with groups as dense products, zeros between them.

        The shuffle is the order of the first one's columns. What costs is to read and write images,
        and XLA's TPU compiler moves 4.6 times as many bytes where it divides and shuffles channels.
        """
        w1, b1 = fold_batch_norm(self.conv1, self.bn1, x)
        w1, b1 = channel_shuffle(_dense(w1), GROUPS), channel_shuffle(b1, GROUPS)
        y = self.relu1(affine(pointwise_conv(x, w1), None, b1))
        y = convolve(self.depth, self.bn2, y, self.relu2, train=False)
        w3, b3 = fold_batch_norm(self.conv3, self.bn3, y)
        y = affine(pointwise_conv(y, _dense(w3)), None, b3)
        return self.relu3(y + self.shortcut(x, train=False))


def _dense(w: jax.Array) -> jax.Array:
    """Returns the matrix, `[C, K]`, of a 1x1 convolution in groups, `[C / GROUPS, K]`."""
    return jax.scipy.linalg.block_diag(*jnp.split(w, GROUPS, axis=1))


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Deals out the channels of each group: of `[..., C]`, group i's channel j becomes channel
    j · groups + i.
    """
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return grouped.swapaxes(-1, -2).reshape(x.shape)


build = functools.partial(resnet.build, block_type=ShuffleBlock, multiple=GROUPS)
