"""The networks without a shift in plain PyTorch, and the worker that times one of them.

The same nets as `shiftnet.models` builds, with float, 1-bit or S3 weights, written to be as fast as
PyTorch allows. A form is "plain/memory format/mode", see `torch_shiftresnet`. For inference low-bit
weights are computed once, and batch norms that follow a convolution are folded into it.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.peers import torch_shiftresnet
from benchmarks.protocol import serve

WIDTHS = (16, 32, 64)
# Of images of 224x224: widths, and blocks in each stage by depth.
WIDTHS_OF_LARGE, COUNTS_OF_LARGE = (64, 128, 256, 512), {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def straight_through(value: Tensor, through: Tensor) -> Tensor:
    """`value`, with the gradient as if it were `through`."""
    return through + (value - through).detach()


def one_bit(latent: Tensor) -> Tensor:
    """√(2 / (inputs k k)) · sign(latent), with the gradient 1."""
    scale = math.sqrt(2 / latent[0].numel())
    return straight_through(torch.where(latent >= 0, scale, -scale), latent)


def s3(sign: Tensor, gate: Tensor, shift1: Tensor, shift2: Tensor) -> Tensor:
    """sign · [gate > 0] · 2^s with s = [shift1 > 0] · ([shift2 > 0] + 1)."""

    def above_zero(latent: Tensor) -> Tensor:
        return straight_through((latent > 0).to(latent.dtype), latent)

    signs = straight_through(torch.where(sign >= 0, 1.0, -1.0), sign)
    shift = above_zero(shift1) * (above_zero(shift2) + 1)
    return signs * above_zero(gate) * torch.exp2(shift)


class Conv(nn.Conv2d):
    """A convolution without bias, padded by half its window, with weights "float", "sign", "s3"."""

    def __init__(
        self, inputs: int, outputs: int, size: int, weights: str, stride: int = 1, groups: int = 1
    ):
        super().__init__(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.weights = weights
        if weights == "s3":
            for name in ("weight_val", "weight_shift", "weight_shift2"):
                setattr(self, name, nn.Parameter(torch.zeros_like(self.weight)))

    def effective(self) -> Tensor:
        """The weight that it convolves with."""
        if self.weights == "sign":
            return one_bit(self.weight)
        if self.weights == "s3":
            return s3(self.weight, self.weight_val, self.weight_shift, self.weight_shift2)
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.effective()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)

    def freeze(self) -> None:
        """Computes the weight for good."""
        self.weight = nn.Parameter(self.effective().detach())
        self.weights = "float"


class Residual(nn.Module):
    """Convolutions, a batch norm behind each, plus the shortcut, ReLU.

    Args:
      inputs: channels.
      stride: of all of it.
      weights: as of `Conv`.
      layers: of each convolution its name, outputs, window, stride and groups, and whether a ReLU
        follows its batch norm.
    """

    def __init__(
        self,
        inputs: int,
        stride: int,
        weights: str,
        *layers: tuple[str, int, int, int, int, bool],
    ):
        super().__init__()
        self.folded: list[tuple[str, str]] = []
        self.relus: list[bool] = []
        outputs = inputs
        for number, (name, features, size, step, groups, relu) in enumerate(layers, 1):
            setattr(self, name, Conv(outputs, features, size, weights, step, groups))
            setattr(self, f"bn{number}", nn.BatchNorm2d(features))
            self.folded.append((name, f"bn{number}"))
            self.relus.append(relu)
            outputs = features
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = Conv(inputs, outputs, 1, weights, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for (conv, norm), relu in zip(self.folded, self.relus, strict=True):
            y = getattr(self, norm)(getattr(self, conv)(y))
            y = F.relu(y) if relu else y
        return F.relu(y + self.shortcut(x))


def basic_block(inputs: int, outputs: int, stride: int, middle: int, weights: str) -> Residual:
    """A ResNet's, of two 3x3 convolutions."""
    layers = ("conv1", middle, 3, stride, 1, True), ("conv2", outputs, 3, 1, 1, False)
    return Residual(inputs, stride, weights, *layers)


def depthwise_block(inputs: int, outputs: int, stride: int, middle: int, weights: str) -> Residual:
    """A DepthwiseResNet's, with a 3x3 depthwise convolution between two of 1x1."""
    first, last = ("conv1", middle, 1, 1, 1, True), ("conv3", outputs, 1, stride, 1, False)
    return Residual(inputs, stride, weights, first, ("depth", middle, 3, 1, middle, False), last)


class ResNet(nn.Module):
    """ResNet and DepthwiseResNet for images of 32x32, and ResNet-18 and -34 for those of 224x224.

    Args:
      family: "resnet", "depthwiseresnet" or "imagenet_resnet".
      depth: 18, 34 or 6n + 2.
      classes: length of the logits.
      weights: as of `Conv`; the first and the last layer have float ones.
      reduction: blocks have `int(outputs / reduction)` channels between their convolutions.
    """

    def __init__(self, family: str, depth: int, classes: int, weights: str, reduction: float):
        super().__init__()
        self.large = family == "imagenet_resnet"
        widths = WIDTHS_OF_LARGE if self.large else WIDTHS
        counts = COUNTS_OF_LARGE[depth] if self.large else ((depth - 2) // 6,) * 3
        block = depthwise_block if family == "depthwiseresnet" else basic_block
        inputs = widths[0]
        size, stride = (7, 2) if self.large else (3, 1)
        self.conv1, self.bn1 = Conv(3, inputs, size, "float", stride), nn.BatchNorm2d(inputs)
        self.folded = [("conv1", "bn1")]
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        for stage, outputs, count in zip(self.stages, widths, counts, strict=True):
            blocks = []
            for index in range(count):
                stride = 2 if stage != "layer1" and index == 0 else 1
                blocks.append(block(inputs, outputs, stride, int(outputs / reduction), weights))
                inputs = outputs
            setattr(self, stage, nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.large else x
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, plus the shortcut, in which zeros are the new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, weights: str):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(inputs, affine=False)
        self.conv0 = Conv(inputs, outputs, 3, weights, stride)
        self.bn1 = nn.BatchNorm2d(outputs, affine=False)
        self.conv1 = Conv(outputs, outputs, 3, weights)
        self.folded = [("conv0", "bn1")]
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(F.relu(self.bn0(x)))
        y = self.conv1(F.relu(self.bn1(y)))
        if self.stride == 2:
            x = F.avg_pool2d(x, 3, 2, 1)
            x = torch.cat([x, torch.zeros_like(x)], 1)
        return x + y


class WideResNet(nn.Module):
    """The wide ResNet for images of 32x32.

    Args:
      depth: 6n + 2.
      classes: length of the logits.
      weights: as of `Conv`; the first and the last layer have float ones.
      width: the first blocks have `int(16 * width)` channels.
    """

    def __init__(self, depth: int, classes: int, weights: str, width: float):
        super().__init__()
        inputs = first = int(16 * width)
        self.conv0 = Conv(3, inputs, 3, "float")
        self.groups = ["group0", "group1", "group2"]
        for number, group in enumerate(self.groups):
            blocks = []
            for index in range((depth - 2) // 6):
                outputs, stride = first * 2**number, 2 if number > 0 and index == 0 else 1
                blocks.append(WideBlock(inputs, outputs, stride, weights))
                inputs = outputs
            setattr(self, group, nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(inputs, affine=False)
        self.conv_last, self.bn_last = Conv(inputs, classes, 1, "float"), nn.BatchNorm2d(classes)
        self.folded = [("conv_last", "bn_last")]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        for group in self.groups:
            x = getattr(self, group)(x)
        x = self.conv_last(F.relu(self.bn(x)))
        return self.bn_last(x).mean((2, 3))


def load(net: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Takes what our side wrote."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"the nets differ: missing {missing}, unexpected {unexpected}")


def fold(net: nn.Module) -> None:
    """For inference: weights computed, batch norms in the convolutions before them."""
    for conv in [module for module in net.modules() if isinstance(module, Conv)]:
        conv.freeze()
    for module in list(net.modules()):
        if isinstance(module, Residual) and len(module.shortcut):
            module.shortcut = nn.Sequential(fuse_conv_bn_eval(*module.shortcut))
        for conv, norm in getattr(module, "folded", ()):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def build(*, model: Mapping[str, Any], num_classes: int, size: int, form: str) -> nn.Module:
    """The net of `config.model`'s fields; there is one way to write it."""
    del size, form
    found = re.fullmatch(r"(\D+)(\d+)", model["arch"])
    if found is None:
        raise ValueError(f"there is no {model['arch']} here")
    family, depth = found[1], int(found[2])
    form_of_weights = model.get("weights", "float")
    if family == "wrn":
        return WideResNet(depth, num_classes, form_of_weights, model.get("width", 1.0))
    return ResNet(family, depth, num_classes, form_of_weights, model.get("reduction", 1.0))


class Measurement(torch_shiftresnet.Measurement):
    """One form of one task on one batch; `net` has what `build` takes."""

    build, load, fold = staticmethod(build), staticmethod(load), staticmethod(fold)


if __name__ == "__main__":
    serve(Measurement, describe=functools.partial(torch_shiftresnet.describe, ("plain",)))
