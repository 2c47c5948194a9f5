"""Residual networks for small images, and the frame that the shift and depthwise ones share.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2, in the
form of the code published with arXiv:1711.08141: projection shortcuts, no biases in convolutions.
Modules carry the names of the original's state dict.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.kernels.layouts import affine, pointwise_conv, subsample
from shiftnet.layers import BatchNorm, Conv, Linear, convolve, fold_batch_norm, rectifier
from shiftnet.models.drop_path import path_dropper
from shiftnet.models.network import Network
from shiftnet.quantizers import Float, Form

WIDTHS = (16, 32, 64)


class Block(Protocol):
    """Builds one of the blocks of a stage, whose layers are made with the options."""

    def __call__(
        self, in_features: int, out_features: int, stride: int, **layer: Any
    ) -> nnx.Module: ...


class ResNet(Network):
    """Stem, three stages of `(depth - 2) / 6` blocks at strides 1, 2, 2, average pool, linear.

    Args:
      block: builds one block; see `Block`.
      depth: 6n + 2.
      num_classes: length of the logits.
      widths: channels of the three stages; the stem has as many as the first.
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
        block: Block,
        depth: int,
        num_classes: int,
        *,
        widths: tuple[int, int, int] = WIDTHS,
        weights: Form = Float,
        ends: Form = Float,
        activations: str = "float",
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dtype)
        count = (depth - 2) // 6
        stage = functools.partial(
            _stage,
            block,
            count=count,
            weights=weights,
            activations=activations,
            rngs=rngs,
        )
        self.conv1 = Conv(3, widths[0], 3, weights=ends, rngs=rngs)
        self.bn1 = BatchNorm(widths[0])
        self.relu = rectifier(widths[0], activations=activations)
        self.layer1 = stage(widths[0], widths[0], stride=1)
        self.layer2 = stage(widths[0], widths[1], stride=2)
        self.layer3 = stage(widths[1], widths[2], stride=2)
        self.linear = Linear(widths[2], num_classes, weights=ends, rngs=rngs)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = convolve(self.conv1, self.bn1, x, self.relu, train=train)
        for block in itertools.chain(self.layer1, self.layer2, self.layer3):
            x = block(x, train=train)
        return self.linear(_pool(x))


def _stage(
    block: Block, in_features: int, out_features: int, *, count: int, stride: int, **layer: Any
) -> nnx.List[Any]:
    blocks = [block(in_features, out_features, stride, **layer)]
    blocks += [block(out_features, out_features, 1, **layer) for _ in range(1, count)]
    return nnx.List(blocks)


def _pool(x: jax.Array) -> jax.Array:
    """Averages `[N, H, W, C]` to `[N, C]`: over the 8x8 windows that fit, or over a smaller map.

    The original pools 8x8 windows and drops what is left over at the edges; it accepts inputs that
    give one window. Where several fit they are averaged, so that any input size works.
    """
    height, width = (size // 8 * 8 if size >= 8 else size for size in x.shape[1:3])
    return x[:, :height, :width].mean((1, 2))


class Shortcut(nnx.Module):
    """The identity, or a 1x1 convolution and batch normalisation where the shape changes.

    Here and in blocks, `layer` are the options of convolutions: `weights`, `activations`, `init`
    and `rngs`.
    """

    normalized_by: ClassVar = {"projection.0": "projection.1"}

    def __init__(self, in_features: int, out_features: int, stride: int, **layer: Any):
        self.projection: nnx.List[Any] = nnx.List([])
        if stride != 1 or in_features != out_features:
            conv = Conv(in_features, out_features, 1, stride=stride, **layer)
            self.projection = nnx.List([conv, BatchNorm(out_features)])

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not self.projection:
            return x
        conv, bn = self.projection
        if not train:
            return convolve(conv, bn, x, train=False)
        x = conv.read(subsample(x, conv.stride), train=True)
        kernel, bias = fold_batch_norm(conv, bn, x, train=True)
        return affine(pointwise_conv(x, kernel), None, bias)


class BasicBlock(nnx.Module):
    """3x3(stride) → BN → ReLU → 3x3 → BN → add → ReLU, with `middle_features` between the two."""

    normalized_by: ClassVar = {"conv1": "bn1", "conv2": "bn2"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        **layer: Any,
    ):
        self.conv1 = Conv(in_features, middle_features, 3, stride=stride, rectified=True, **layer)
        self.bn1 = BatchNorm(middle_features)
        self.relu1 = rectifier(middle_features, **layer)
        self.conv2 = Conv(middle_features, out_features, 3, rectified=True, **layer)
        self.bn2 = BatchNorm(out_features)
        self.shortcut = Shortcut(in_features, out_features, stride, rectified=True, **layer)
        self.relu2 = rectifier(out_features, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = convolve(self.conv1, self.bn1, x, self.relu1, train=train)
        last: dict[str, Any] = {"residual": self.shortcut(x, train=train), "drop": path_dropper()}
        return convolve(self.conv2, self.bn2, y, self.relu2, train=train, **last)


def reduced_widths(reduction: float, reduction_mode: str) -> tuple[int, int, int]:
    """Returns the stages' widths: mode `"net"` divides them by √reduction, `"block"` does not."""
    divisor = reduction**0.5 if reduction_mode == "net" else 1.0
    first, second, third = (at_least_one(w / divisor, "reduction", reduction) for w in WIDTHS)
    return first, second, third


def at_least_one(features: float, field: str, value: float) -> int:
    """Rounds `features` down to a number of channels, as the original does.

    Raises:
      UserError: where that leaves none; it names `field` and its `value`.
    """
    if features < 1:
        raise UserError(f"model.{field} {value} leaves a layer without channels")
    return int(features)


def build(
    depth: int,
    num_classes: int,
    *,
    reduction: float,
    reduction_mode: str,
    block_type: Callable[..., nnx.Module] = BasicBlock,
    multiple: int = 1,
    **options: Any,
) -> ResNet:
    """Builds a ResNet: mode `"block"` gives each block `int(out / reduction)` middle channels.

    The depthwise, mobile and shuffle families are the same with another `block_type`. Middle
    channels are rounded down to a `multiple`. The options are those of `ResNet`.
    """
    of_block = reduction if reduction_mode == "block" else 1.0

    def block(in_features: int, out_features: int, stride: int, **layers: Any) -> nnx.Module:
        features = out_features / of_block // multiple * multiple
        middle = at_least_one(features, "reduction", reduction)
        return block_type(in_features, out_features, stride, middle_features=middle, **layers)

    widths = reduced_widths(reduction, reduction_mode)
    return ResNet(block, depth, num_classes, widths=widths, **options)
