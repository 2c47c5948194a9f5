"""Residual networks for small images, and the frame that the shift and depthwise ones share.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2, in the
form of the code published with arXiv:1711.08141: projection shortcuts, no biases in convolutions.
Modules carry the names of the original's state dict.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.kernels.implementations import is_only_xla
from shiftnet.kernels.layouts import Layout, affine, every, product
from shiftnet.layers import BatchNorm, Conv, Linear
from shiftnet.models.network import Network
from shiftnet.quantizers.initializers import torch_uniform

WIDTHS = (16, 32, 64)


class Block(Protocol):
    """What a stage is made of: `block(in_features, out_features, stride, rngs=rngs)`."""

    def __call__(
        self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs
    ) -> nnx.Module: ...


class ResNet(Network):
    """Stem, three stages of `(depth - 2) / 6` blocks at strides 1, 2, 2, average pool, linear.

    Args:
      block: builds one block; see `Block`.
      depth: 6n + 2.
      num_classes: length of the logits.
      widths: channels of the three stages; the stem has as many as the first.
      dtype: as of `Network`.
      rngs: the `params` stream draws the parameters.
    """

    first_and_last = ("conv1", "linear")

    def __init__(
        self,
        block: Block,
        depth: int,
        num_classes: int,
        *,
        widths: tuple[int, int, int] = WIDTHS,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dtype)
        count = (depth - 2) // 6
        self.conv1 = Conv(3, widths[0], 3, rngs=rngs)
        self.bn1 = BatchNorm(widths[0])
        self.layer1 = _stage(block, widths[0], widths[0], count, stride=1, rngs=rngs)
        self.layer2 = _stage(block, widths[0], widths[1], count, stride=2, rngs=rngs)
        self.layer3 = _stage(block, widths[1], widths[2], count, stride=2, rngs=rngs)
        self.linear = Linear(widths[2], num_classes, rngs=rngs)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x), train=train))
        return self.linear(_pool(self.body(x, train=train)))

    def body(self, x: jax.Array, *, train: bool) -> jax.Array:
        """All blocks in turn."""
        for block in self.blocks():
            x = block(x, train=train)
        return x

    def blocks(self) -> Iterator[nnx.Module]:
        """Of the three stages, in order."""
        return itertools.chain(self.layer1, self.layer2, self.layer3)


def _stage(block: Block, in_features: int, out_features: int, count: int, *, stride: int, rngs):
    first = block(in_features, out_features, stride, rngs=rngs)
    rest = [block(out_features, out_features, 1, rngs=rngs) for _ in range(count - 1)]
    return nnx.List([first, *rest])


def _pool(x: jax.Array) -> jax.Array:
    """Averages `[N, H, W, C]` to `[N, C]`: over the 8x8 windows that fit, or over a smaller map.

    The original pools 8x8 windows and drops what is left over at the edges; it accepts inputs that
    give one window. Where several fit they are averaged, so that any input size works.
    """
    height, width = (size // 8 * 8 if size >= 8 else size for size in x.shape[1:3])
    return x[:, :height, :width].mean((1, 2))


class Shortcut(nnx.Module):
    """The identity, or a 1x1 convolution and batch normalisation where the shape changes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        init: Callable[..., jax.Array] = torch_uniform,
        rngs: nnx.Rngs,
    ):
        self.projection: nnx.List[Any] = nnx.List([])
        if stride != 1 or in_features != out_features:
            conv = Conv(in_features, out_features, 1, stride=stride, init=init, rngs=rngs)
            self.projection = nnx.List([conv, BatchNorm(out_features)])

    def __call__(self, x: jax.Array, *, train: bool, layout: Layout = "NHWC") -> jax.Array:
        if not self.projection:
            return x
        conv, bn = self.projection
        if is_only_xla():
            return bn(conv(x), train=train)
        x = every(x, conv.stride, layout)
        kernel, bias = bn.through(x, conv.matrix, train=train, layout=layout)
        return affine(product(x, kernel, layout), None, bias, layout)


class BasicBlock(nnx.Module):
    """3x3(stride) → BN → ReLU → 3x3 → BN → add → ReLU, with `middle_features` between the two."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        rngs: nnx.Rngs,
    ):
        self.conv1 = Conv(in_features, middle_features, 3, stride=stride, rngs=rngs)
        self.bn1 = BatchNorm(middle_features)
        self.conv2 = Conv(middle_features, out_features, 3, rngs=rngs)
        self.bn2 = BatchNorm(out_features)
        self.shortcut = Shortcut(in_features, out_features, stride, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.conv2(y), train=train)
        return nnx.relu(y + self.shortcut(x, train=train))


def reduced_widths(reduction: float, reduction_mode: str) -> tuple[int, int, int]:
    """The widths of the stages: mode `"net"` divides each by √reduction, mode `"block"` none."""
    divisor = reduction**0.5 if reduction_mode == "net" else 1.0
    first, second, third = (at_least_one(w / divisor, "reduction", reduction) for w in WIDTHS)
    return first, second, third


def at_least_one(features: float, field: str, value: float) -> int:
    """`features` rounded down to a number of channels, as the original does.

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
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
    block_type: Callable[..., nnx.Module] = BasicBlock,
) -> ResNet:
    """ResNet: mode `"block"` gives each block `int(out / reduction)` middle channels.

    The depthwise family is the same with another `block_type`.
    """
    inner = reduction if reduction_mode == "block" else 1.0

    def block(in_features, out_features, stride, *, rngs):
        middle = at_least_one(out_features / inner, "reduction", reduction)
        return block_type(in_features, out_features, stride, middle_features=middle, rngs=rngs)

    widths = reduced_widths(reduction, reduction_mode)
    return ResNet(block, depth, num_classes, widths=widths, dtype=dtype, rngs=rngs)
