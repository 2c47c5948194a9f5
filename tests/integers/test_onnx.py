"""An integer network as ONNX computes in 8 bits, each layer the interpreter's up to a step."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiftnet import integers
from shiftnet.cli import export
from shiftnet.integers import interpreter, onnx
from tests.integers import programs
from tests.integers.test_integers import saved

FEW = [
    ("shiftresnet8", "s3", 3, "shift", "float"),
    ("resnet8", "sign", 0, "shift", "int8"),
    ("depthwiseresnet8", "denseshift", 3, "multiplier", "float"),
    ("wrn8", "sign", 0, "shift", "float"),
    ("mobileresnet8", "float", 0, "shift", "float"),
    ("shuffleresnet8", "ternary", 0, "shift", "float"),
    ("shiftresnet8+sparse", "s3", 3, "shift", "float"),
]
ALL = [
    pytest.param(arch, form, bits, requantize, activations, marks=pytest.mark.slow)
    for arch, *_ in FEW
    for form, bits in (("sign", 0), ("s3", 3), ("denseshift", 4), ("pot", 5), ("float", 0))
    for requantize in ("shift", "multiplier")
    for activations in ("float", "int4")
]
NETWORKS = pytest.mark.parametrize(("arch", "form", "bits", "requantize", "activations"), FEW + ALL)


@given(
    st.integers(-(2**20), 2**20),
    st.integers(-(2**10), 2**10),
    st.integers(-(2**30), 2**30),
    st.integers(0, 24),
)
def test_rounding_to_the_nearest_gives_what_a_shift_gives(total, multiplier, bias, shift):
    offset = onnx._offset(np.int64(multiplier), np.int64(bias), np.int64(shift))
    expected = (total * multiplier + bias) >> shift
    assert int(np.rint(total * multiplier / 2**shift + offset)) == expected


@pytest.mark.parametrize(("arch", "form"), [("shiftresnet8", "s3"), ("resnet8", "sign")])
def test_weights_biases_and_their_unit_give_the_interpreters_codes(arch, form):
    graph = programs.converted(arch, form, 3 if form == "s3" else 0).graph
    draw = np.random.default_rng(0)
    for layer in graph.layers[2:-1]:
        if not isinstance(layer, integers.Conv):
            continue
        weights, bias, unit = onnx._integers(layer)
        codes = graph.inputs(layer)[0]
        window = draw.integers(codes.low, codes.high + 1, (20, *weights.shape[:3]))
        taps = list(range(1, window.ndim))
        sums = np.tensordot(window, weights, (taps, [0, 1, 2])) + bias
        found = np.rint(sums * unit).clip(layer.output.low, layer.output.high)
        by = layer.requantization
        expected = np.tensordot(window, layer.weights.astype(int), (taps, [0, 1, 2]))
        expected = (expected * by.multiplier.astype(int) + by.bias) >> by.shift
        expected = expected.clip(layer.output.low, layer.output.high)
        assert np.abs(found - expected).max() <= 1, layer.name
        assert (found != expected).mean() < 0.02, layer.name


@functools.cache
def required():
    package = pytest.importorskip("onnx", reason="needs onnx")
    return package, pytest.importorskip("onnxruntime", reason="needs onnxruntime")


def run(graph, images):
    """The logits, and the codes of all layers but the last as the interpreter's tensors."""
    package, runtime = required()
    model = package.load_from_string(onnx.onnx(graph, ["a"] * graph.classes))
    package.checker.check_model(model, full_check=True)
    for layer in graph.layers[:-1]:
        model.graph.output.append(package.helper.make_empty_tensor_value_info(layer.name))
    session = runtime.InferenceSession(model.SerializeToString())
    logits, *tensors = session.run(None, {"images": images})
    return logits, {
        layer.name: tensor.astype(np.int32).transpose(0, 2, 3, 1) - onnx.zero_point(layer.output)
        for layer, tensor in zip(graph.layers[:-1], tensors, strict=True)
    }


@NETWORKS
def test_each_layer_is_within_a_step_of_the_interpreter(arch, form, bits, requantize, activations):
    required()
    graph = programs.converted(arch, form, bits, requantize, False, activations).graph
    images = programs.images(6, seed=1)
    logits, tensors = run(graph, images)
    last = graph.layers[-1]
    for layer in graph.layers:
        inputs = [jnp.asarray(tensors[name]) for name in layer.inputs]
        expected = np.asarray(interpreter._layer(layer, inputs, jnp.asarray(images)))
        if layer is last:
            expected = expected[:, 0, 0] * graph.step
            room = max(graph.step, 1e-5 * np.abs(expected).max())
            np.testing.assert_allclose(logits, expected, atol=room, rtol=0)
        else:
            assert np.abs(tensors[layer.name] - expected).max() <= 1, layer.name


def test_a_window_smaller_than_its_map_is_pooled_once():
    required()
    graph = programs.converted("shiftresnet8", "float", size=48).graph
    images = programs.images(4, 48, seed=1)
    logits, _ = run(graph, images)
    expected = np.asarray(interpreter.logits(graph, images)) * graph.step
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())


def test_onnxruntime_computes_the_convolutions_of_a_shift_network_in_8_bits(tmp_path):
    package, runtime = required()
    graph = programs.converted("shiftresnet8", "s3", 3).graph
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    runtime.InferenceSession(onnx.onnx(graph, ["a"] * graph.classes), options)
    kinds = [node.op_type for node in package.load(tmp_path / "optimized.onnx").graph.node]
    convolutions = [layer for layer in graph.layers if isinstance(layer, integers.Conv)]
    shifts = [layer for layer in convolutions if layer.shift]
    assert kinds.count("QLinearConv") == len(convolutions) - 1 + len(shifts)
    assert kinds.count("Conv") == 1  # the classifier, whose input has 16 bits


def test_export_writes_the_integer_network_that_it_reports(tmp_path, capsys):
    _, runtime = required()
    out = tmp_path / "net.onnx"
    argv = [str(saved(tmp_path)), str(out), "--integers", "--calibration-images", "4", "--report"]
    assert export.main(argv) == 0
    printed = capsys.readouterr().out
    assert "in integers of 8 bits" in printed
    assert "shift, 1x1" in printed
    session = runtime.InferenceSession(out)
    assert len(json.loads(session.get_modelmeta().custom_metadata_map["class_names"])) == 10
