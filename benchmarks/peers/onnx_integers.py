"""The peer of `benchmarks.integers`: a network in onnxruntime, as float32 and as int8.

The float network is built from the integer network that our C program computes, in ONNX's own
operators and channels first, with batch norms folded in; its input is a normalised float32 image.
int8 is what `onnxruntime.quantization.quantize_static` makes of it. A shift can be written as
several operators, and the fastest for a network is not known beforehand: each form is a choice of

    dense       one 3x3 convolution with the shift's weights where the shift reads, others 0
    depthwise   a 3x3 convolution of each channel by itself, with a single 1, and a 1x1 convolution
    slices      the channels of one direction side by side, each group sliced out of a padded tensor

and of how the quantised operators are written, `QDQ` or `QOperator`. Needs onnx and onnxruntime.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.protocol import ProcessorTime, serve

SHIFTS = ("dense", "depthwise", "slices")
FORMATS = ("QDQ", "QOperator")
OPSET, IR = 17, 9


def forms(has_shifts: bool) -> dict[str, list[str]]:
    """The forms to try, by precision."""
    shifts = SHIFTS if has_shifts else SHIFTS[:1]
    return {
        "float32": list(shifts),
        "int8": [f"{shift}/{form}" for shift in shifts for form in FORMATS],
    }


def describe() -> dict[str, Any]:
    """Versions."""
    return {"versions": {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}}


def is_shifted(layer: dict[str, Any]) -> bool:
    """Whether a layer of the JSON is a convolution behind a shift."""
    return layer["kind"] == "conv" and layer["shift"] is not None


class _Network:
    """An ONNX graph of an integer network in floats.

    Args:
      path: of the JSON that `shiftnet export` writes, beside its .npz.
      shift: one of `SHIFTS`.
    """

    def __init__(self, path: Path, shift: str):
        document = json.loads(path.read_text())
        self.arrays = np.load(path.with_suffix(".npz"))
        self.layers = {layer["name"]: layer for layer in document["layers"]}
        self.shift = shift
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.order: dict[str, np.ndarray] = {}  # of channels, where it is not the usual one
        if shift == "slices":
            for layer in self.layers.values():
                if is_shifted(layer):
                    (source,) = layer["inputs"]
                    directions = self.directions(layer)
                    self.order[source] = np.argsort(directions, kind="stable")
        for layer in self.layers.values():
            getattr(self, layer["kind"])(layer)

    def model(self) -> onnx.ModelProto:
        first, last = next(iter(self.layers.values())), list(self.layers.values())[-1]
        codes = first["output"]
        shape = ["batch", codes["channels"], codes["height"], codes["width"]]
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info(first["name"], TensorProto.FLOAT, shape)],
            [
                helper.make_tensor_value_info(
                    last["name"], TensorProto.FLOAT, ["batch", last["output"]["channels"]]
                )
            ],
            self.constants,
        )
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def step(self, name: str) -> float:
        return self.layers[name]["output"]["step"]

    def directions(self, layer: dict[str, Any]) -> np.ndarray:
        """The tap that each channel of a shift's input is read by."""
        (source,) = layer["inputs"]
        channels, size = self.layers[source]["output"]["channels"], layer["shift"][0]
        number = np.arange(channels)
        moved = channels // size**2 * size**2
        return np.where(number < moved, number % size**2, size // 2 * (size + 1))

    def affine(self, layer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """What a layer's sums are multiplied by, in floats, and what is added."""
        parts = layer["requantization"]
        multiplier, bias, shift = (
            self.arrays[parts[part]].astype(np.float64) for part in ("multiplier", "bias", "shift")
        )
        half = np.floor(2.0 ** (shift - 1))
        out = layer["output"]["step"]
        return multiplier / 2**shift * out / self.step(layer["inputs"][0]), (
            (bias - half) / 2**shift * out
        )

    def relu(self, layer: dict[str, Any], inputs_are_rectified: bool, before: str) -> None:
        rectified = layer["output"]["low"] == 0 and not inputs_are_rectified
        self.node("Relu" if rectified else "Identity", [before], layer["name"])

    def table(self, layer: dict[str, Any]) -> None:
        """The input, which is normalised already."""

    def conv(self, layer: dict[str, Any]) -> None:
        name, (source,) = layer["name"], layer["inputs"]
        scale, bias = self.affine(layer)
        weights = self.arrays[layer["weights"]].astype(np.float64) * scale
        size = weights.shape[0]
        groups = 1
        if layer["kind"] == "depthwise":
            groups = weights.shape[-1]
        if is_shifted(layer):
            source, weights, size = self.shifted(layer, source, weights)
        if name in self.order:
            weights, bias = weights[..., self.order[name]], bias[self.order[name]]
        kernel = np.ascontiguousarray(weights.transpose(3, 2, 0, 1), np.float32)
        inputs = [
            source,
            self.constant(f"{name}.weight", kernel),
            self.constant(f"{name}.bias", bias.astype(np.float32)),
        ]
        if name == list(self.layers)[-1]:
            inputs[0] = self.node("Flatten", [source], f"{name}.flat")
            self.constants[-2].CopyFrom(
                numpy_helper.from_array(kernel[:, :, 0, 0], f"{name}.weight")
            )
            self.node("Gemm", inputs, name, transB=1)
            return
        before = self.node(
            "Conv",
            inputs,
            f"{name}.sums",
            kernel_shape=[size, size],
            strides=[layer["stride"]] * 2,
            pads=[size // 2] * 4,
            group=groups,
        )
        self.relu(layer, False, before)

    depthwise = conv

    def shifted(
        self, layer: dict[str, Any], source: str, weights: np.ndarray
    ) -> tuple[str, np.ndarray, int]:
        """Appends a shift; returns what the convolution after it reads, its weights and size."""
        name, (size, dilation) = layer["name"], layer["shift"]
        directions = self.directions(layer)
        channels = len(directions)
        if dilation != 1:
            raise ValueError("a dilated shift is not written here")
        if self.shift == "dense":
            full = np.zeros((size**2, channels, weights.shape[-1]))
            full[directions, np.arange(channels)] = weights[0, 0]
            return source, full.reshape(size, size, channels, -1), size
        if self.shift == "depthwise":
            one = np.zeros((channels, 1, size**2), np.float32)
            one[np.arange(channels), 0, directions] = 1
            kernel = self.constant(f"{name}.moves", one.reshape(channels, 1, size, size))
            moved = self.node(
                "Conv",
                [source, kernel],
                f"{name}.moved",
                kernel_shape=[size, size],
                pads=[size // 2] * 4,
                group=channels,
            )
            return moved, weights, 1
        reach = size // 2
        pads = self.constant(
            f"{name}.pads", np.array([0, 0, reach, reach, 0, 0, reach, reach], np.int64)
        )
        padded = self.node("Pad", [source, pads], f"{name}.padded")
        codes = self.layers[source]["output"]
        sorted_directions = np.sort(directions, kind="stable")
        parts = []
        axes = self.constant(f"{name}.axes", np.array([1, 2, 3], np.int64))
        for tap in range(size**2):
            (found,) = np.nonzero(sorted_directions == tap)
            if not len(found):
                continue
            row, column = divmod(tap, size)
            start = [found[0], row, column]
            end = [found[-1] + 1, row + codes["height"], column + codes["width"]]
            limits = [
                self.constant(f"{name}.{kind}{tap}", np.array(values, np.int64))
                for kind, values in (("from", start), ("to", end))
            ]
            parts.append(self.node("Slice", [padded, *limits, axes], f"{name}.part{tap}"))
        moved = self.node("Concat", parts, f"{name}.moved", axis=1)
        return moved, weights[:, :, self.order[source]], 1

    def pool(self, layer: dict[str, Any]) -> None:
        (source,) = layer["inputs"]
        codes = self.layers[source]["output"]
        scale, bias = self.affine(layer)
        count = layer["window"][0] * layer["window"][1]
        if (
            layer["window"] != [codes["height"], codes["width"]]
            or np.abs(scale * count - 1).max() > 1e-2
            or np.abs(bias).max() > self.step(source)
        ):
            raise ValueError("only a mean over the whole image is written here")
        self.node("GlobalAveragePool", [source], layer["name"])

    def add(self, layer: dict[str, Any]) -> None:
        name, (a, b) = layer["name"], layer["inputs"]
        missing = layer["output"]["channels"] - self.layers[b]["output"]["channels"]
        if missing:
            pads = self.constant(f"{name}.pads", np.array([0] * 5 + [missing, 0, 0], np.int64))
            b = self.node("Pad", [b, pads], f"{name}.padded")
        before = self.node("Add", [a, b], f"{name}.sums")
        lows = [self.layers[each]["output"]["low"] for each in layer["inputs"]]
        self.relu(layer, min(lows) >= 0, before)


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, images: np.ndarray):
        self.batches = iter([{name: images[i : i + 16]} for i in range(0, len(images), 16)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


class Measurement(ProcessorTime):
    """One form of a network, on one image at a time.

    Args:
      graph: path of the integer network's JSON.
      data: path of an .npz with uint8 `calibration` and `test` images, `labels`, and `mean` and
        `std` of the pixels.
      precision: "float32" or "int8".
      form: one of `forms`.
      threads: of onnxruntime.
    """

    def __init__(self, graph: str, data: str, precision: str, form: str, threads: int):
        super().__init__()
        self.data = np.load(data)
        shift, _, quantised = form.partition("/")
        network = _Network(Path(graph), shift)
        self.input = next(iter(network.layers))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "network.onnx")
            onnx.save(network.model(), path)
            if precision == "int8":
                path = self.quantised(path, quantised)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            # Its threads must not take the processor from the next worker.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            self.bytes = os.path.getsize(path)
        self.binding = self.session.io_binding()
        self.binding.bind_cpu_input(self.input, self.normalised(self.data["test"][:1]))
        self.binding.bind_output(self.session.get_outputs()[0].name)

    def normalised(self, images: np.ndarray) -> np.ndarray:
        x = (images / np.float32(255) - self.data["mean"]) / self.data["std"]
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)

    def quantised(self, path: str, form: str) -> str:
        prepared, out = path + ".prepared", path + ".int8"
        quant_pre_process(path, prepared)
        quantize_static(
            prepared,
            out,
            _Reader(self.input, self.normalised(self.data["calibration"])),
            quant_format=QuantFormat[form],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return out

    def check(self, steps: int) -> list:
        """The classes of the first `steps` test images."""
        return [int(n) for n in self.predicted(self.data["test"][:steps])]

    def predicted(self, images: np.ndarray) -> np.ndarray:
        found = [
            self.session.run(None, {self.input: self.normalised(images[i : i + 100])})[0].argmax(-1)
            for i in range(0, len(images), 100)
        ]
        return np.concatenate(found)

    def facts(self) -> dict[str, float]:
        """The file's bytes, and top-1 accuracy on the test images."""
        right = self.predicted(self.data["test"]) == self.data["labels"]
        return {"bytes": self.bytes, "accuracy": float(right.mean())}

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.session.run_with_iobinding(self.binding)


if __name__ == "__main__":
    serve(Measurement, describe=describe, forms=forms)
