"""ShiftNet-A and -B for ImageNet: networks with shifts for every spatial mixing but the stem's.

Wu et al., arXiv:1711.08141, section 4.3 and its table of the architecture. That code was never
published; where the paper is silent, this follows what others who rebuilt it have in common
(pre-activation, the pooling of the shortcut), and meets the paper's 4.1 M parameters and 1.4 G
multiply-adds for A.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.kernels.implementations import best_layout, is_only_xla, platform
from shiftnet.kernels.layouts import CHANNELS, ROWS, Layout, from_nhwc
from shiftnet.kernels.shift import channel_offsets
from shiftnet.kernels.shift_block import shift_block
from shiftnet.layers import BatchNorm, Conv, Linear, Shift
from shiftnet.layers.pooling import average_pool
from shiftnet.models.network import Network
from shiftnet.weights.initializers import he_normal_fan_out

_Conv = functools.partial(Conv, init=he_normal_fan_out)


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


class CSCBlock(nnx.Module):
    """Conv-shift-conv: BN → ReLU → 1x1 → shift → BN → ReLU → 1x1(stride), and a shortcut.

    At stride 1 the shortcut is added; at stride 2 its `average_pool` is concatenated, so that the
    convolutions compute only the channels that are new.

    That is what it does, and where `_by_layers` how. Otherwise it runs as `shift_block`: the second
    batch norm goes into the weights of the first convolution, in training too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        expansion: int,
        kernel_size: int,
        rngs: nnx.Rngs,
    ):
        middle = in_features * expansion
        new_features = out_features if stride == 1 else out_features - in_features
        self.bn1 = BatchNorm(in_features)
        self.conv1 = _Conv(in_features, middle, 1, rngs=rngs)
        self.shift = Shift(kernel_size)
        self.bn2 = BatchNorm(middle)
        self.conv2 = _Conv(middle, new_features, 1, stride=stride, rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array, *, train: bool = False, layout: Layout = "NHWC") -> jax.Array:
        y = nnx.relu(self.bn1(x, train=train, layout=layout))
        if _by_layers(train):
            y = nnx.relu(self.bn2(self.shift(self.conv1(y)), train=train))
            y = self.conv2(y)
        else:
            w1 = self.conv1.matrix
            offsets = channel_offsets(w1.shape[1], self.shift.kernel_size)
            w1, b1 = self.bn2.through(y, w1, train=train, layout=layout, offsets=offsets)
            y = shift_block(
                *(y, w1, b1, self.conv2.matrix.astype(y.dtype)),
                self.shift.kernel_size,
                stride=self.stride,
                shift_first=True,
            )
        if self.stride == 1:
            return x + y
        return jnp.concatenate([y, average_pool(x, layout)], axis=CHANNELS[layout])


def _by_layers(train: bool) -> bool:
    """Whether blocks call their layers: under `only_xla`, and where a CPU evaluates.

    ShiftNet-A on two cores, images of 224x224, 16 at a time: 48 images a second by layers and 38 by
    `shift_block`; but 4.9 and 9.4 in training.
    """
    return is_only_xla() or (platform() == "cpu" and not train)


class ShiftNet(Network):
    """7x7(2) to 32 channels, four stages of `CSCBlock`, BN, ReLU, average, linear.

    Args:
      num_classes: length of the logits.
      width: what every number of channels is multiplied by: 1 is ShiftNet-A, 0.5 ShiftNet-B.
      dtype: as of `Network`.
      rngs: the `params` stream draws the parameters.
    """

    first_and_last = ("conv1", "linear")

    def __init__(
        self, num_classes: int, *, width: float, dtype: jnp.dtype | None = None, rngs: nnx.Rngs
    ):
        super().__init__(dtype)
        inside = int(32 * width)
        self.conv1 = _Conv(3, inside, 7, stride=2, rngs=rngs)
        stages = []
        for stage in STAGES:
            outside = int(stage.features * width)
            block = functools.partial(CSCBlock, kernel_size=stage.kernel_size, rngs=rngs)
            blocks = [block(inside, outside, 2, expansion=stage.first_expansion)]
            for _ in range(1, stage.blocks):
                blocks.append(block(outside, outside, 1, expansion=stage.expansion))
            stages.append(nnx.List(blocks))
            inside = outside
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = BatchNorm(inside)
        self.linear = Linear(inside, num_classes, rngs=rngs)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        layout: Layout = "NHWC" if is_only_xla() else best_layout(len(x))
        x = from_nhwc(self.conv1(x), layout)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, train=train, layout=layout)
        x = nnx.relu(self.bn(x, train=train, layout=layout))
        x = x.mean((ROWS[layout], ROWS[layout] + 1))
        return self.linear(x if layout == "NHWC" else x.T)


def build(depth: None, num_classes: int, *, width: float, dtype, rngs: nnx.Rngs) -> ShiftNet:
    """ShiftNet of this width; it has one depth."""
    del depth
    return ShiftNet(num_classes, width=width, dtype=dtype, rngs=rngs)
