"""Wide residual networks for small images, made for weights of one bit.

McDonnell, "Training wide residual networks for deployment using a single bit for each weight",
ICLR 2018, arXiv:1802.08530, in the form of its published PyTorch code: batch norm without scale
and bias, shortcuts without weights, and a 1x1 convolution in place of the linear layer.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.layers import BatchNorm, Conv, convolve, rectifier
from shiftnet.layers.folding import normalize
from shiftnet.layers.pooling import average_pool
from shiftnet.layers.rectifier import relu
from shiftnet.models.drop_path import path_dropper
from shiftnet.models.network import Network
from shiftnet.models.resnet import at_least_one
from shiftnet.quantizers import Float, Form
from shiftnet.quantizers.initializers import he_normal_fan_out


class WideBlock(nnx.Module):
    """BN → ReLU → 3x3(stride) → BN → ReLU → 3x3, then add the shortcut.

    The shortcut is the block's input; where the shape changes, its `average_pool` followed by
    channels of zeros.
    """

    normalized_by: ClassVar = {"conv0": "bn1"}

    def __init__(self, in_features: int, out_features: int, stride: int, **layer: Any):
        layer["rectified"] = True
        self.bn0 = BatchNorm(in_features, affine=False)
        self.relu0 = rectifier(in_features, **layer)
        self.conv0 = Conv(in_features, out_features, 3, stride=stride, **layer)
        self.bn1 = BatchNorm(out_features, affine=False)
        self.relu1 = rectifier(out_features, **layer)
        self.conv1 = Conv(out_features, out_features, 3, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = normalize(self.bn0, x, self.relu0, train=train)
        y = convolve(self.conv0, self.bn1, y, self.relu1, train=train)
        if self.conv0.stride != 1:  # then the shape changes
            x = average_pool(x)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        return convolve(self.conv1, None, y, residual=x, drop=path_dropper(), train=train)


class WideResNet(Network):
    """Stem, three groups of blocks at strides 1, 2, 2, BN, ReLU, 1x1 convolution, BN, average.

    Args:
      depth: 6n + 2, for n blocks a group.
      num_classes: length of the logits.
      width: the groups have `int(16 * width)` channels, twice and four times as many.
      weights: the form of the weights.
      ends: the form of the first and the last layer's weights.
      activations: the form of the inputs of all convolutions but the first and the last.
      dtype: as of `Network`.
      rngs: the `params` stream draws the parameters.
    """

    first_and_last = ("conv0", "conv_last")

    normalized_by: ClassVar = {"conv_last": "bn_last"}

    def __init__(
        self,
        depth: int,
        num_classes: int,
        *,
        width: float,
        weights: Form = Float,
        ends: Form = Float,
        activations: str = "float",
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dtype)
        features = at_least_one(16 * width, "width", width)
        layer: dict[str, Any] = {"init": he_normal_fan_out, "rngs": rngs}
        block: Callable[..., WideBlock] = functools.partial(
            WideBlock, weights=weights, activations=activations, **layer
        )
        self.conv0 = Conv(3, features, 3, weights=ends, **layer)
        groups = []
        for group in range(3):
            inside, outside = features * 2 ** max(group - 1, 0), features * 2**group
            blocks = [block(inside, outside, 1 + (group > 0))]
            for _ in range(1, (depth - 2) // 6):
                blocks.append(block(outside, outside, 1))
            groups.append(nnx.List(blocks))
        self.group0, self.group1, self.group2 = groups
        self.bn = BatchNorm(outside, affine=False)
        self.conv_last = Conv(outside, num_classes, 1, weights=ends, **layer)
        self.bn_last = BatchNorm(num_classes)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = self.conv0(x)
        for group in (self.group0, self.group1, self.group2):
            for block in group:
                x = block(x, train=train)
        x = normalize(self.bn, x, relu, train=train)
        return convolve(self.conv_last, self.bn_last, x, train=train).mean((1, 2))


build = WideResNet
