"""ShiftNet-A, -B and -C for ImageNet: networks with shifts for every spatial mixing but the stem's.

Wu et al., arXiv:1711.08141, section 4.3 and its table of the architecture. That code was never
published; where the paper is silent, this follows what others who rebuilt it have in common
(pre-activation, the pooling of the shortcut), and meets the paper's 4.1 M parameters and 1.4 G
multiply-adds for A. C is an approximation; see `STAGES_C`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.shift import channel_offsets
from shiftnet.kernels.shift_block import shift_block
from shiftnet.layers import BatchNorm, Conv, Linear, Shift, fold_batch_norm
from shiftnet.layers.pooling import average_pool
from shiftnet.models.network import Network
from shiftnet.quantizers import Float, Form
from shiftnet.quantizers.initializers import he_normal_fan_out


class Stage(NamedTuple):
    """Blocks of one width, the first of which halves the height and width of the image."""

    features: int
    blocks: int
    kernel_size: int  # of the shifts
    first_expansion: int  # middle channels of the first block, as a multiple of its input's
    expansion: int  # of the other blocks


STAGES = (
    Stage(64, 5, 5, 4, 4),
    Stage(128, 6, 5, 4, 3),
    Stage(256, 7, 3, 3, 2),
    Stage(512, 3, 3, 2, 1),
)

# Approximate: the layout of ShiftNet-C was not published. The paper gives its groups of 1, 4, 4 and
# 3 blocks, their channels and the expansion. The rest is as in A: a stem of half the first group's
# channels, and the kernel sizes. This has 0.694 M parameters, where the paper reports 0.78 M.
STAGES_C = (
    Stage(32, 1, 5, 1, 1),
    Stage(64, 4, 5, 1, 1),
    Stage(128, 4, 3, 1, 1),
    Stage(256, 3, 3, 1, 1),
)


class CSCBlock(nnx.Module):
    """Conv-shift-conv: BN → ReLU → 1x1 → shift → BN → ReLU → 1x1(stride), and a shortcut.

    At stride 1 the shortcut is added; at stride 2 its `average_pool` is concatenated, so that the
    convolutions compute only the channels that are new.

    From the first convolution on it is one operation, `shift_block`: the second batch norm is
    folded into the first convolution, in training too.
    """

    normalized_by: ClassVar = {"conv1": "bn2"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        expansion: int,
        kernel_size: int,
        **layer: Any,
    ):
        middle = in_features * expansion
        new_features = out_features if stride == 1 else out_features - in_features
        self.bn1 = BatchNorm(in_features)
        self.conv1 = Conv(in_features, middle, 1, **layer)
        self.shift = Shift(kernel_size)
        self.bn2 = BatchNorm(middle)
        self.conv2 = Conv(middle, new_features, 1, stride=stride, **layer)
        self.stride = stride

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        kernel_size = self.shift.kernel_size
        y = nnx.relu(self.bn1(x, train=train))
        offsets = channel_offsets(self.conv1.weight.shape[-1], kernel_size)
        w1, b1 = fold_batch_norm(self.conv1, self.bn2, y, train=train, offsets=offsets)
        w2 = self.conv2.matrix.astype(y.dtype)
        y = shift_block(y, w1, b1, w2, kernel_size, stride=self.stride, shift_first=True)
        if self.stride == 1:
            return x + y
        return jnp.concatenate([y, average_pool(x)], axis=-1)


class ShiftNet(Network):
    """7x7(2) to half the first stage's channels, stages of `CSCBlock`, BN, ReLU, average, linear.

    Args:
      num_classes: length of the logits.
      width: factor of every number of channels: 1 is ShiftNet-A, 0.5 ShiftNet-B.
      stages: four of them.
      weights: the form of the weights.
      ends: the form of the first and the last layer's weights.
      dtype: as of `Network`.
      rngs: the `params` stream draws the parameters.
    """

    first_and_last = ("conv1", "linear")

    def __init__(
        self,
        num_classes: int,
        *,
        width: float,
        stages: Sequence[Stage] = STAGES,
        weights: Form = Float,
        ends: Form = Float,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dtype)
        inside = int(stages[0].features * width) // 2
        layer: dict[str, Any] = {"init": he_normal_fan_out, "rngs": rngs}
        self.conv1 = Conv(3, inside, 7, stride=2, weights=ends, **layer)
        built = []
        for stage in stages:
            outside = int(stage.features * width)
            block: Callable[..., CSCBlock] = functools.partial(
                CSCBlock, kernel_size=stage.kernel_size, weights=weights, **layer
            )
            blocks = [block(inside, outside, 2, expansion=stage.first_expansion)]
            for _ in range(1, stage.blocks):
                blocks.append(block(outside, outside, 1, expansion=stage.expansion))
            built.append(nnx.List(blocks))
            inside = outside
        self.layer1, self.layer2, self.layer3, self.layer4 = built
        self.bn = BatchNorm(inside)
        self.linear = Linear(inside, num_classes, weights=ends, rngs=rngs)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, train=train)
        return self.linear(nnx.relu(self.bn(x, train=train)).mean((1, 2)))


def build(depth: None, num_classes: int, **options: Any) -> ShiftNet:
    """Builds a ShiftNet, which has one depth."""
    del depth
    return ShiftNet(num_classes, **options)
