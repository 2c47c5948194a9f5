"""ShiftResNet: the 3x3 convolutions of a residual network replaced by shifts.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions",
arXiv:1711.08141, in the form of its published code.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.kernels.layouts import pointwise_conv, subsample
from shiftnet.kernels.shift_block import shift_block
from shiftnet.kernels.shift_pointwise import shift_pointwise
from shiftnet.layers import BatchNorm, Conv, LearnedShift, fold_batch_norm, make_shift, rectifier
from shiftnet.layers.folding import computed_once
from shiftnet.layers.shift import constants
from shiftnet.models.drop_path import drop_path, path_dropper
from shiftnet.models.resnet import ResNet, Shortcut, at_least_one, reduced_widths


class ShiftConvBlock(nnx.Module):
    """1x1 → BN → ReLU → shift → 1x1(stride) → BN → ReLU → add, with no ReLU after the addition.

    All of it up to the second convolution is one operation, `shift_block`: the first batch norm is
    folded into the first convolution, in training too, so the expanded tensor is never normalised,
    and exists only inside the operation. In evaluation the rest is part of it as well. With
    quantized inputs of the convolutions, or while its shift is learned, the layers run one by one.
    """

    normalized_by: ClassVar = {"conv1": "bn1", "conv2": "bn2"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        middle_features: int,
        shift: str = "fixed",
        **layer: Any,
    ):
        self.conv1 = Conv(in_features, middle_features, 1, **layer)
        self.bn1 = BatchNorm(middle_features)
        self.relu1 = rectifier(middle_features, **layer)
        self.shift = make_shift(middle_features, kind=shift, rngs=layer["rngs"])
        self.conv2 = Conv(middle_features, out_features, 1, stride=stride, rectified=True, **layer)
        self.bn2 = BatchNorm(out_features)
        self.relu2 = rectifier(out_features, **layer)
        self.shortcut = Shortcut(in_features, out_features, stride, **layer)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        offsets = constants(self.shift)
        if self.conv1.activation is not None or offsets is None:
            return self._apart(x, train)
        block: Callable[..., jax.Array] = functools.partial(
            shift_block, stride=self.conv2.stride, **offsets
        )
        if train:
            x = computed_once(x)
            w1, b1 = fold_batch_norm(self.conv1, self.bn1, x, train=True)
            y = block(x, w1, b1, self.conv2.matrix.astype(x.dtype))
            shortcut = self.shortcut(x, train=True)
            if drop := path_dropper():
                return drop(self.bn2(y, train=True, out_relu=True)) + shortcut
            return self.bn2(y, train=True, out_relu=True, residual=shortcut)
        w1, b1 = fold_batch_norm(self.conv1, self.bn1, x)
        w2, b2 = fold_batch_norm(self.conv2, self.bn2, x)
        shortcut = self.shortcut(x, train=False)
        return block(x, w1, b1, w2, out_bias=b2, out_relu=True, residual=shortcut)

    def _apart(self, x: jax.Array, train: bool) -> jax.Array:
        """Layer by layer: with quantized inputs, or while the shift is learned."""
        y = self.relu1(self.bn1(self.conv1(x, train=train), train=train))
        if isinstance(self.shift, LearnedShift) and self.shift.kind == "active":
            y = self.conv2(self.shift(y, train=train), train=train)
        else:
            # Quantized before the shift, which brings in zeros.
            y = self.conv2.read(y, train=train)
            w2, stride = self.conv2.matrix.astype(y.dtype), self.conv2.stride
            offsets = constants(self.shift)
            if offsets is None:
                y = pointwise_conv(subsample(self.shift(y, train=train), stride), w2)
            else:
                y = shift_pointwise(y, w2, stride=stride, **offsets)
        y = drop_path(self.relu2(self.bn2(y, train=train)))
        return y + self.shortcut(x, train=train)


def build(
    depth: int,
    num_classes: int,
    *,
    expansion: float,
    reduction: float,
    reduction_mode: str,
    shift: str = "fixed",
    **options: Any,
) -> ResNet:
    """Builds a ShiftResNet: each block has `int(out * expansion)` middle channels.

    `shift` is the kind of its shifts, `"fixed"`, `"active"` or `"sparse"` (`make_shift`).
    The options are those of `ResNet`.
    """
    if reduction != 1 and reduction_mode == "block":
        raise UserError(
            "model.reduction must be 1 for a shiftresnet in reduction_mode 'block' "
            f"(model.expansion sets its middle channels), got {reduction}"
        )

    def block(in_features: int, out_features: int, stride: int, **layers: Any) -> ShiftConvBlock:
        middle = at_least_one(out_features * expansion, "expansion", expansion)
        return ShiftConvBlock(
            in_features, out_features, stride, middle_features=middle, shift=shift, **layers
        )

    widths = reduced_widths(reduction, reduction_mode)
    return ResNet(block, depth, num_classes, widths=widths, **options)
