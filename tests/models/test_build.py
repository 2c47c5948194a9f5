"""Networks by name: every depth, width, number of classes and input size; clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet import models, quantizers
from shiftnet.config import default_config
from shiftnet.errors import UserError
from shiftnet.interchange import torch_names
from shiftnet.models.counting import count
from shiftnet.models.resnet import ResNet
from tests import networks, oracle


def config(arch: str, **fields) -> dict:
    return {**default_config().model, "arch": arch, **fields}


# Families for small images, with the frame of the ResNet and with their own.
FRAMED = ["resnet", "shiftresnet", "depthwiseresnet"]
SMALL = [*FRAMED, "wrn"]


def parameters(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def middle_features(model: ResNet) -> list[int]:
    """The middle channels of each stage's first block."""
    return [stage[0].conv1.weight.shape[-1] for stage in (model.layer1, model.layer2, model.layer3)]


def output_features(model: ResNet) -> list[int]:
    """The channels of the stem and of each stage."""
    last = [
        stage[-1].conv2.weight.shape[-1] for stage in (model.layer1, model.layer2, model.layer3)
    ]
    return [model.conv1.weight.shape[-1], *last]


@pytest.mark.parametrize("family", FRAMED)
@pytest.mark.parametrize("depth", [8, 14, 20, 56, 110, 164])
@pytest.mark.covering
def test_any_depth_of_6n_plus_2_has_3n_blocks(family, depth):
    model = networks.abstract(config(f"{family}{depth}"), 10)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [
        (depth - 2) // 6
    ] * 3


@pytest.mark.parametrize(
    "arch",
    [
        *(f"{family}8" for family in (*SMALL, "mobileresnet", "shuffleresnet")),
        *("imagenet_resnet18", "shiftnet_b"),
    ],
)
@pytest.mark.parametrize(
    ("size", "classes"), [((32, 32), 10), ((40, 36), 1), ((5, 3), 10), ((224, 224), 1000)]
)
@pytest.mark.covering
def test_any_input_size_and_number_of_classes(arch, size, classes):
    model = networks.abstract(config(arch), classes)
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    for train in (False, True):
        logits = nnx.eval_shape(lambda model, x, train=train: model(x, train=train), model, x)
        assert logits.shape == (2, classes)
        assert logits.dtype == jnp.float32


@pytest.mark.core
@pytest.mark.parametrize(
    ("fields", "count"),
    [
        # The lines of the page: CIFAR-10, without the running statistics.
        ({"arch": "shiftresnet20", "expansion": 3.0}, 95642),
        ({"arch": "resnet20"}, 272474),
        ({"arch": "resnet20", "reduction": 2.8, "reduction_mode": "block"}, 96206),
    ],
)
def test_has_the_parameters_that_the_page_reports(fields, count):
    assert parameters(networks.abstract(config(**fields), 10)) == count


@pytest.mark.core
@pytest.mark.parametrize(
    ("arch", "parameter_millions", "multiply_add_billions"),
    # The paper has 4.1, 1.1 and 0.78 million, and 1.4 and 0.37 billion for the first two. The
    # layout of the third is not in it.
    [("shiftnet_a", 4.19, 1.42), ("shiftnet_b", 1.18, 0.371), ("shiftnet_c", 0.694, 0.0972)],
)
def test_shiftnets_cost_what_the_paper_reports(arch, parameter_millions, multiply_add_billions):
    counts = count(networks.abstract(config(arch), 1000), (224, 224, 3))
    assert counts.parameters / 1e6 == pytest.approx(parameter_millions, rel=0.003)
    assert counts.multiply_adds / 1e9 == pytest.approx(multiply_add_billions, rel=0.004)


@oracle.every_case("net", "net_removed", "wrn", "s3net")
def test_has_the_parameters_of_the_original(group, name):
    hyper = oracle.case(group, name).hyper
    model = networks.abstract(networks.model_config(hyper), hyper["num_classes"])
    assert parameters(model) == hyper["n_params"]


@pytest.mark.core
def test_expansion_widens_the_middle_of_shift_blocks():
    for expansion, middle in [(1.0, [16, 32, 64]), (3.0, [48, 96, 192]), (0.7, [11, 22, 44])]:
        model = networks.abstract(config("shiftresnet8", expansion=expansion), 10)
        assert middle_features(model) == middle
        assert output_features(model) == [16, 16, 32, 64]


@pytest.mark.core
@pytest.mark.parametrize("family", ["resnet", "shiftresnet"])
def test_reduction_of_the_net_narrows_every_stage(family):
    model = networks.abstract(config(f"{family}8", reduction=2.8), 10)
    # int(16 / sqrt(2.8)) and so on
    assert output_features(model) == [9, 9, 19, 38]
    assert middle_features(model) == [9, 19, 38]


@pytest.mark.core
def test_reduction_of_the_blocks_narrows_their_middle_alone():
    model = networks.abstract(config("resnet8", reduction=2.8, reduction_mode="block"), 10)
    assert output_features(model) == [16, 16, 32, 64]
    assert middle_features(model) == [5, 11, 22]
    model = networks.abstract(
        config("depthwiseresnet8", reduction=0.38, reduction_mode="block"), 10
    )
    assert middle_features(model) == [42, 84, 168]
    model = networks.abstract(config("shuffleresnet8", reduction=0.9, reduction_mode="block"), 10)
    assert middle_features(model) == [16, 32, 68]  # of 17.8, 35.6 and 71.1


@pytest.mark.core
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"arch": "shiftresnt20"}, "'shiftresnt20'; did you mean 'shiftresnet20'"),
        ({"arch": "depthwise20"}, "'depthwise20'; did you mean 'depthwiseresnet20'"),
        (
            {"arch": "vgg"},
            "'vgg'; known: depthwiseresnet20, imagenet_resnet18, mobileresnet20, resnet20, shift",
        ),
        ({"arch": "resnet"}, "unknown architecture 'resnet'; did you mean 'resnet20'"),
        ({"arch": "resnet21"}, r"depth must be 6n \+ 2, the nearest are resnet20 and resnet26"),
        ({"arch": "resnet18"}, "'resnet18'; did you mean 'imagenet_resnet18'"),
        ({"arch": "wrn28_10"}, "'wrn28_10'; did you mean 'wrn26' with model.width=10"),
        ({"arch": "wideresnet28"}, "did you mean 'wrn26' with model.width=10"),
        ({"arch": "resnet2"}, "the nearest are resnet8 and resnet14"),
        ({"arch": "wrn18"}, r"depth must be 6n \+ 2, the nearest are wrn14 and wrn20"),
        (
            {"arch": "imagenet_resnet20"},
            "does not exist; there are imagenet_resnet18, imagenet_res",
        ),
        (
            {"arch": "shiftnet_a20"},
            "unknown architecture 'shiftnet_a20'; did you mean 'shiftnet_a'",
        ),
        ({"arch": "resnet20", "width": 2.0}, r"width must be 1 for resnet \(it applies to wrn\)"),
        ({"arch": "wrn8", "width": 0.05}, "width 0.05 leaves a layer without channels"),
        ({"arch": "resnet8", "weights": "s4"}, "unknown weight form 's4'; did you mean 's3'"),
        (
            {"arch": "resnet8", "weights": "s3", "weight_bits": 5},
            "weight_bits must be 0 or one of 2, 3, 4 for s3 weights, found 5",
        ),
        (
            {"arch": "resnet8", "weights": "sign", "weight_bits": 2},
            "weight_bits must be 0 for sign weights, found 2",
        ),
        (
            {"arch": "resnet8", "weights_of": "layer1.*:s3,layer4.*:float"},
            r"model\.weights_of: no layer's path matches 'layer4\.\*'; the network has conv1, "
            r"layer1\.\*\.conv1, layer1\.\*\.conv2, layer2",
        ),
        ({"arch": "resnet8", "weights_of": "conv1:s4"}, "unknown weight form 's4'; did you mean"),
        (
            {"arch": "resnet8", "weights_of": "conv1:int/9"},
            r"the bits in model\.weights_of must be 0 or one of 2, .* 8 for int weights, found 9",
        ),
        (
            {
                "arch": "resnet8",
                "weights": "s3",
                "quantize_first_last": True,
                "weights_first_last": "int/8",
            },
            "weights_first_last=int/8 and model.quantize_first_last=true exclude each other",
        ),
        ({"arch": "resnet8", "depthwise_skip": False}, "depthwise_skip must be true for resnet"),
        (
            {"arch": "shuffleresnet8", "reduction": 4.1, "reduction_mode": "block"},
            "reduction 4.1 leaves a layer without channels",
        ),
        (
            {"arch": "shuffleresnet8", "reduction": 2.8},
            "a shuffleresnet's channels must be multiples of 4, found 9",
        ),
        ({"arch": "resnet20", "expansion": 3.0}, "expansion must be 1 for resnet.*got 3.0"),
        ({"arch": "depthwiseresnet20", "expansion": 3.0}, "must be 1 for depthwiseresnet"),
        ({"arch": "resnet20", "reduction": 257.0}, "reduction 257.0 leaves a layer without chan"),
        (
            {"arch": "resnet20", "reduction": 16.5, "reduction_mode": "block"},
            "reduction 16.5 leaves a layer without channels",
        ),
        ({"arch": "shiftresnet20", "expansion": 0.01}, "expansion 0.01 leaves a layer without"),
        (
            {"arch": "shiftresnet20", "reduction": 2.0, "reduction_mode": "block"},
            "reduction must be 1 for a shiftresnet in reduction_mode 'block'.*got 2.0",
        ),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        networks.abstract(config(**fields), 10)


@pytest.mark.core
@pytest.mark.parametrize(
    ("size", "windows"),
    [
        # The last map is a quarter of the input's size; what the average is over.
        ((32, 32), (8, 8)),
        ((40, 36), (8, 8)),  # of 10x9: what an 8x8 window leaves over is dropped, as originally
        ((64, 64), (16, 16)),  # four 8x8 windows
        ((20, 64), (5, 16)),  # smaller than a window: all there is
    ],
)
def test_logits_come_from_the_mean_over_the_last_maps_windows(size, windows):
    model = networks.random(config("shiftresnet8"), 10)
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def last_map_and_logits(state, x):
        model = nnx.merge(graphdef, state)
        y = nnx.relu(model.bn1(model.conv1(x)))
        for stage in (model.layer1, model.layer2, model.layer3):
            for block in stage:
                y = block(y)
        return y, model(x)

    y, logits = jax.device_get(last_map_and_logits(state, x))
    pooled = y[:, : windows[0], : windows[1]].astype(np.float64).mean((1, 2))
    weights = torch_names.to_torch(model)
    expected = pooled @ weights["linear.weight"].T + weights["linear.bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# Precision layer by layer


def forms_of(model: nnx.Module) -> dict[str, str]:
    return {
        name: f"{type(weight).__name__}/{weight.bits}"
        for name, weight in quantizers.of_layers(model).items()
    }


@pytest.mark.core
@pytest.mark.parametrize("arch", ["resnet8", "wrn8", "shiftnet_b"])
def test_the_first_and_last_layer_can_have_8_bits_in_any_network(arch):
    model = networks.abstract(config(arch, weights="s3", weights_first_last="int/8"), 10)
    forms = forms_of(model)
    first_and_last = {forms.pop(name) for name in model.first_and_last}
    assert first_and_last == {"Int/8"}
    assert set(forms.values()) == {"S3/3"}


@pytest.mark.core
def test_the_last_pattern_that_matches_a_layer_chooses_its_form():
    patterns = ["layer*:ternary", " layer1.*:float", "layer3.0:s3/2", "*.projection.0:int/4"]
    fields = {
        "weights": "sign",
        "weights_first_last": "int/8",
        "weights_of": ",".join([*patterns, "linear:pot"]),
    }
    forms = forms_of(networks.abstract(config("shiftresnet8", **fields), 10))
    assert forms == {
        "conv1": "Int/8",
        "layer1.0.conv1": "Float/32",
        "layer1.0.conv2": "Float/32",
        "layer2.0.conv1": "Ternary/2",
        "layer2.0.conv2": "Ternary/2",
        "layer2.0.shortcut.projection.0": "Int/4",
        "layer3.0.conv1": "S3/2",
        "layer3.0.conv2": "S3/2",
        "layer3.0.shortcut.projection.0": "Int/4",
        "linear": "PoT/5",
    }


def test_layers_keep_their_numbers_when_others_get_another_form():
    key = jax.random.key(3, impl="rbg")  # which compiles fast
    plain, chosen = (
        jax.jit(lambda fields=fields: nnx.state(models.build(fields, 10, rngs=nnx.Rngs(key))))()
        for fields in (config("resnet8"), config("resnet8", weights_of="layer2.*:s3,linear:int"))
    )
    plain, chosen = (dict(nnx.to_flat_state(state)) for state in (plain, chosen))
    changed = {path for path in plain if path[0] == "layer2" or path[:2] == ("linear", "weight")}
    kept = {path for path in plain.keys() & chosen if path not in changed}
    assert {("conv1", "weight", "value"), ("linear", "bias")} <= kept
    for path in kept:
        np.testing.assert_array_equal(plain[path][...], chosen[path][...], err_msg=str(path))
