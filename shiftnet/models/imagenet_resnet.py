"""Residual networks for images of 224x224 pixels: ResNet-18, -34, -50, -101 and -152.

He et al., arXiv:1512.03385, table 1, with the stride of a bottleneck on its 3x3 convolution, as
torchvision has them and S3 trains them.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.layers import BatchNorm, Conv, Linear, convolve, rectifier
from shiftnet.layers.pooling import max_pool
from shiftnet.models.drop_path import path_dropper
from shiftnet.models.network import Network
from shiftnet.models.resnet import Shortcut
from shiftnet.quantizers import Float, Form
from shiftnet.quantizers.initializers import he_normal_fan_out


class BasicBlock(nnx.Module):
    """3x3(stride) → BN → ReLU → 3x3 → BN → add → ReLU."""

    expansion = 1

    normalized_by: ClassVar = {"conv1": "bn1", "conv2": "bn2"}

    def __init__(self, in_features: int, features: int, stride: int, **layer: Any):
        layer["rectified"] = True
        self.conv1 = Conv(in_features, features, 3, stride=stride, **layer)
        self.bn1 = BatchNorm(features)
        self.relu1 = rectifier(features, **layer)
        self.conv2 = Conv(features, features, 3, **layer)
        self.bn2 = BatchNorm(features)
        self.shortcut = Shortcut(in_features, features, stride, **layer)
        self.relu2 = rectifier(features, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        last: dict[str, Any] = {"residual": self.shortcut(x, train=train), "drop": path_dropper()}
        return convolve(self.conv2, self.bn2, y, self.relu2, train=train, **last)


class Bottleneck(nnx.Module):
    """1x1 → BN → ReLU → 3x3(stride) → BN → ReLU → 1x1 to four times as many → BN → add → ReLU."""

    expansion = 4

    normalized_by: ClassVar = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}

    def __init__(self, in_features: int, features: int, stride: int, **layer: Any):
        out = features * self.expansion
        layer["rectified"] = True
        self.conv1 = Conv(in_features, features, 1, **layer)
        self.bn1 = BatchNorm(features)
        self.relu1 = rectifier(features, **layer)
        self.conv2 = Conv(features, features, 3, stride=stride, **layer)
        self.bn2 = BatchNorm(features)
        self.relu2 = rectifier(features, **layer)
        self.conv3 = Conv(features, out, 1, **layer)
        self.bn3 = BatchNorm(out)
        self.shortcut = Shortcut(in_features, out, stride, **layer)
        self.relu3 = rectifier(out, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        y = convolve(self.conv2, self.bn2, y, self.relu2, train=train)
        last: dict[str, Any] = {"residual": self.shortcut(x, train=train), "drop": path_dropper()}
        return convolve(self.conv3, self.bn3, y, self.relu3, train=train, **last)


# Depth -> block and blocks a stage.
STAGES: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
DEPTHS = tuple(STAGES)


class ImageNetResNet(Network):
    """7x7(2) → BN → ReLU → max pool, four stages at 64, 128, 256, 512, average, linear.

    Args:
      depth: one of `DEPTHS`.
      num_classes: length of the logits.
      weights: the form of the weights.
      ends: the form of the first and the last layer's weights.
      activations: the form of the inputs of all convolutions but the first.
      dtype: as of `Network`.
      rngs: the `params` stream draws the parameters.
    """

    first_and_last = ("conv1", "linear")

    normalized_by: ClassVar = {"conv1": "bn1"}

    def __init__(
        self,
        depth: int,
        num_classes: int,
        *,
        weights: Form = Float,
        ends: Form = Float,
        activations: str = "float",
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dtype)
        kind, counts = STAGES[depth]
        layer: dict[str, Any] = {"init": he_normal_fan_out, "rngs": rngs}
        block: Callable[..., nnx.Module] = functools.partial(
            kind, weights=weights, activations=activations, **layer
        )
        self.conv1 = Conv(3, 64, 7, stride=2, weights=ends, **layer)
        self.bn1 = BatchNorm(64)
        self.relu = rectifier(64, activations=activations)
        stages, inside = [], 64
        for stage, count in enumerate(counts):
            features = 64 * 2**stage
            outside = features * kind.expansion
            blocks = [block(inside, features, 1 + (stage > 0))]
            blocks += [block(outside, features, 1) for _ in range(1, count)]
            stages.append(nnx.List(blocks))
            inside = outside
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = Linear(inside, num_classes, weights=ends, rngs=rngs)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = max_pool(convolve(self.conv1, self.bn1, x, self.relu, train=train))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, train=train)
        return self.linear(x.mean((1, 2)))


build = ImageNetResNet
