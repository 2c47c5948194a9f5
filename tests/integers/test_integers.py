"""Integer networks are near the float ones, cannot overflow, and say what they cannot do."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from shiftnet import checkpoint, integers
from shiftnet import config as config_lib
from shiftnet.cli import export
from shiftnet.errors import UserError
from shiftnet.integers import c, digits, graph, interpreter, report, requantize, schedule
from shiftnet.integers.convert import _moves
from shiftnet.layers import LearnedShift
from tests import networks
from tests.integers import programs
from tests.test_packing import note

FEW = [
    ("shiftresnet8", "s3", 3),
    ("resnet8", "sign", 0),
    ("depthwiseresnet8", "denseshift", 3),
    ("wrn8", "sign", 0),
    ("mobileresnet8", "s3", 3),
    ("shuffleresnet8", "ternary", 0),
    ("shiftresnet8+sparse", "s3", 3),
]
NETWORKS = pytest.mark.parametrize(("arch", "form", "bits"), FEW)


def one(layer, inputs, image, y, x, o):
    """One output of a layer, in Python's unbounded integers."""
    if isinstance(layer, integers.Table):
        return layer.table[image[y, x, o], o]
    if isinstance(layer, integers.Add):
        a, b = inputs
        total = int(a[y, x, o]) * layer.multipliers[0] + layer.bias
        if o < b.shape[-1]:
            total += int(b[y, x, o]) * layer.multipliers[1]
        shift = layer.shift
    else:
        total = sum(int(value) * int(weight) for value, weight in reads(layer, inputs[0], y, x, o))
        by = layer.requantization
        total = total * int(by.multiplier[o]) + int(by.bias[o])
        shift = int(by.shift[o])
    return min(max(total // 2**shift, layer.output.low), layer.output.high)


def reads(layer, x, row, column, channel):
    """The values that an output reads, and their weights."""

    def at(r, c, k):
        return x[r, c, k] if 0 <= r < x.shape[0] and 0 <= c < x.shape[1] else 0

    row, column = row * layer.stride, column * layer.stride
    if isinstance(layer, integers.Pool):
        for i, j in np.ndindex(layer.window):
            yield at(row + i - layer.padding, column + j - layer.padding, channel), 1
        return
    size = layer.weights.shape[0]
    for i, j in np.ndindex(size, size):
        r, c = row + i - size // 2, column + j - size // 2
        if isinstance(layer, integers.Depthwise):
            yield at(r, c, channel), layer.weights[i, j, 0, channel]
            continue
        count = layer.weights.shape[2]
        first = channel // layer.run % layer.groups * count
        for k in range(count):
            moves = layer.shift is not None and k < x.shape[2] // 9 * 9
            dh, dw = (k // 3 % 3 - 1, k % 3 - 1) if moves else (0, 0)
            if layer.offsets is not None:
                dh, dw = layer.offsets[k]
            yield at(r + dh, c + dw, first + k), layer.weights[i, j, k, channel]


@NETWORKS
def test_every_layer_computes_what_its_integers_say(arch, form, bits):
    network = programs.converted(arch, form, bits).graph
    image = programs.images(3, seed=3)[2]
    tensors = integers.compile_graph(network)(image[None])
    draw = np.random.default_rng(0)
    for layer in network.layers:
        inputs = [np.asarray(tensors[name])[0] for name in layer.inputs]
        found = np.asarray(tensors[layer.name])[0]
        corners = [(0, 0, 0), tuple(n - 1 for n in found.shape)]
        for y, x, o in corners + [tuple(draw.integers(found.shape)) for _ in range(10)]:
            assert found[y, x, o] == one(layer, inputs, image, y, x, o), (layer.name, y, x, o)


@pytest.mark.parametrize(
    ("arch", "form", "bits"),
    FEW[:4] + [pytest.param(*few, marks=pytest.mark.slow) for few in FEW[4:]],
)
def test_an_integer_network_is_near_the_float_network(arch, form, bits):
    conversion = programs.converted(arch, form, bits)
    model = config_lib.default_config().model
    model.arch, _, shift = arch.partition("+")
    model.shift = shift or "fixed"
    model.weights, model.weight_bits = form, bits
    images = conversion.images
    mean, std = (np.array(values, np.float32) for values in (programs.MEAN, programs.STD))
    x = np.moveaxis((images.astype(np.float32) / 255 - mean) / std, -1, 1)
    expected = networks.evaluate(networks.random(model, programs.CLASSES), x)
    found = interpreter.logits(conversion.graph, images) * conversion.graph.step
    error = np.sqrt(np.square(found - expected).mean())
    assert error < 0.15 * expected.std()


@pytest.mark.slow
def test_more_powers_of_two_and_multipliers_bring_it_nearer():
    model = config_lib.default_config().model
    model.arch, model.weights = "shiftresnet8", "s3"

    def error(**options):
        network = networks.random(model, programs.CLASSES)
        conversion = integers.convert(
            network, programs.images(6), programs.MEAN, programs.STD, **options
        )
        last = conversion.graph.layers[-1].name
        codes = np.asarray(integers.compile_graph(conversion.graph)(conversion.images)[last])
        floats = conversion.floats[last]
        return np.abs(codes * conversion.graph.step - floats).mean() / floats.std()

    errors = [error(terms=1), error(terms=3), error(requantize="multiplier")]
    assert errors == sorted(errors, reverse=True)


def test_a_network_without_multiplications_has_multipliers_of_three_powers_at_most():
    network = programs.converted("shiftresnet8", "s3", 3).graph
    for layer in network.layers:
        if isinstance(layer, integers.Add):
            assert digits.count(np.array(layer.multipliers)).max() <= 3
        elif not isinstance(layer, integers.Table):
            assert digits.count(layer.requantization.multiplier).max() <= 3


def test_the_worst_case_of_a_layer_is_within_its_bound_and_reached():
    network = programs.converted("resnet8", "sign").graph
    layer = network["layer1.0.conv2"]
    (codes,) = network.inputs(layer)
    bound = graph.sum_bounds(layer, [codes])
    for channel in range(3):
        worst = np.where(layer.weights[..., channel] > 0, codes.high, codes.low).sum()
        signs = np.abs(layer.weights[..., channel]).sum() * codes.high
        assert worst <= bound[channel] == signs


def test_a_network_that_could_overflow_is_refused():
    network = programs.converted("resnet8", "sign").graph
    layer = network["layer1.0.conv2"]
    wide = dataclasses.replace(layer, weights=layer.weights * 4000)
    layers = tuple(wide if each is layer else each for each in network.layers)
    with pytest.raises(UserError, match=r"layer1.0.conv2 needs \d\d bits .* there are 32"):
        graph.verify(dataclasses.replace(network, layers=layers))


def test_sums_too_large_for_any_requantization_are_refused():
    with pytest.raises(UserError, match="conv1 cannot be brought to its output's codes"):
        requantize.requantization("conv1", np.ones(1), np.zeros(1), np.array([2**32]), 3)


@given(st.integers(-(2**15), 2**15))
def test_digits_are_signed_powers_of_two_that_make_up_the_number(value):
    plus, minus = (int(part) for part in digits.split(np.array(value)))
    assert plus - minus == value
    assert plus & minus == 0
    both = plus | minus
    assert both & (both >> 1) == 0  # never two neighbours: the fewest that there can be
    assert int(digits.count(np.array(value))) == bin(both).count("1")


@given(st.floats(-30000, 30000), st.integers(1, 4))
def test_few_powers_of_two_come_near_any_number(value, terms):
    found = digits.nearest(value, terms)
    assert int(digits.count(np.array(found))) <= terms
    # Each power leaves a third at most.
    assert abs(found - value) <= max(abs(value) / 3**terms, 0.5) + 1e-6


def test_a_block_is_computed_in_the_memory_of_a_few_rows():
    network = programs.converted("shiftresnet8", "s3", 3).graph
    plan = schedule.plan(network)
    whole = 12 * 12 * 16
    row = 12 * 16
    # The input of the second block, which its result replaces; three rows of twice as many channels
    # between its convolutions, and one of each summand, at half the width.
    assert plan.memory == whole + 3 * 2 * row + 2 * row
    for first, layer in enumerate(network.layers):
        for second, other in enumerate(network.layers[:first]):
            if layer.inputs == (other.name,) and layer.name.endswith("conv2"):
                assert plan.buffers[second].rows == 3


def test_weights_are_packed_at_their_true_width():
    network = programs.converted("shiftresnet8", "s3", 3).graph
    sizes = c.program(network, ["a"] * programs.CLASSES).sizes
    expected = 0
    for layer in network.layers:
        if isinstance(layer, integers.Conv):
            expected += -(-layer.weights.size * (3 if layer.levels else 8) // 8)
    assert sizes.weights == expected


def test_a_report_has_every_layer():
    conversion = programs.converted("shiftresnet8", "s3", 3)
    lines = report.layers(conversion).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        layer.name for layer in conversion.graph.layers
    ]


def test_a_network_of_another_family_is_refused():
    model = config_lib.default_config().model
    model.arch = "shiftnet_b"
    with pytest.raises(UserError, match="cannot be converted to integers yet"):
        integers.convert(
            networks.abstract(model, 4), programs.images(1), programs.MEAN, programs.STD
        )


@pytest.mark.parametrize("kind", ["active", "sparse"])
def test_learned_shifts_are_converted_where_their_offsets_are_whole(kind):
    shift = LearnedShift(4, kind, rngs=nnx.Rngs(0))
    shift.rows.set_value(jnp.array([2.0, -1, 0, 9]))
    shift.columns.set_value(jnp.array([0.0, 1, 0, 0]))
    fields = _moves("conv", shift)
    assert fields["shift"] == (7, 1)
    assert fields["offsets"].tolist() == [[2, 0], [-1, 1], [0, 0], [3, 0]]
    shift.rows.set_value(jnp.array([0.5, 0, 0, 0]))
    with pytest.raises(UserError, match="conv reads a bilinear shift, whose offsets are not whole"):
        _moves("conv", shift)


def saved(tmp_path, **model):
    recipe = config_lib.default_config()
    recipe.data.name = "digits"
    recipe.model.update({"arch": "shiftresnet8", "weights": "s3", **model})
    states = nnx.split(networks.random(recipe.model, 10), nnx.Param, nnx.BatchStat)[1:]
    return checkpoint.write(tmp_path / "ckpt", checkpoint.to_arrays(*states), note(recipe))


def test_export_writes_a_program_and_the_same_network_as_data(tmp_path, capsys):
    ckpt = str(saved(tmp_path))
    options = ["--calibration-images", "4"]
    assert export.main([ckpt, str(tmp_path / "new" / "cnn.c"), *options]) == 0
    printed = capsys.readouterr().out
    assert "no layer multiplies" in printed
    assert "bytes of activations" in printed
    assert "void cnn_run(" in (tmp_path / "new" / "cnn.h").read_text()
    assert export.main([ckpt, str(tmp_path / "net.json"), *options]) == 0
    document = json.loads((tmp_path / "net.json").read_text())
    with np.load(tmp_path / document["arrays"]) as arrays:
        for layer in document["layers"]:
            if layer["kind"] == "conv":
                assert set(np.unique(arrays[layer["weights"]])) <= set(
                    layer["levels"] or range(-127, 128)
                )


def test_export_overwrites_no_file_of_another_origin(tmp_path, capsys):
    (tmp_path / "Makefile").write_text("all:\n")
    argv = [str(saved(tmp_path)), str(tmp_path / "net.c"), "--calibration-images", "4"]
    assert export.main(argv) == 2
    assert "Makefile exists and is not from shiftnet" in capsys.readouterr().err
    assert not (tmp_path / "net.c").exists()
    assert (tmp_path / "Makefile").read_text() == "all:\n"
    (tmp_path / "net.npz").write_bytes(b"arrays")
    assert export.main([argv[0], str(tmp_path / "net.json"), *argv[2:]]) == 2
    assert "net.npz, where the integers of net.json would go, is another" in capsys.readouterr().err
    assert (tmp_path / "net.npz").read_bytes() == b"arrays"


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("net.onnx", ["--report"], "--report is for .c, .json and .onnx with --integers"),
        ("net.c", ["--packed"], "--packed is for arrays"),
        ("net.c", ["--calibration-images", "0"], "must be at least 1"),
        ("net.c", ["--image-size", "64"], "--image-size is 64, but the images that steps are"),
        ("net.c", ["--calibrate-on", "typo"], "--calibrate-on must be a directory of images or of"),
        ("a-b.c", [], "must have the name of a function"),
        ("main.c", [], "must have the name of a function"),
    ],
)
def test_a_command_that_cannot_work_is_refused(out, options, message, tmp_path, capsys):
    argv = [str(saved(tmp_path)), str(tmp_path / out), "--calibration-images", "2", *options]
    options_given = argv if "--calibration-images" not in options else [*argv[:2], *options]
    assert export.main(options_given) == 2
    assert message in capsys.readouterr().err
