"""An integer network as plain data: a list of layers, each with the integers it computes with.

Every layer sums products of integer codes and integer weights, and brings each sum to the codes of
its output by

    clip((sum * multiplier + bias) >> shift, low, high)

with three integers per channel; `>>` rounds down, and the bias holds the half that makes it round
to the nearest. All of it fits in 32 bits for any image: `bounds` computes the worst case.
"""

import dataclasses
from typing import Any

import numpy as np

from shiftnet.errors import UserError
from shiftnet.integers import digits
from shiftnet.kernels.shift.offsets import channel_offsets

INT32 = (-(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Codes:
    """What the integers of a tensor mean: `codes * step`, with `low <= codes <= high`."""

    height: int
    width: int
    channels: int
    low: int
    high: int
    step: float

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def dtype(self) -> str:
        """The narrowest of int8, uint8, int16 and int32 that holds them."""
        for name in ("int8", "uint8", "int16"):
            limits = np.iinfo(name)
            if limits.min <= self.low and self.high <= limits.max:
                return name
        return "int32"


@dataclasses.dataclass(frozen=True, eq=False)
class Requantization:
    """From sums to codes: `clip((sum * multiplier + bias) >> shift, low, high)`.

    Attributes:
      multiplier: int16 `[channels]`.
      bias: int32 `[channels]`.
      shift: uint8 `[channels]`, below 32.
    """

    multiplier: np.ndarray
    bias: np.ndarray
    shift: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer; `inputs` are the names of layers before it, none for the first."""

    name: str
    inputs: tuple[str, ...]
    output: Codes


@dataclasses.dataclass(frozen=True, eq=False)
class Table(Layer):
    """Looks pixels up: `table[pixel, channel]`; normalization and rounding are in the table.

    Attributes:
      table: int16 `[256, 3]`.
    """

    table: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Conv(Layer):
    """A convolution padded by zeros, a shift followed by a 1x1 convolution, or a linear layer.

    Attributes:
      weights: int16 `[k, k, in_channels // groups, out_channels]`.
      levels: all values that a weight can have, rising; they are stored as indices of these. Empty
        for 8-bit weights, -127 to 127.
      stride: in pixels, both ways.
      requantization: for each output channel.
      shift: `(kernel_size, dilation)` of a shift of the input, `shiftnet.kernels.shift`; None for
        none. k is 1 then.
      offsets: the shift's rows and columns for each input channel, int8 `[in_channels, 2]`, within
        the kernel; None for those that the channel's number decides.
      groups: into which the input channels are divided.
      run: how many output channels in turn read the same group; those after them read the next one,
        and after the last the first. So a channel shuffle is the order of the output channels.
    """

    weights: np.ndarray
    levels: tuple[int, ...]
    stride: int
    requantization: Requantization
    shift: tuple[int, int] | None = None
    offsets: np.ndarray | None = None
    groups: int = 1
    run: int = 1

    def group(self) -> np.ndarray:
        """Returns the group of input channels that each output channel reads."""
        return np.arange(self.weights.shape[-1]) // self.run % self.groups

    def dense(self) -> np.ndarray:
        """Returns the weights `[k, k, in_channels, out_channels]`, 0 between groups."""
        if self.groups == 1:
            return self.weights
        reads = np.arange(self.groups)[:, None, None] == self.group()
        blocks = self.weights[:, :, None] * reads
        return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])

    def moves(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the offsets of a shift, in rows and in columns, for each input channel."""
        if self.offsets is not None:
            rows, columns = self.offsets.T
            return rows, columns
        assert self.shift is not None
        return channel_offsets(channels, *self.shift)


@dataclasses.dataclass(frozen=True, eq=False)
class Depthwise(Layer):
    """A convolution of each channel by itself, padded by zeros.

    Attributes: as of `Conv`; weights int16 `[k, k, 1, channels]`.
    """

    weights: np.ndarray
    levels: tuple[int, ...]
    stride: int
    requantization: Requantization


@dataclasses.dataclass(frozen=True, eq=False)
class Pool(Layer):
    """Sums over windows, channel by channel; a mean's division is in the requantization.

    With a window of one pixel it brings a tensor to other codes, or applies a batch norm.

    Attributes:
      window: height and width.
      stride: in pixels, both ways.
      padding: of zeros on all sides.
      requantization: for each channel.
    """

    window: tuple[int, int]
    stride: int
    padding: int
    requantization: Requantization


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Layer):
    """`clip((a * multipliers[0] + b * multipliers[1] + bias) >> shift, low, high)`.

    `b` can have fewer channels than `a`; the missing ones are 0.
    """

    multipliers: tuple[int, int]
    bias: int
    shift: int


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """An integer network, from uint8 `[height, width, 3]` to one int32 per class.

    Attributes:
      layers: in an order to compute them in; the last gives the logits, `[1, 1, classes]`.
      multiplies: whether multipliers are any integers; otherwise they are sums of few signed powers
        of two, and programs add these.
    """

    layers: tuple[Layer, ...]
    multiplies: bool = False

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.layers[0].output.height, self.layers[0].output.width

    @property
    def classes(self) -> int:
        return self.layers[-1].output.channels

    @property
    def step(self) -> float:
        """What a logit of 1 stands for."""
        return self.layers[-1].output.step

    def inputs(self, layer: Layer) -> list[Codes]:
        """The formats of what a layer reads."""
        return [self[name].output for name in layer.inputs]


def sum_bounds(layer: Layer, inputs: list[Codes]) -> np.ndarray:
    """Returns the largest magnitude that a layer's sums can have, int64 `[channels]`.

    Partial sums are below it too, in any order, and also where each weight is added as the signed
    powers of two of `digits`.
    """
    channels = layer.output.channels
    if isinstance(layer, Conv | Depthwise):
        magnitudes = digits.magnitude(layer.weights).sum((0, 1, 2), dtype=np.int64)
        return magnitudes * inputs[0].largest
    if isinstance(layer, Pool):
        return np.full(channels, layer.window[0] * layer.window[1] * inputs[0].largest)
    return np.zeros(channels, np.int64)


def bounds(layer: Layer, inputs: list[Codes]) -> np.ndarray:
    """Returns the largest magnitude of anything that a layer computes, int64 `[channels]`."""
    sums = sum_bounds(layer, inputs)
    if isinstance(layer, Add):
        multipliers = digits.magnitude(np.array(layer.multipliers))
        largest = [codes.largest for codes in inputs]
        total = int(multipliers @ np.array(largest, np.int64)) + abs(layer.bias)
        return np.full(layer.output.channels, total)
    if isinstance(layer, Conv | Depthwise | Pool):
        after = layer.requantization
        products = sums * digits.magnitude(after.multiplier)
        return np.maximum(sums, products + np.abs(after.bias.astype(np.int64)))
    return sums


def bits(magnitude: int) -> int:
    """Returns the bits of a signed number with this largest magnitude."""
    return int(magnitude).bit_length() + 1


def verify(graph: Graph) -> None:
    """Raises a UserError if any number in a layer could leave 32 bits, for any image."""
    for layer in graph.layers:
        worst = int(bounds(layer, graph.inputs(layer)).max())
        if worst > INT32[1]:
            raise UserError(
                f"{layer.name} needs {bits(worst)} bits for its worst case, there are 32"
            )


def arrays(graph: Graph) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Returns a graph as JSON-ready descriptions of its layers and arrays by name."""
    described: list[dict[str, Any]] = []
    named: dict[str, np.ndarray] = {}
    for layer in graph.layers:
        entry: dict[str, object] = {"kind": type(layer).__name__.lower()}
        for field in dataclasses.fields(layer):
            value = getattr(layer, field.name)
            if isinstance(value, Requantization):
                for part in dataclasses.fields(value):
                    named[f"{layer.name}.{part.name}"] = getattr(value, part.name)
                entry[field.name] = {
                    part.name: f"{layer.name}.{part.name}" for part in dataclasses.fields(value)
                }
            elif isinstance(value, np.ndarray):
                named[f"{layer.name}.{field.name}"] = value
                entry[field.name] = f"{layer.name}.{field.name}"
            else:
                entry[field.name] = dataclasses.asdict(value) if isinstance(value, Codes) else value
        if not isinstance(layer, Table):
            entry["largest_sum"] = int(bounds(layer, graph.inputs(layer)).max())
        described.append(entry)
    return described, named
