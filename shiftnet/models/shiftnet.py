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

from shiftnet.kernels.shift_block import shift_block
from shiftnet.layers import BatchNorm, Conv, Linear, fold_batch_norm, make_shift, rectifier
from shiftnet.layers.folding import normalize
from shiftnet.layers.pooling import average_pool
from shiftnet.layers.rectifier import relu
from shiftnet.layers.shift import constants, offsets_of
from shiftnet.models.drop_path import drop_path
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
    folded into the first convolution, in training too. With quantized inputs of the convolutions,
    or while its shift is learned, the layers run one by one.
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
        shift: str = "fixed",
        **layer: Any,
    ):
        middle = in_features * expansion
        new_features = out_features if stride == 1 else out_features - in_features
        layer["rectified"] = True
        self.bn1 = BatchNorm(in_features)
        self.relu1 = rectifier(in_features, **layer)
        self.conv1 = Conv(in_features, middle, 1, **layer)
        self.shift = make_shift(middle, kernel_size, shift, rngs=layer["rngs"])
        self.bn2 = BatchNorm(middle)
        self.relu2 = rectifier(middle, **layer)
        self.conv2 = Conv(middle, new_features, 1, stride=stride, **layer)
        self.stride = stride

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = normalize(self.bn1, x, self.relu1, train=train)
        if self.conv1.activation is None and constants(self.shift) is not None:
            y = self._fused(y, train)
        else:
            y = self._apart(y, train)
        if self.stride == 1:
            return x + drop_path(y)
        return jnp.concatenate([y, average_pool(x)], axis=-1)

    def _fused(self, y: jax.Array, train: bool) -> jax.Array:
        offsets = offsets_of(self.shift, self.conv1.weight.shape[-1])
        w1, b1 = fold_batch_norm(self.conv1, self.bn2, y, train=train, offsets=offsets)
        w2 = self.conv2.matrix.astype(y.dtype)
        return shift_block(
            y, w1, b1, w2, stride=self.stride, shift_first=True, **(constants(self.shift) or {})
        )

    def _apart(self, y: jax.Array, train: bool) -> jax.Array:
        """Layer by layer: with quantized inputs, or while the shift is learned."""
        y = self.shift(self.conv1(y, train=train), train=train)
        return self.conv2(self.relu2(self.bn2(y, train=train)), train=train)


class ShiftNet(Network):
    """7x7(2) to half the first stage's channels, stages of `CSCBlock`, BN, ReLU, average, linear.

    Args:
      num_classes: length of the logits.
      width: factor of every number of channels: 1 is ShiftNet-A, 0.5 ShiftNet-B.
      stages: four of them.
      weights: the form of the weights.
      ends: the form of the first and the last layer's weights.
      activations: the form of the inputs of all convolutions but the first.
      shift: the kind of its shifts, see `make_shift`.
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
        activations: str = "float",
        shift: str = "fixed",
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
                CSCBlock,
                kernel_size=stage.kernel_size,
                weights=weights,
                activations=activations,
                shift=shift,
                **layer,
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
        return self.linear(normalize(self.bn, x, relu, train=train).mean((1, 2)))


def build(depth: None, num_classes: int, **options: Any) -> ShiftNet:
    """Builds a ShiftNet, which has one depth."""
    del depth
    return ShiftNet(num_classes, **options)
