"""The counts: the page's lines to the character, and the true numbers against XLA and by hand."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from shiftnet import models, quantizers
from shiftnet.cli.count import main, page_flops
from shiftnet.errors import UserError
from shiftnet.kernels.implementations import only_xla
from shiftnet.kernels.shift_pointwise import shift_pointwise
from shiftnet.layers import Conv, Linear, Shift
from shiftnet.models.arithmetic import arithmetic
from shiftnet.models.counting import Counts, count
from tests import networks, oracle
from tests.networks import model_config

ROOT = Path(__file__).resolve().parents[2]

# From the original count tool and its network classes: arguments, parameters, FLOPs as it printed
# them when the page was written, and as it printed them after its commit 255228f, which multiplies
# the stem by the 3 input channels.
ROWS = [
    ({"arch": "resnet20"}, 272474, 40960640, 42140288),
    ({"arch": "resnet20", "reduction": 2.8, "reduction_mode": "net"}, 96086, 14046844, 14747260),
    ({"arch": "resnet56", "reduction": 7.6, "reduction_mode": "block"}, 112118, 16482944, 17662592),
    ({"arch": "shiftresnet20", "expansion": 3}, 95642, 16581248, 17760896),
    ({"arch": "shiftresnet110", "expansion": 9}, 1762970, 260375168, 261554816),
    ({"arch": "depthwiseresnet20", "reduction": 0.38}, 93956, 16647296, 17826944),
]
# The same of blocks that were gone before that commit, with the true multiply-adds.
REMOVED_ROWS = [
    ({"arch": "mobileresnet20", "reduction": 1.12}, 35151, 6539904, 5762880),
    ({"arch": "shuffleresnet20", "reduction": 0.38}, 35366, 14418560, 6073472),
    (
        {"arch": "depthwiseresnet20", "reduction": 0.38, "depthwise_skip": False},
        *(91204, 16385152, 17108608),
    ),
]


@functools.cache
def counted(**hyper: Any) -> Counts:
    """The counts of a network by its `arch` and what differs from 1, with 10 classes."""
    model = model_config(hyper)
    return count(nnx.eval_shape(lambda: models.build(model, 10, rngs=nnx.Rngs(0))))


def flops(arch: str, counts: Counts) -> int:
    return page_flops(models.parse_arch(arch)[0], counts)


def later_flops(arch: str, counts: Counts) -> int:
    """The page's FLOPs after the tool's commit 255228f: the stem times 3."""
    features = next(x for x in counts.layers if x.name == "linear").parameters // 10 - 1
    return flops(arch, counts) + 2 * 32 * 32 * 9 * features


@pytest.mark.core
@pytest.mark.parametrize(("arguments", "parameters", "page", "later"), ROWS)
def test_numbers_are_the_original_tools(arguments, parameters, page, later):
    counts = counted(**arguments)
    assert counts.parameters == parameters
    assert flops(arguments["arch"], counts) == page
    assert later_flops(arguments["arch"], counts) == later


@pytest.mark.core
@pytest.mark.parametrize(("arguments", "parameters", "page", "true"), REMOVED_ROWS)
def test_numbers_of_removed_blocks_are_the_original_tools(arguments, parameters, page, true):
    counts = counted(**arguments)
    assert counts.parameters == parameters
    assert flops(arguments["arch"], counts) == page
    assert counts.multiply_adds == true


@oracle.needed
@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 56, 110])
def test_every_row_of_the_removed_blocks(depth):
    rows = json.loads((oracle.FOLDER / "counts_mobile_shuffle.json").read_text())["rows"]
    rows = [row for row in rows if row["arch"] == f"resnet{depth}"]
    assert len(rows) >= 8
    for row in rows:
        model = model_config(row)
        network = nnx.eval_shape(lambda: models.build(model, 10, rngs=nnx.Rngs(0)))  # noqa: B023
        counts = count(network)
        assert row["num_classes"] == 10
        assert counts.parameters == row["params"], row
        assert flops(model["arch"], counts) == row["flops_readme_era"], row
        assert counts.multiply_adds == row["true_multiply_adds"], row


@oracle.needed
@pytest.mark.parametrize(
    ("family", "depth"),
    [
        ("shiftresnet", 20),  # of the others ROWS has a few
        *(
            pytest.param(family, depth, marks=pytest.mark.slow)
            for family in ("resnet", "shiftresnet", "depthwiseresnet")
            for depth in (20, 56, 110)
            if (family, depth) != ("shiftresnet", 20)
        ),
    ],
)
def test_every_row_of_the_oracle(family, depth):
    rows = json.loads((oracle.FOLDER / "counts.json").read_text())["rows"]
    rows = [row for row in rows if row["arch"] == f"{family}{depth}"]
    assert len(rows) >= 4
    for row in rows:
        options = ("arch", "expansion", "reduction", "reduction_mode")
        counts = counted(**{name: row[name] for name in options if name in row})
        assert row["num_classes"] == 10
        assert counts.parameters == row["params"], row
        assert flops(row["arch"], counts) == row["flops_readme_era"], row
        assert later_flops(row["arch"], counts) == row["flops"], row
        if "params_original" in row:
            plain = counted(arch=f"resnet{depth}")
            assert plain.parameters == row["params_original"]
            later = [later_flops(f"resnet{depth}", plain), later_flops(row["arch"], counts)]
            assert later[0] == row["flops_original"]
            for ours, originals, printed in (
                (counts.parameters, plain.parameters, "params_reduction_printed"),
                (later[1], later[0], "flops_reduction_printed"),
            ):
                assert f"{originals / ours:.2f}" == row[printed], row


@pytest.mark.core
@pytest.mark.parametrize(
    ("argv", "printed"),
    [
        pytest.param(
            ["--arch=shiftresnet20", "--expansion=3"],
            "Parameters: (new) 95642 (original) 272474 (reduction) 2.85\n"
            "FLOPs: (new) 16581248 (original) 40960640 (reduction) 2.47\n",
            id="the page's first example",
        ),
        pytest.param(
            ["--arch=resnet20", "--reduction=2.8", "--reduction-mode=block"],
            "==> resnet20 with reduction 2.80\n"
            "Parameters: (new) 96206 (original) 272474 (reduction) 2.83\n"
            "FLOPs: (new) 14197376 (original) 40960640 (reduction) 2.89\n",
            id="the page's second example",
        ),
        pytest.param(
            ["--arch", "resnet20", "--reduction", "2.8"],  # mode net, the original's default
            "==> resnet20 with reduction 2.80\n"
            "Parameters: (new) 96086 (original) 272474 (reduction) 2.84\n"
            "FLOPs: (new) 14046844 (original) 40960640 (reduction) 2.92\n",
            id="reduction of the whole net by default",
        ),
        pytest.param(
            ["--arch", "resnet20", "--reduction", "1"],  # which prints no line of its own
            "Parameters: (new) 272474 (original) 272474 (reduction) 1.00\n"
            "FLOPs: (new) 40960640 (original) 40960640 (reduction) 1.00\n",
            id="no reduction, no arrow",
        ),
        pytest.param(
            ["--arch", "depthwiseresnet20", "--reduction", "0.38"],
            "==> depthwiseresnet20 with reduction 0.38\n"
            "Parameters: (new) 93956 (original) 272474 (reduction) 2.90\n"
            "FLOPs: (new) 16647296 (original) 40960640 (reduction) 2.46\n",
            id="depthwise reduces its blocks by default",
        ),
        pytest.param(
            ["--arch", "mobileresnet20", "--reduction", "1.12"],
            "==> mobileresnet20 with reduction 1.12\n"
            "Parameters: (new) 35151 (original) 272474 (reduction) 7.75\n"
            "FLOPs: (new) 6539904 (original) 40960640 (reduction) 6.26\n",
            id="blocks that were removed",
        ),
        pytest.param(
            # 64 * 90 weights and 90 biases more in each network than with 10 classes.
            ["--arch", "shiftresnet20", "--expansion", "3", "--num-classes", "100"],
            "Parameters: (new) 101492 (original) 278324 (reduction) 2.74\n"
            "FLOPs: (new) 16587008 (original) 40966400 (reduction) 2.47\n",
            id="both networks get the classes",
        ),
    ],
)
def test_lines_are_the_pages_to_the_character(argv, printed, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--arch", "shiftresnt20"], ["shiftresnt20", "did you mean 'shiftresnet20'?"]),
        (["--arch", "resnet21"], ["resnet21", "6n + 2", "resnet20 and resnet26"]),
        (["--arch", "shiftresnet20", "--expansion", "0"], ["expansion", "above 0", "0.0"]),
        (["--arch", "shiftresnet20", "--expansion", "x"], ["expansion", "number", "'x'"]),
        (["--arch", "resnet20", "--expansion", "3"], ["expansion must be 1 for resnet", "3.0"]),
        (["--arch", "resnet20", "--reduction", "9000"], ["reduction 9000.0", "without channels"]),
        (["--arch", "resnet20", "--reduction-mode", "blok"], ["'blok'", "did you mean 'block'?"]),
        (["--arch", "resnet20", "--num-classes", "0"], ["--num-classes", "at least 1", "found 0"]),
        (["--arch", "resnet20", "--image-size", "-4"], ["--image-size", "at least 1", "-4"]),
        (["--arch", "resnet20", "--image-size", "99999"], ["99999x99999", "at most"]),
        (["--arch", "resnet20", "--expantion=3"], ["--expantion", "did you mean '--expansion'?"]),
        ([], ["--arch"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(argv, expected, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for words in expected:
        assert words in captured.err


def test_runs_as_a_module():
    command = [sys.executable, "-m", "shiftnet", "count", "--arch=shiftresnet20", "--expansion=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Parameters: (new) 95642 ")


def test_counting_allocates_no_weights(capsys):
    # 100 times the width, and so 10 GB of them: 10^4 times the convolutions' weights, 100 times
    # those of the stem, of the normalisations and of the linear layer.
    parameters = 269824 * 10**4 + (432 + 1568 + 640) * 100 + 10
    assert main(["--arch", "resnet20", "--reduction", "0.0001", "--true"]) == 0
    assert f"parameters:         {parameters:,}\n" in capsys.readouterr().out


def test_true_table_adds_up(capsys):
    assert main(["--arch", "shiftresnet20", "--expansion", "3", "--true"]) == 0
    table, totals = capsys.readouterr().out.split("\n\n")
    assert "multiply-adds:         16,433,792 per image: 16,433,792 float\n" in totals
    assert "energy:                     75.60 uJ per image" in totals  # 4.6 pJ for each of them
    rows = [line.replace(",", "").split() for line in table.splitlines()[1:]]
    assert rows[0] == ["conv1", "32x32x16", "442368", "432", "32", "1728", "32", "float"]
    assert rows[1] == ["bn1", "32x32x16", "0", "32", "32", "128", "32"]  # no multiply-adds
    assert rows[-1] == ["linear", "10", "640", "650", "32", "2600", "32", "float"]
    sums = [sum(int(row[column]) for row in rows) for column in (2, 3, 5)]
    assert [
        int(line.replace(",", "").split(":")[1].split()[0]) for line in totals.splitlines()[:5]
    ] == [
        # The page's stem of 9 * 64 per pixel is 27 * 16 in truth; elsewhere it counts what runs.
        16581248 - 1024 * (9 * 64 - 27 * 16),
        95642,
        95642 * 4,
        # The first block of the second stage: its shortcut, 32 channels of 16x16, and 96 channels
        # into and out of the ReLU (then the shift), before the stride.
        4 * 1024 * (8 + 96 + 96),
        1024 * sums[0],  # 32 bits of a weight times 32 bits of a value
    ]
    assert sums == [16433792, 95642, 382568]


def test_json_holds_everything(capsys):
    assert main(["--arch", "depthwiseresnet20", "--reduction", "0.38", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("arch", "reduction", "reduction_mode")} == {
        "arch": "depthwiseresnet20",
        "reduction": 0.38,
        "reduction_mode": "block",
    }
    assert found["page"]["flops"] == {
        "new": 16647296,
        "original": 40960640,
        "reduction": pytest.approx(2.46, abs=0.005),
    }
    true = found["true"]
    for name in ("multiply_adds", "parameters", "weight_bytes"):
        assert true[name] == sum(layer[name] for layer in true["layers"]), name
    # 3x3 on 84 channels (32 / 0.38) before the stride; the page counts it after the stride.
    depth = next(layer for layer in true["layers"] if layer["name"] == "layer2.0.depth")
    assert depth["multiply_adds"] == 32 * 32 * 9 * 84
    assert depth["output"] == [32, 32, 84]


def test_layers_of_different_forms_are_counted_by_their_own_bits(capsys):
    argv = ["--arch", "shiftresnet8", "--weights", "s3", "--weights-of", "layer3.*:int/2"]
    argv += ["--weights-first-last", "int/8"]
    assert main(argv) == 0
    assert "\nBits: (each) 2, 3, 8 (layers) 10 (share" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    layers = {
        layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["true"]["layers"]
    }
    found = {name: (layers[name]["bits"], layers[name]["weight_bytes"]) for name in layers}
    # A learned step takes 4 bytes, a bias 4 per class.
    assert found["conv1"] == (8, 432 + 4)
    assert found["layer2.0.conv1"] == (3, 16 * 32 * 3 // 8)
    assert found["layer3.0.conv1"] == (2, 32 * 64 * 2 // 8 + 4)
    assert found["linear"] == (8, 640 + 4 + 40)


def xla_flops(module: nnx.Module, shape: tuple[int, ...]) -> float:
    """What XLA's cost analysis says of the module."""
    graphdef, state = nnx.split(module)
    forward = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return forward.lower(state, x).cost_analysis()["flops"]


def inside(size: int, kernel: int, stride: int) -> float:
    """The share of a padded convolution's rows that lie on the image; XLA counts only these."""
    rows = [
        0 <= start + offset - kernel // 2 < size
        for start in range(0, size, stride)
        for offset in range(kernel)
    ]
    return sum(rows) / len(rows)


def conv_input(arch: str, name: str, conv: Conv) -> tuple[int, ...]:
    """The shape of what a convolution reads, by its place: images of 32x32, halved twice."""
    side = 32
    if name.startswith("layer"):
        stage, block, layer = name.removeprefix("layer").split(".", 2)
        # The first block of a stage halves: a ResNet's in its first convolution.
        halved = int(block) > 0 or (arch.startswith("resnet") and layer == "conv2")
        side = 32 // 2 ** max(int(stage) - (1 if halved else 2), 0)
    return (1, side, side, conv.weight.shape[2] * conv.groups)


@pytest.mark.core
@pytest.mark.parametrize(
    ("arch", "expansion", "reduction"),
    [
        ("shiftresnet8", 3, 1),
        pytest.param("depthwiseresnet8", 1, 0.5, marks=pytest.mark.slow),
        pytest.param("resnet8", 1, 1.5, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds_are_half_of_xlas_flops(arch, expansion, reduction):
    model = model_config({"arch": arch, "expansion": expansion, "reduction": reduction})
    network = networks.random(model, 10)
    counts = count(network)
    found = {layer.name: layer.multiply_adds for layer in counts.layers if layer.multiply_adds}
    expected, on_the_image = {}, 0.0
    for path, module in nnx.iter_modules(network):
        name = ".".join(map(str, path))
        if isinstance(module, Conv):
            shape = conv_input(arch, name, module)
            share = inside(shape[1], module.weight.shape[0], module.stride) ** 2
            with only_xla():  # which counts no operation of its own in C++
                expected[name] = xla_flops(module, shape) / share / 2
            on_the_image += found[name] * share
        elif isinstance(module, Linear):
            biases = module.bias.shape[0]
            expected[name] = (xla_flops(module, (1, module.weight.shape[0])) - biases) / 2
            on_the_image += found[name]
    assert found == pytest.approx(expected, rel=1e-12)

    # The rest of the network's work: a few operations on every value, and no product.
    with only_xla():
        rest = xla_flops(network, (1, 32, 32, 3)) - 2 * on_the_image
    values = sum(math.prod(layer.output) for layer in counts.layers)
    assert values < rest < 5 * values


class TwoLatents(nnx.Module):
    """A weight made of two parameters, as low-bit weights are."""

    def __init__(self, shape: tuple[int, ...]):
        self.sign = nnx.Param(jnp.ones(shape))
        self.gate = nnx.Param(jnp.ones(shape))

    def __call__(self) -> jax.Array:
        return jnp.where(self.gate[...] > 0, jnp.sign(self.sign[...]), 0)


class Product(nnx.Module):
    """`x @ weight`, in a function that is called, or in a loop."""

    def __init__(self, features: int, loop: bool = False):
        self.weight = TwoLatents((features, features))
        self.loop = loop

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight()
        if self.loop:
            return jax.lax.fori_loop(0, 5, lambda _, x: x @ weight, x)
        return jax.jit(jnp.matmul)(x, weight)


class Foreign(nnx.Module):
    """Layers that are not ours, and one of them used twice."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 8, (5, 3), padding="VALID", use_bias=True, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(
            8, 8, (3, 3), strides=2, feature_group_count=4, use_bias=False, rngs=rngs
        )
        self.again = Product(8)
        self.unused = nnx.Param(jnp.ones((7,), jnp.bfloat16))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.grouped(nnx.relu(self.norm(self.stem(x))))
        x = self.again(self.again(x))
        return x.mean((1, 2))


@pytest.mark.core
def test_networks_of_other_layers_are_counted():
    counts = count(Foreign(), (12, 12, 3))
    assert [tuple(layer)[:6] for layer in counts.layers] == [
        ("stem", 8 * 10 * 8 * (5 * 3 * 3), 5 * 3 * 3 * 8 + 8, 32, 1472, (8, 10, 8)),
        ("norm", 0, 16, 32, 64, (8, 10, 8)),
        ("grouped", 4 * 5 * 8 * (9 * 2), 9 * 2 * 8, 32, 4 * 9 * 2 * 8, (4, 5, 8)),
        ("again", 2 * 4 * 5 * 8 * 8, 2 * 64, 32, 4 * 2 * 64, (4, 5, 8)),
        ("", 0, 7, 32, 14, (8,)),  # the network itself
    ]
    assert [layer.kind for layer in counts.layers] == ["float", "", "float", "float", ""]


SHIFTRESNET8 = {"arch": "shiftresnet8", "expansion": 3.0}


def moved_if_fused() -> int:
    """The bytes of shiftresnet8 with expansion 3 and 10 classes, without the weights, by hand.

    The stem reads the image and writes 16 channels. A block reads its input and writes its output;
    where the shape changes, its shortcut reads every other row and column of the input and writes
    its output, which the block reads. The last block writes the mean, which the linear layer reads.
    """
    image, logits, mean = 1024 * 3, 10, 64
    sizes = [1024 * 16, 256 * 32, 64 * 64]
    stem_and_first = image + sizes[0] + sizes[0] + sizes[0]
    second = sizes[0] // 4 + sizes[1] + sizes[0] + sizes[1] + sizes[1]
    third = sizes[1] // 4 + sizes[2] + sizes[1] + sizes[2] + mean
    return 4 * (stem_and_first + second + third + mean + logits)


@pytest.mark.core
def test_fused_traffic_is_what_blocks_read_and_write():
    counts = counted(**SHIFTRESNET8)
    assert counts.fused_bytes_moved - counts.weight_bytes == moved_if_fused()


def test_traffic_without_fusion_counts_every_operation_and_packed_weights_once():
    counts = count(Wide(kept=True), (8, 8, 4))
    # Two convolutions, the shift (of three operations that go over 40 channels each) and the sum.
    convolutions = 64 * (4 + 40) + 64 * (40 + 4)
    shift = 64 * (40 + 40)
    addition = 64 * 3 * 4
    assert counts.bytes_moved == counts.weight_bytes + 4 * (convolutions + shift + addition)
    # The shift is part of the convolution before it, and the sum of that after it.
    fused = 64 * (4 + 40) + 64 * (40 + 4 + 4)
    assert counts.fused_bytes_moved == counts.weight_bytes + 4 * fused


@pytest.mark.core
@pytest.mark.parametrize(
    ("fields", "kind", "bits", "picojoules"),
    [
        ({}, "float", 32, 3.7 + 0.9),
        ({"dtype": "bfloat16"}, "float", 16, 1.1 + 0.4),
        ({"weights": "sign"}, "sign", 1, 0.9),
        ({"weights": "s3", "weight_bits": 2}, "sign", 2, 0.9),
        ({"weights": "s3"}, "shift-add", 3, 0.03 + 0.9),
        ({"weights": "denseshift"}, "shift-add", 3, 0.03 + 0.9),
    ],
)
def test_multiply_adds_are_counted_by_kind(fields, kind, bits, picojoules):
    counts = counted(**SHIFTRESNET8, **fields)
    width = 16 if "dtype" in fields else 32
    ends = sum(n.multiply_adds for n in counts.layers if n.name in ("conv1", "linear"))
    inside = counts.multiply_adds - ends
    expected = dict.fromkeys(("float", "integer", "shift-add", "sign"), 0)
    expected["float"] += ends
    expected[kind] += inside
    assert counts.by_kind == expected
    assert counts.bit_operations == width * (bits * inside + width * ends)
    energy = {16: 1.5, 32: 4.6}[width] * ends + picojoules * inside
    assert counts.picojoules == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize(
    ("levels", "bits", "activation_bits", "kind", "operations", "picojoules"),
    [
        (range(-128, 128), 8, 8, "integer", 64, 0.2 + 0.1),
        (range(-128, 128), 8, 16, "integer", 128, 3.1 + 0.1),
        (range(-7, 8), 4, 4, "integer", 16, 0.2 + 0.1),
        (range(-7, 8), 4, None, "float", 4 * 32, 3.7 + 0.9),
        (None, 32, 8, "float", 32 * 8, 3.7 + 0.9),
        ((-4, -2, -1, 0, 1, 2, 4), 3, 8, "shift-add", 24, 0.1 + 0.1),
        ((-2, -1, 0, 1), 2, 8, "shift-add", 16, 0.1 + 0.1),
        ((-6, -4, -2, 0, 1, 2, 3, 4, 6), 4, 4, "shift-add", 16, 2 * (0.1 + 0.1)),  # 6 = 4 + 2
        ((-1, 0, 1), 2, 8, "sign", 16, 0.1),
        ((-1, 1), 1, 1, "sign", 1, 0.1),
        (None, 32, 1, "sign", 32, 0.9),
        (range(-7, 8), 4, 1, "sign", 4, 0.1),
    ],
)
def test_arithmetic_follows_from_levels_and_bits(
    levels, bits, activation_bits, kind, operations, picojoules
):
    found = arithmetic(levels and tuple(levels), bits, activation_bits)
    assert (found.kind, found.bit_operations) == (kind, operations)
    assert found.picojoules == pytest.approx(picojoules, rel=1e-12)


class Quantizer(nnx.Module):
    """In place of an activation form: something with a number of bits."""

    bits = 4

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.round(x)


class Quantized(nnx.Module):
    """A layer that quantizes what it reads, as `Conv` with an activation form."""

    def __init__(self):
        self.weight = quantizers.S3((1, 1, 40, 8), rngs=nnx.Rngs(0))
        self.activation = Quantizer()

    def __call__(self, x: jax.Array) -> jax.Array:
        return shift_pointwise(self.activation(x), self.weight()[0, 0], 3)


class QuantizedAfterFloat(nnx.Module):
    def __init__(self):
        self.grow = Conv(4, 40, 1, rngs=nnx.Rngs(0))
        self.shrink = Quantized()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.shrink(self.grow(x))


def test_quantized_activations_are_counted_and_moved_in_their_bits():
    counts = count(QuantizedAfterFloat(), (8, 8, 4))
    grow, shrink = counts.layers
    assert (grow.kind, grow.activation_bits, grow.bits) == ("float", 32, 32)
    assert (shrink.kind, shrink.activation_bits, shrink.bits) == ("shift-add", 4, 3)
    assert shrink.bit_operations == 3 * 4 * 64 * 40 * 8
    assert shrink.picojoules == pytest.approx(0.2 * 64 * 40 * 8)
    stored = 64 * 40 // 2  # written by the first layer and read by the second, half a byte each
    fused = 4 * 64 * 4 + 2 * stored + 4 * 64 * 8
    assert counts.fused_bytes_moved == counts.weight_bytes + fused


def test_compares_networks_in_one_table(capsys):
    networks = ["shiftresnet8:expansion=3,weights=s3", "resnet8", "wrn8:width=0.5,weights=sign"]
    assert main(["--compare", *networks]) == 0
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split() == ["per", "image", *networks]
    rows = {line[:22].strip(): line[22:].replace(",", "").split() for line in lines}
    counts = [
        counted(**SHIFTRESNET8, weights="s3"),
        counted(arch="resnet8"),
        counted(arch="wrn8", width=0.5, weights="sign"),
    ]
    for title, numbers in (
        ("parameters", [n.parameters for n in counts]),
        ("weight bytes", [n.weight_bytes for n in counts]),
        ("multiply-adds", [n.multiply_adds for n in counts]),
        ("shift-add", [counts[0].by_kind["shift-add"], 0, 0]),
        ("sign", [0, 0, counts[2].by_kind["sign"]]),
        ("bit operations", [n.bit_operations for n in counts]),
        ("bytes moved", [n.bytes_moved for n in counts]),
        ("fused", [n.fused_bytes_moved for n in counts]),
    ):
        assert list(map(int, rows[title])) == numbers, title
    assert rows["energy, uJ"] == [f"{n.picojoules / 1e6:.2f}" for n in counts]


def test_compared_networks_of_other_images_say_so(capsys):
    assert main(["--compare", "resnet8", "imagenet_resnet18"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:3] == [["image", "size", "32", "224"], ["classes", "10", "1,000"]]
    assert main(["--compare", "resnet8", "imagenet_resnet18", "--image-size=32"]) == 0
    assert "image size" in capsys.readouterr().out  # 1000 classes


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["resnet8", "shiftresnet8:expansio=3"], ["'expansio'", "did you mean 'expansion'"]),
        (["resnet8:expansion=3"], ["expansion must be 1 for resnet", "3.0"]),
        (["resnet8", "--weights=s3"], ["--weights", "ignored", "resnet8:weights=s3"]),
        (["resnet8", "--arch=resnet8"], ["--arch", "not allowed with", "--compare"]),
        ([], ["--compare", "expected at least one argument"]),
        (["resnet8", "resnet20", "resnet8"], ["--compare names resnet8 twice"]),
    ],
)
def test_a_bad_comparison_is_one_sentence_and_exit_code_2(argv, expected, capsys):
    assert main(["--compare", *argv]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    for words in expected:
        assert words in captured.err


class Wide(nnx.Module):
    """A shortcut around a wide pair of layers."""

    def __init__(self, kept: bool):
        rngs = nnx.Rngs(0)
        self.grow = Conv(4, 40, 3, rngs=rngs)
        self.shift = Shift(3)
        self.shrink = Conv(40, 4, 3, rngs=rngs)
        self.kept = kept

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.shrink(self.shift(self.grow(x)))
        return x + y if self.kept else y


@pytest.mark.parametrize("kept", [False, True])
def test_peak_activations_hold_what_the_shortcut_keeps(kept):
    # The shift reads and writes 40 channels; the input's 4 wait beside them if they are needed.
    assert count(Wide(kept), (8, 8, 4)).peak_activation_bytes == 4 * 64 * (40 + 40 + 4 * kept)


def test_peak_of_a_resnet():
    # Input of the block, input and output of its second convolution: 16 channels at 32x32 each.
    assert counted(arch="resnet20").peak_activation_bytes == 4 * 1024 * (16 + 16 + 16)


def test_products_in_a_loop_are_refused_and_not_miscounted():
    with pytest.raises(UserError, match=r"inside (scan|while)"):
        count(Product(3, loop=True), (4, 4, 3))


class Remat(nnx.Module):
    def __init__(self):
        self.product = Product(3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda x: self.product(x))(x)


def test_products_that_are_computed_again_for_the_gradient_count_once():
    assert count(Remat(), (4, 4, 3)).multiply_adds == 4 * 4 * 3 * 3


class Norm(nnx.Module):
    """A batch norm in bfloat16, and a ReLU."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.bfloat16)
        y = x.astype(jnp.float32) * 2 + 1
        return jax.nn.relu(y.reshape(-1, 3).astype(jnp.bfloat16))


def test_what_changes_its_type_is_kept_in_the_narrower_one():
    counts = count(Norm(), (8, 8, 3))
    # Product read and written, sum read and written, ReLU read and written.
    assert counts.bytes_moved == 64 * 3 * (2 + 4 + 4 + 2 + 2 + 2)
    assert counts.peak_activation_bytes == 64 * 3 * (4 + 2)
    half, wide = (counted(arch="resnet20", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert half.bytes_moved < 0.7 * wide.bytes_moved
    assert half.peak_activation_bytes < 0.7 * wide.peak_activation_bytes
