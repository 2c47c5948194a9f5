"""Writes an integer network as an ONNX program with QuantizeLinear and DequantizeLinear.

Runtimes replace the pattern DequantizeLinear → Conv → QuantizeLinear by one convolution of 8-bit
integers. Each layer's multiplier and shift are in the scale of its weights, so it computes the same
as in the interpreter, up to how halves are rounded: to even there, up here.

Tensors are `[N, channels, height, width]` and named as their layers. Codes of 8 bits are uint8,
those with negative values with a zero point of 128: runtimes' convolutions read and write one type.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shiftnet.integers.graph import Add, Codes, Conv, Depthwise, Graph, Layer, Pool, Table

OPSET = 21  # the first with 16 bits in QuantizeLinear
IR = 10  # of that time, so that runtimes since then read the file
# Two products of uint8 and weights within these are added in 16 bits by processors with AVX2.
SAFE = 64
# Takes what is halfway between two codes to the upper one, and reaches no other.
UPWARDS = 1 + 2.0**-21
# What the rounding of a bias may change, in codes.
BIAS_ERROR = 1 / 256


def onnx(graph: Graph, class_names: Sequence[str]) -> bytes:
    """Serialises an integer network as an ONNX program, which needs the package onnx.

    Its input is `images`, uint8 `[batch, height, width, 3]`, its output `logits`, float32
    `[batch, classes]`, in the float network's unit. Its metadata hold `class_names`, a JSON list.

    Args:
      graph: the network.
      class_names: by class number.
    """
    return _Writer(graph).model(class_names).SerializeToString()


def zero_point(codes: Codes) -> int:
    """Returns what stands for the code 0 in a tensor of the program."""
    return 128 if codes.dtype == "int8" else 0


class _Writer:
    """The nodes and constants of a program so far."""

    def __init__(self, graph: Graph):
        import onnx

        self.onnx = onnx
        self.graph = graph
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        for layer in graph.layers:
            self.layer(layer)

    def model(self, class_names: Sequence[str]) -> Any:
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        height, width = self.graph.shape
        images = ["batch", height, width, self.graph.layers[0].output.channels]
        program = helper.make_graph(
            self.nodes,
            "shiftnet",
            [helper.make_tensor_value_info("images", kinds.UINT8, images)],
            [helper.make_tensor_value_info("logits", kinds.FLOAT, ["batch", self.graph.classes])],
            [self.onnx.numpy_helper.from_array(*pair[::-1]) for pair in self.constants.items()],
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(program, opset_imports=[opset], producer_name="shiftnet")
        model.ir_version = IR
        entry = model.metadata_props.add()
        entry.key, entry.value = "class_names", json.dumps(list(class_names))
        return model

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        node = self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def layer(self, layer: Layer) -> None:
        inputs = self.graph.inputs(layer)
        if isinstance(layer, Table):
            self.table(layer)
        elif isinstance(layer, Add):
            step = layer.output.step
            scales = [m * 2.0**-layer.shift * step for m in layer.multipliers]
            a, b = (self.real(layer, i, scale) for i, scale in enumerate(scales))
            missing = inputs[0].channels - inputs[1].channels
            if missing:
                by = self.constant(f"{layer.name}.pad", np.array([0] * 5 + [missing, 0, 0]))
                b = self.node("Pad", [b, by], f"{layer.name}.padded")
            total = self.node("Add", [a, b], f"{layer.name}.sum")
            offset = _offset(math.gcd(*layer.multipliers), layer.bias, layer.shift)
            by = self.constant(f"{layer.name}.offset", np.float32(offset * step))
            self.codes(layer, self.node("Add", [total, by], f"{layer.name}.moved"))
        elif isinstance(layer, Pool):
            self.pool(layer, inputs[0])
        elif isinstance(layer, Conv | Depthwise):
            self.convolution(layer, inputs[0])
        else:
            raise TypeError(type(layer).__name__)

    def table(self, layer: Table) -> None:
        channels = layer.table.shape[1]
        stored = (layer.table.T.ravel() + zero_point(layer.output)).astype(np.uint8)
        first = self.constant("pixels.first", np.arange(channels, dtype=np.int32) * 256)
        wide = self.node("Cast", ["images"], "pixels.wide", to=self.onnx.TensorProto.INT32)
        index = self.node("Add", [wide, first], "pixels.index")
        table = self.constant("pixels.table", stored)
        found = self.node("Gather", [table, index], "pixels.found")
        self.node("Transpose", [found], layer.name, perm=[0, 3, 1, 2])

    def pool(self, layer: Pool, inputs: Codes) -> None:
        factor, offset = _factor_and_offset(layer)
        step, count = layer.output.step, layer.window[0] * layer.window[1]
        alike = bool((factor == factor[0]).all())
        x = self.real(layer, 0, float(factor[0]) * step * count if alike else count)
        if count > 1:
            # One window may be all there is to be, in the corner of a larger map.
            sizes = ((inputs.height, layer.output.height), (inputs.width, layer.output.width))
            strides = [layer.stride if out > 1 else size for size, out in sizes]
            x = self.node(
                "AveragePool",
                [x],
                f"{layer.name}.mean",
                kernel_shape=layer.window,
                strides=strides,
                pads=[layer.padding] * 4,
                count_include_pad=1,
            )
        if not alike:
            by = self.constant(f"{layer.name}.factor", _per_channel(factor * step))
            x = self.node("Mul", [x, by], f"{layer.name}.scaled")
        if offset.any():
            by = self.constant(f"{layer.name}.offset", _per_channel(offset * step))
            x = self.node("Add", [x, by], f"{layer.name}.moved")
        self.codes(layer, x)

    def convolution(self, layer: Conv | Depthwise, codes: Codes) -> None:
        weights, bias, unit = _integers(layer)
        stride, size = layer.stride, layer.weights.shape[0]
        x = self.graph[layer.inputs[0]].name
        if isinstance(layer, Conv) and layer.shift is not None:
            x, stride = self.shifted(layer, x, codes), 1
        x = self.dequantized(x, f"{layer.name}.read", codes, codes.step)
        # What sums count: their scale is that of the input times that of the weights.
        scale = unit * layer.output.step / codes.step
        if layer.output.low >= 0:
            scale *= UPWARDS
        by = self.constant(f"{layer.name}.weights.scale", scale.astype(np.float32))
        stored, zero = _narrowest(weights)
        axes = [3, 2, 0, 1]  # [out, in, k, k]
        w = self.node(
            "DequantizeLinear",
            [
                self.constant(f"{layer.name}.weights", stored.transpose(axes)),
                by,
                self.constant(f"{layer.name}.weights.zero", np.full(len(unit), zero, stored.dtype)),
            ],
            f"{layer.name}.weights.real",
            axis=0,
        )
        eight = {_stored(codes), _stored(layer.output)} == {np.dtype("uint8")}
        name = f"{layer.name}.bias"
        terms = [x, w]
        if eight and stored.itemsize == 1:
            by = self.constant(f"{name}.scale", (scale * codes.step).astype(np.float32))
            whole = self.constant(f"{name}.whole", bias.astype(np.int32))
            terms.append(self.node("DequantizeLinear", [whole, by], name, axis=0))
        y = self.node(
            "Conv",
            terms,
            f"{layer.name}.sum",
            kernel_shape=[size] * 2,
            strides=[stride] * 2,
            pads=[size // 2] * 4,
            group=len(unit) if isinstance(layer, Depthwise) else 1,
        )
        if terms == [x, w]:
            # Runtimes compute it in float32. As the convolution's own, onnxruntime would round the
            # bias to a whole number of the sums' unit, which is more than a code of 16 bits.
            offset = _factor_and_offset(layer)[1] * layer.output.step
            y = self.node("Add", [y, self.constant(name, _per_channel(offset))], f"{name}.added")
        if layer is self.graph.layers[-1]:
            self.node("Flatten", [y], "logits")
        else:
            self.codes(layer, y)

    def shifted(self, layer: Conv, x: str, codes: Codes) -> str:
        """Appends a shift: a depthwise convolution with one 1 per channel."""
        assert layer.shift is not None
        kernel_size, dilation = layer.shift
        dh, dw = layer.moves(codes.channels)
        reach = kernel_size // 2
        one = np.zeros((codes.channels, 1, kernel_size, kernel_size), np.int8)
        one[np.arange(codes.channels), 0, dh // dilation + reach, dw // dilation + reach] = 1
        name = f"{layer.name}.shift"
        moved = self.node(
            "Conv",
            [
                self.dequantized(x, f"{name}.input", codes, codes.step),
                self.node(
                    "DequantizeLinear",
                    [
                        self.constant(f"{name}.weights", one),
                        self.constant("one", np.float32(1)),
                        self.constant("zero.weights", np.int8(0)),
                    ],
                    f"{name}.weights.real",
                ),
            ],
            f"{name}.real",
            kernel_shape=[kernel_size] * 2,
            strides=[layer.stride] * 2,
            dilations=[dilation] * 2,
            pads=[reach * dilation] * 4,
            group=codes.channels,
        )
        return self.quantized(moved, name, codes)

    def real(self, layer: Layer, i: int, scale: float) -> str:
        """Appends the numbers that an input stands for, if its codes are multiples of `scale`."""
        source = self.graph[layer.inputs[i]]
        return self.dequantized(source.name, f"{layer.name}.input{i}", source.output, scale)

    def dequantized(self, x: str, output: str, codes: Codes, scale: float) -> str:
        by = self.constant(f"{output}.scale", np.float32(scale))
        return self.node("DequantizeLinear", [x, by, self.zero(codes)], output)

    def codes(self, layer: Layer, x: str) -> None:
        """Appends a layer's codes for real numbers."""
        codes = layer.output
        stored = _stored(codes)
        zero, limits = zero_point(codes), np.iinfo(stored)
        low, high = codes.low + zero, codes.high + zero
        if (low, high) == (limits.min, limits.max):
            self.quantized(x, layer.name, codes)
        elif stored == np.uint8:  # behind the rounding, which runtimes join with what is before it
            x = self.quantized(x, f"{layer.name}.wide", codes)
            ends = [
                self.constant(f"{layer.name}.{end}", np.array(value, stored))
                for end, value in (("low", low), ("high", high))
            ]
            self.node("Clip", [x, *ends], layer.name)
        else:
            ends = [
                self.constant(f"{layer.name}.{end}", np.float32(value * codes.step))
                for end, value in (("low", codes.low), ("high", codes.high))
            ]
            self.quantized(
                self.node("Clip", [x, *ends], f"{layer.name}.clipped"), layer.name, codes
            )

    def quantized(self, x: str, output: str, codes: Codes) -> str:
        by = self.constant(f"{output}.scale", np.float32(codes.step))
        return self.node("QuantizeLinear", [x, by, self.zero(codes)], output)

    def zero(self, codes: Codes) -> str:
        zero = np.array(zero_point(codes), _stored(codes))
        return self.constant(f"zero.{codes.dtype}", zero)


def _stored(codes: Codes) -> np.dtype[Any]:
    return np.dtype("uint8" if codes.dtype == "int8" else codes.dtype)


def _per_channel(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).reshape(-1, 1, 1)


def _factor_and_offset(layer: Conv | Depthwise | Pool) -> tuple[np.ndarray, np.ndarray]:
    """Returns what sums are multiplied by, and what is added then, in codes; float64."""
    after = layer.requantization
    multiplier = after.multiplier.astype(np.int64)
    factor = multiplier * 2.0 ** -after.shift.astype(np.float64)
    return factor, _offset(multiplier, after.bias.astype(np.int64), after.shift.astype(np.int64))


def _offset(multiplier: Any, bias: Any, shift: Any) -> Any:
    """Returns what must be added before rounding to the nearest gives what a shift gives.

    A shift rounds down, so that is less by a half; and by half the distance to the next product it
    is more, so that nothing is halfway between two codes, where runtimes round to even.
    """
    power = np.int64(1) << shift
    apart = np.where(multiplier == 0, power, np.minimum(multiplier & -multiplier, power))
    return (bias + (apart - bias % apart) / 2) / power - 0.5


def _integers(layer: Conv | Depthwise) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns weights `[k, k, in, out]` and biases, int64, and their unit in codes, float64.

    Units are positive. Where biases would be too coarse they are finer, and weights larger.
    """
    factor, offset = _factor_and_offset(layer)
    weights = layer.dense() if isinstance(layer, Conv) else layer.weights
    weights = weights.astype(np.int64) * np.sign(factor).astype(np.int64)
    unit = np.where(factor == 0, 1.0, np.abs(factor))
    room = SAFE // np.abs(weights).max((0, 1, 2)).clip(1)
    finer = 2.0 ** np.ceil(np.log2(unit / 2 / BIAS_ERROR)).clip(0)
    finer = np.minimum(finer, 2.0 ** np.floor(np.log2(room.clip(1))))
    unit = unit / finer
    return weights * finer.astype(np.int64), np.round(offset / unit), unit


def _narrowest(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns weights in the narrowest dtype that computes exactly, and its zero point."""
    largest = np.abs(weights).max()
    if largest <= SAFE:
        return weights.astype(np.int8), 0
    if largest <= 127:
        return (weights + 128).astype(np.uint8), 128
    return weights.astype(np.int16), 0
