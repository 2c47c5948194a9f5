"""Turns a trained network into integers, layer by layer.

`convert` walks through the network in the order of its forward pass. Each step computes the float
tensor for a few hundred images, chooses the codes of that tensor from it, and appends the integer
layer that gives them. Batch norms become part of the requantization of the layer before them, or
of its weights where these are float.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.errors import UserError
from shiftnet.integers import graph as graph_lib
from shiftnet.integers.graph import (
    Add,
    Codes,
    Conv,
    Depthwise,
    Graph,
    Layer,
    Pool,
    Requantization,
    Table,
)
from shiftnet.integers.requantize import MOST, requantization, sum_requantization
from shiftnet.layers import BatchNorm, LearnedShift, Shift
from shiftnet.layers.learned_shift import REACH, fold_shifts
from shiftnet.layers.pooling import average_pool
from shiftnet.models.depthwiseresnet import DepthwiseBlock
from shiftnet.models.mobileresnet import MobileBlock
from shiftnet.models.network import Network
from shiftnet.models.resnet import BasicBlock, ResNet, Shortcut
from shiftnet.models.shiftresnet import ShiftConvBlock
from shiftnet.models.shuffleresnet import ShuffleBlock, channel_shuffle
from shiftnet.models.wrn import WideBlock, WideResNet
from shiftnet.quantizers import LowBitWeight, QuantizedWeight

Requantize = Literal["shift", "multiplier"]
REQUANTIZE: tuple[Requantize, ...] = ("shift", "multiplier")

# Signed powers of two in a multiplier of `shift`.
TERMS = 3
# Images whose float tensors are kept to compare with.
KEPT = 16
# Values of a tensor that its step is chosen from.
SAMPLED = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """An integer network, and what the float network computed on the first images.

    Attributes:
      graph: the integer network.
      images: uint8 `[KEPT, H, W, 3]`.
      floats: float32 `[KEPT, height, width, channels]` for each layer, which its codes times their
        step are near.
    """

    graph: Graph
    images: np.ndarray
    floats: dict[str, np.ndarray]


def convert(
    network: nnx.Module,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    requantize: Requantize = "shift",
    terms: int = TERMS,
) -> Conversion:
    """Converts a network to integers.

    Codes have 8 bits, or as many as a layer's own activation form says; the sums that residual
    blocks add up have 16 bits where they are not read as they are. Float weights get 8 bits.

    Args:
      network: a trained one, of the CIFAR families; changed in place, as learned shifts that round
        their offsets are folded.
      images: uint8 `[N, H, W, 3]`, from which steps are chosen: a few hundred of the training set.
      mean, std: of each channel, for pixels in [0, 1].
      requantize: `"shift"`: steps are powers of two, and sums are brought to them by at most
        `terms` shifts and additions; `"multiplier"`: any step, and one multiplication by an integer
        of 16 bits.
      terms: see `requantize`; 1 leaves a single shift.

    Raises:
      UserError: for a network that cannot be converted, or whose sums do not fit in 32 bits.
    """
    if isinstance(network, Network):
        network.dtype = None
    fold_shifts(network)
    builder = _Builder(images, mean, std, None if requantize == "multiplier" else terms)
    builder.wide = any(
        getattr(module, "activation", None) is not None for _, module in nnx.iter_modules(network)
    )
    if isinstance(network, ResNet):
        _resnet(builder, network)
    elif isinstance(network, WideResNet):
        _wide_resnet(builder, network)
    else:
        raise UserError(
            f"a {type(network).__name__} cannot be converted to integers yet, CIFAR networks can"
        )
    graph = Graph(tuple(builder.layers), requantize == "multiplier")
    graph_lib.verify(graph)
    last = graph.layers[-1].name
    _check(network, builder.normalized[:KEPT], builder.floats[last][:, 0, 0])
    return Conversion(graph, images[:KEPT], builder.floats)


def _check(network: nnx.Module, x: jax.Array, walked: np.ndarray) -> None:
    """Raises a UserError if the walk did not compute what the network does."""
    expected = np.asarray(network(x))
    if not np.allclose(walked, expected, atol=2e-3 * max(float(np.abs(expected).max()), 1e-6)):
        raise UserError(
            "this network has a part that cannot be converted to integers yet: "
            f"its logits differ by {np.abs(walked - expected).max():.3g} without it"
        )


class _Builder:
    """The layers so far, and the float tensors of the images for those still to come.

    Attributes:
      layers: in order.
      floats: of the first images, by layer.
      wide: whether residual sums are kept in 16 bits.
    """

    def __init__(
        self, images: np.ndarray, mean: Sequence[float], std: Sequence[float], terms: int | None
    ):
        self.terms = terms
        self.wide = False
        self.layers: list[Layer] = []
        self.formats: dict[str, Codes] = {}
        self.values: dict[str, jax.Array] = {}
        self.floats: dict[str, np.ndarray] = {}
        pixels = np.arange(256, dtype=np.float32)[:, None] / 255
        self.pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
        self.normalized = jnp.asarray(self.pixels[images, np.arange(3)])
        self.shape = images.shape[1:3]

    def append(self, layer: Layer, value: jax.Array) -> str:
        self.layers.append(layer)
        self.formats[layer.name] = layer.output
        self.values[layer.name] = value
        self.floats[layer.name] = np.asarray(value[:KEPT])
        return layer.name

    def keep(self, name: str) -> None:
        """Forgets all float tensors but this one, the only one that later layers read."""
        self.values = {name: self.values[name]}

    def codes(
        self, value: jax.Array, *, rectified: bool, reader: Any = None, wide: bool = False
    ) -> Codes:
        """Chooses the codes of a tensor `[N, H, W, C]`.

        Args:
          value: of the calibration images.
          rectified: whether it has no negative values.
          reader: the layer that reads it; its own activation form decides, where it has one.
          wide: for 16 bits.
        """
        height, width, channels = value.shape[1:]
        form = getattr(reader, "activation", None)
        if form is not None:
            low, high, step = _of_form(form)
            return Codes(height, width, channels, max(low, 0) if rectified else low, high, step)
        if wide:
            low, high = 0 if rectified else -(2**15), 2**15 - 1
        else:
            low, high = (0, 2**8 - 1) if rectified else (-(2**7), 2**7 - 1)
        return Codes(
            height,
            width,
            channels,
            low,
            high,
            _step(np.asarray(value), low, high, self.terms is not None),
        )

    def table(self, reader: Any) -> str:
        """Appends the table from pixels to the codes of normalized pixels."""
        form = getattr(reader, "activation", None)
        if form is not None:
            low, high, step = _of_form(form)
            integers = form.integers(jnp.asarray(self.pixels))[0]
        else:
            low, high = -(2**7), 2**7 - 1
            step = float(np.abs(self.pixels).max()) / high
            integers = np.clip(np.round(self.pixels / step), low, high)
        height, width = self.shape
        output = Codes(height, width, self.pixels.shape[-1], low, high, step)
        table = np.asarray(integers).astype(np.int16)
        return self.append(Table("pixels", (), output, table), self.normalized)

    def read(self, source: str, name: str, reader: Any) -> str:
        """Returns the tensor that layer `name` reads, brought to its own codes if it has some."""
        form = getattr(reader, "activation", None)
        if form is None:
            return source
        low, high, step = _of_form(form)
        codes = self.formats[source]
        if math.isclose(codes.step, step) and low <= codes.low and codes.high <= high:
            return source
        output = dataclasses.replace(codes, low=low, high=high, step=step)
        return self.scale(f"{name}.input", source, 1.0, 0.0, output, self.values[source])

    def scale(
        self, name: str, source: str, factor: Any, offset: Any, output: Codes, value: jax.Array
    ) -> str:
        """Appends `source * factor + offset`, per channel."""
        codes = self.formats[source]
        ones = np.ones(codes.channels)
        sums = np.full(codes.channels, codes.largest)
        after = self.requantization(
            name, ones * factor * codes.step / output.step, ones * offset / output.step, sums
        )
        return self.append(Pool(name, (source,), output, (1, 1), 1, 0, after), value)

    def conv(
        self,
        name: str,
        source: str,
        conv: Any,
        bn: BatchNorm | None,
        *,
        relu: bool,
        reader: Any = None,
        wide: bool = False,
        shift: Any = None,
        stride: int | None = None,
        shuffle: bool = False,
    ) -> str:
        """Appends a convolution, a batch norm and a ReLU.

        Args:
          name: of the layer.
          source: what it reads.
          conv: the convolution.
          bn: the batch norm after it.
          relu: whether a ReLU follows.
          reader: the layer that reads the result, if it is one alone.
          wide: for a result of 16 bits.
          shift: the shift before it.
          stride: at which its result is kept, beyond its own.
          shuffle: whether a channel shuffle follows, by as many groups as the convolution has.
        """
        source = self.read(source, name, conv)
        value = self.values[source]
        value = conv(value if shift is None else shift(value))
        scale, bias = np.ones(value.shape[-1]), np.zeros(value.shape[-1])
        if bn is not None:
            value = bn(value)
            scale, bias = _affine(bn)
        if relu:
            value = nnx.relu(value)
        steps = conv.stride * (stride or 1)
        if stride:
            value = value[:, ::stride, ::stride]
        output = self.codes(value, rectified=relu, reader=reader, wide=wide)
        into = self.formats[source].step / output.step
        weights, levels, factor = _integers(conv.weight, scale * into, self.terms is not None)
        kind: Any = Conv
        options: dict[str, Any] = {}
        if 1 < conv.groups == weights.shape[3] and weights.shape[2] == 1:
            kind = Depthwise
        elif conv.groups > 1:
            options = {"groups": conv.groups, "run": weights.shape[3] // conv.groups}
        elif shift is not None:
            options = _moves(name, shift)
        if shuffle and kind is Conv:
            in_order = np.asarray(channel_shuffle(jnp.arange(output.channels), conv.groups))
            weights, factor, bias = weights[..., in_order], factor[in_order], bias[in_order]
            value = value[..., in_order]
            options["run"] = 1
        none = _no_requantization(output.channels)
        layer = kind(name, (source,), output, weights, levels, steps, none, **options)
        sums = graph_lib.sum_bounds(layer, [self.formats[source]])
        after = self.requantization(name, factor, bias / output.step, sums)
        return self.append(dataclasses.replace(layer, requantization=after), value)

    def requantization(
        self, name: str, factor: np.ndarray, offset: np.ndarray, sums: np.ndarray
    ) -> Requantization:
        return requantization(name, factor, offset, sums, self.terms)

    def add(self, name: str, a: str, b: str, *, relu: bool = False, wide: bool = False) -> str:
        """Appends a sum, of which `b` may lack channels, and a ReLU."""
        x, y = self.values[a], self.values[b]
        value = x + jnp.pad(y, [(0, 0)] * 3 + [(0, x.shape[-1] - y.shape[-1])])
        value = nnx.relu(value) if relu else value
        rectified = relu or (self.formats[a].low >= 0 and self.formats[b].low >= 0)
        output = self.codes(value, rectified=rectified, wide=wide)
        inputs = [self.formats[each] for each in (a, b)]
        by_a, by_b, bias, shift = sum_requantization(
            name, [(codes.step / output.step, codes.largest) for codes in inputs], self.terms
        )
        return self.append(Add(name, (a, b), output, (by_a, by_b), bias, shift), value)

    def pool(self, name: str, source: str, window: tuple[int, int], reader: Any) -> str:
        """Appends the mean over the windows that fit of a map, averaged; `[N, 1, 1, C]`.

        The mean is kept as the sum, whose step is so much smaller, unless its reader has its own.
        """
        codes = self.formats[source]
        height, width = window
        value = self.values[source][:, :height, :width].mean((1, 2), keepdims=True)
        count = height * width
        form = getattr(reader, "activation", None)
        if form is not None:
            low, high, step = _of_form(form)
            output = Codes(1, 1, codes.channels, low, high, step)
        else:
            shift = 0
            while codes.largest * count >> shift > 2**15 - 1:
                shift += 1
            low, high = (limit * count >> shift for limit in (codes.low, codes.high))
            step = codes.step / count * 2**shift
            output = Codes(1, 1, codes.channels, low, high, step)
        sums = np.full(codes.channels, codes.largest * count)
        factor = np.full(codes.channels, codes.step / count / output.step)
        most = MOST if form is not None else max(0, round(-math.log2(factor[0])))
        after = requantization(name, factor, np.zeros(codes.channels), sums, self.terms, most)
        return self.append(Pool(name, (source,), output, window, 1, 0, after), value)

    def linear(
        self, name: str, source: str, weight: Any, scale: np.ndarray, bias: np.ndarray
    ) -> str:
        """Appends the last layer, whose codes are the logits: `x @ weight * scale + bias`.

        Args:
          name: of the layer.
          source: its input, `[N, 1, 1, C]`.
          weight: `[in, out]` or `[1, 1, in, out]`.
          scale, bias: of each class, float64.
        """
        codes = self.formats[source]
        matrix = weight().reshape(codes.channels, len(scale))
        value = self.values[source] @ matrix * scale.astype(np.float32) + bias.astype(np.float32)
        weights, levels, factor = _integers(weight, scale, False, together=True)
        weights = weights.reshape(1, 1, codes.channels, len(scale))
        # All classes have one step, and where they have several factors a finer one.
        equal = bool((factor == factor[0]).all())
        step = (float(np.abs(factor).max()) or 1.0) * codes.step / (1 if equal else 2**6)
        low, high = graph_lib.INT32
        output = Codes(1, 1, len(factor), low, high, step)
        none = _no_requantization(len(factor))
        layer = Conv(name, (source,), output, weights, levels, 1, none)
        sums = graph_lib.sum_bounds(layer, [codes])
        most = 0 if equal else MOST
        after = requantization(
            name, factor * codes.step / step, bias / step, sums, self.terms, most
        )
        return self.append(dataclasses.replace(layer, requantization=after), value)


def _resnet(builder: _Builder, network: ResNet) -> None:
    wide = builder.wide
    x = builder.table(network.conv1)
    x = builder.conv("conv1", x, network.conv1, network.bn1, relu=True, wide=wide)
    builder.keep(x)
    for stage in ("layer1", "layer2", "layer3"):
        for i, block in enumerate(getattr(network, stage)):
            walk = BLOCKS.get(type(block))
            if walk is None:
                raise UserError(
                    f"{stage}.{i} is a {type(block).__name__}, which cannot be converted to "
                    "integers yet"
                )
            x = walk(builder, f"{stage}.{i}", x, block)
            builder.keep(x)
    codes = builder.formats[x]
    height, width = (n // 8 * 8 if n >= 8 else n for n in (codes.height, codes.width))
    x = builder.pool("pool", x, (height, width), network.linear)
    form = getattr(network.linear, "activation", None)
    if form is not None:
        builder.values[x] = form(builder.values[x])
    bias = np.asarray(network.linear.bias[...], np.float64)
    builder.linear("linear", x, network.linear.weight, np.ones(len(bias)), bias)


def _shortcut(builder: _Builder, name: str, x: str, shortcut: Shortcut) -> str:
    if not shortcut.projection:
        return x
    conv, bn = shortcut.projection
    return builder.conv(f"{name}.shortcut", x, conv, bn, relu=False, wide=builder.wide)


def _shift_conv_block(builder: _Builder, name: str, x: str, block: ShiftConvBlock) -> str:
    y = builder.conv(f"{name}.conv1", x, block.conv1, block.bn1, relu=True, reader=block.conv2)
    y = builder.conv(
        f"{name}.conv2", y, block.conv2, block.bn2, relu=True, wide=builder.wide, shift=block.shift
    )
    shortcut = _shortcut(builder, name, x, block.shortcut)
    return builder.add(name, y, shortcut, wide=builder.wide)


def _basic_block(builder: _Builder, name: str, x: str, block: BasicBlock) -> str:
    y = builder.conv(f"{name}.conv1", x, block.conv1, block.bn1, relu=True, reader=block.conv2)
    y = builder.conv(f"{name}.conv2", y, block.conv2, block.bn2, relu=False, wide=builder.wide)
    shortcut = _shortcut(builder, name, x, block.shortcut)
    return builder.add(name, y, shortcut, relu=True, wide=builder.wide)


def _depthwise_block(builder: _Builder, name: str, x: str, block: DepthwiseBlock) -> str:
    # The pixels that conv3's stride leaves out are not computed in the layer before it either.
    stride = block.conv3.stride
    y = builder.conv(f"{name}.conv1", x, block.conv1, block.bn1, relu=True, reader=block.depth)
    y = builder.conv(
        f"{name}.depth", y, block.depth, block.bn2, relu=False, reader=block.conv3, stride=stride
    )
    alone = block.shortcut is None
    y = builder.conv(
        f"{name}.conv3", y, _Strideless(block.conv3), block.bn3, relu=alone, wide=builder.wide
    )
    if block.shortcut is None:
        return y
    shortcut = _shortcut(builder, name, x, block.shortcut)
    return builder.add(name, y, shortcut, relu=True, wide=builder.wide)


def _mobile_block(builder: _Builder, name: str, x: str, block: MobileBlock) -> str:
    y = builder.conv(
        f"{name}.depth1", x, block.depth1, block.depth_bn1, relu=True, reader=block.conv1
    )
    y = builder.conv(f"{name}.conv1", y, block.conv1, block.bn1, relu=True, reader=block.depth2)
    y = builder.conv(
        f"{name}.depth2", y, block.depth2, block.depth_bn2, relu=True, reader=block.conv2
    )
    return builder.conv(f"{name}.conv2", y, block.conv2, block.bn2, relu=True, wide=builder.wide)


def _shuffle_block(builder: _Builder, name: str, x: str, block: ShuffleBlock) -> str:
    y = builder.conv(
        f"{name}.conv1", x, block.conv1, block.bn1, relu=True, reader=block.depth, shuffle=True
    )
    y = builder.conv(f"{name}.depth", y, block.depth, block.bn2, relu=True, reader=block.conv3)
    y = builder.conv(f"{name}.conv3", y, block.conv3, block.bn3, relu=False, wide=builder.wide)
    shortcut = _shortcut(builder, name, x, block.shortcut)
    return builder.add(name, y, shortcut, relu=True, wide=builder.wide)


def _moves(name: str, shift: Shift | LearnedShift) -> dict[str, Any]:
    """Returns the fields of a `Conv` that say how a shift moves its input.

    Raises:
      UserError: for offsets that are not whole, which need products with their fractions.
    """
    if isinstance(shift, Shift):
        return {"shift": (shift.kernel_size, shift.dilation)}
    offsets = np.stack([np.asarray(o[...]) for o in (shift.rows, shift.columns)], axis=1)
    offsets = offsets.clip(-REACH, REACH)
    whole = np.round(offsets).astype(np.int8)
    if (offsets != whole).any():
        raise UserError(
            f"{name} reads a bilinear shift, whose offsets are not whole; networks with "
            "model.shift sparse can be converted to integers"
        )
    reach = int(np.abs(whole).max())
    return {"shift": (2 * reach + 1, 1), "offsets": whole}


class _Strideless:
    """A convolution without its stride."""

    stride = 1

    def __init__(self, conv: Any):
        self.weight, self.groups, self.activation = (
            conv.weight,
            conv.groups,
            getattr(conv, "activation", None),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        read = x if self.activation is None else self.activation(x)
        return read @ self.weight()[0, 0]


BLOCKS: dict[type, Callable[[_Builder, str, str, Any], str]] = {
    ShiftConvBlock: _shift_conv_block,
    BasicBlock: _basic_block,
    DepthwiseBlock: _depthwise_block,
    MobileBlock: _mobile_block,
    ShuffleBlock: _shuffle_block,
}


def _wide_resnet(builder: _Builder, network: WideResNet) -> None:
    x = builder.table(network.conv0)
    x = builder.conv("conv0", x, network.conv0, None, relu=False, wide=True)
    builder.keep(x)
    for group in ("group0", "group1", "group2"):
        for i, block in enumerate(getattr(network, group)):
            x = _wide_block(builder, f"{group}.{i}", x, block)
            builder.keep(x)
    x = _normalized(builder, "bn", x, network.bn, network.conv_last)
    form = getattr(network.conv_last, "activation", None)
    if form is not None:
        builder.values[x] = form(builder.values[x])
    codes = builder.formats[x]
    # The mean comes first here: a 1x1 convolution and a batch norm of means are means of theirs.
    x = builder.pool("pool", x, (codes.height, codes.width), None)
    scale, bias = _affine(network.bn_last)
    builder.linear("conv_last", x, network.conv_last.weight, scale, bias)


def _wide_block(builder: _Builder, name: str, x: str, block: WideBlock) -> str:
    y = _normalized(builder, f"{name}.bn0", x, block.bn0, block.conv0)
    y = builder.conv(f"{name}.conv0", y, block.conv0, block.bn1, relu=True, reader=block.conv1)
    y = builder.conv(f"{name}.conv1", y, block.conv1, None, relu=False, wide=True)
    if builder.values[x].shape != builder.values[y].shape:
        codes = builder.formats[x]
        value = average_pool(builder.values[x])
        output = builder.codes(value, rectified=False, wide=True)
        sums = np.full(codes.channels, 9 * codes.largest)
        factor = np.full(codes.channels, codes.step / 9 / output.step)
        pooled = f"{name}.pool"
        after = builder.requantization(pooled, factor, np.zeros(codes.channels), sums)
        x = builder.append(Pool(pooled, (x,), output, (3, 3), 2, 1, after), value)
    return builder.add(name, y, x, wide=True)


def _normalized(builder: _Builder, name: str, x: str, bn: BatchNorm, reader: Any) -> str:
    """Appends a batch norm and a ReLU."""
    value = nnx.relu(bn(builder.values[x]))
    output = builder.codes(value, rectified=True, reader=reader)
    return builder.scale(name, x, *_affine(bn), output, value)


def _affine(bn: BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a batch norm multiplies by and adds, float64."""
    scale, bias = bn.scale_and_bias(jnp.dtype(jnp.float32))
    return np.asarray(scale, np.float64), np.asarray(bias, np.float64)


def _of_form(form: Any) -> tuple[int, int, float]:
    """Returns the least and the largest code of an activation form, and its step.

    Raises:
      UserError: for a form that does not clip and round.
    """
    low, high = getattr(form, "low", None), getattr(form, "high", None)
    if low is None or high is None:
        raise UserError(
            f"activations of the form {type(form).__name__} cannot be converted to integers yet"
        )
    step = form.integers(jnp.zeros((1, 1, 1, form.features)))[1]
    return int(low), int(high), float(step)


def _step(value: np.ndarray, low: int, high: int, power_of_two: bool) -> float:
    """Returns the step with which a tensor's codes are nearest to it, in the sum of squares."""
    flat = value.ravel()
    apart = -(-len(flat) // SAMPLED)
    while math.gcd(apart, math.prod(value.shape[1:])) > 1:  # of every pixel and channel
        apart += 1
    flat = flat[::apart]
    largest = max(float(flat.max(initial=0)) / high, -float(flat.min(initial=0)) / max(-low, 1))
    if not largest:
        return 1.0
    if power_of_two:
        first = math.ceil(math.log2(largest))
        steps = [2.0**exponent for exponent in range(first, first - 4, -1)]
    else:
        steps = [largest * 0.9**i for i in range(20)]

    def error(step: float) -> float:
        codes = np.clip(np.floor(flat / step + 0.5), low, high)
        return float(np.square(flat - codes * step).sum(dtype=np.float64))

    return min(steps, key=error)


def _integers(
    weight: Any, scale: np.ndarray, power_of_two: bool, *, together: bool = False
) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Returns the integers of a weight that is multiplied by `scale` in the end.

    Args:
      weight: of a convolution or linear layer.
      scale: of each output channel, float64.
      power_of_two: whether the factor of float weights must be one.
      together: whether float weights have one factor for all output channels.

    Returns:
      int16 of the weight's shape, its levels, and the factor by which they are multiplied.
    """
    if isinstance(weight, LowBitWeight):
        weight = weight.quantized()
    if isinstance(weight, QuantizedWeight):
        levels = np.array(weight.levels, np.int16)[np.asarray(weight.codes)]
        own = np.asarray(weight.scale, np.float64)
        if own.size > 1 and own.size != own.shape[-1]:
            raise UserError("a weight with scales within an output channel cannot be converted yet")
        return levels, tuple(weight.levels), np.broadcast_to(own.reshape(-1), scale.shape) * scale
    values = np.asarray(weight(), np.float64) * scale
    axes = tuple(range(values.ndim - (0 if together else 1)))
    largest = np.broadcast_to(np.abs(values).max(axes), scale.shape)
    factor = np.where(largest > 0, largest, 1) / 127
    if power_of_two:
        factor = 2.0 ** np.ceil(np.log2(factor))
    return np.round(values / factor).astype(np.int16), (), factor


def _no_requantization(channels: int) -> Requantization:
    zeros = np.zeros(channels, np.int32)
    return Requantization(zeros.astype(np.int16), zeros, zeros.astype(np.uint8))
