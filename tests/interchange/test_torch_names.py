"""Weights go to the originals' names and layouts and come back unchanged."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from shiftnet.interchange import torch_names
from shiftnet.interchange.torch_names import SHIFT, TORCHVISION, WRN, Naming
from shiftnet.quantizers import FORMS
from tests import networks, oracle
from tests.models.test_build import config


@pytest.mark.parametrize(
    ("arch", "naming"),
    [
        ("resnet8", SHIFT),
        ("resnet8", TORCHVISION),
        ("shiftresnet8", SHIFT),
        ("depthwiseresnet8", SHIFT),
        ("mobileresnet8", SHIFT),
        ("shuffleresnet8", SHIFT),
        ("wrn8", WRN),
        ("imagenet_resnet18", TORCHVISION),
        ("shiftnet_b", TORCHVISION),
    ],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.covering
def test_a_round_trip_changes_nothing(arch, naming, form):
    model = networks.abstract(config(arch, weights=form), 10)
    random = np.random.default_rng(0)
    original = {
        name: random.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes_in_torch(model, naming).items()
    }
    leaves = jax.tree.leaves(nnx.state(model))
    assert len(original) == len(leaves)
    torch_names.from_torch(model, original | {"bn1.num_batches_tracked": np.array(3)}, naming)
    back = torch_names.to_torch(model, naming)
    assert sorted(back) == sorted(original)
    for name, value in original.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def shapes_in_torch(model: nnx.Module, naming: Naming = SHIFT) -> dict[str, np.ndarray]:
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.state(model))
    return torch_names.to_torch(nnx.merge(nnx.graphdef(model), zeros), naming)


@oracle.every_case("net", "net_removed", "wrn", "s3net")
def test_names_and_shapes_are_the_originals(group, name):
    case = oracle.case(group, name)
    hyper = case.hyper
    model = networks.abstract(networks.model_config(hyper), hyper["num_classes"])
    expected = {key: value.shape for key, value in case.part("sd/").items()}
    expected = expected or {key: tuple(shape) for key, shape in hyper["state_dict_names"]}
    expected = {key: shape for key, shape in expected.items() if counts_in_ours(key)}
    ours = shapes_in_torch(model, networks.naming(hyper))
    assert {key: value.shape for key, value in ours.items()} == expected


def counts_in_ours(name: str) -> bool:
    """S3's state dict names its sign latents twice."""
    return not name.endswith(("num_batches_tracked", "weight_sign"))


@oracle.needed
@pytest.mark.parametrize(
    ("depth", "classes", "case"),
    [(depth, 1000, f"imagenet_{depth}") for depth in (18, 34, 50, 101, 152)]
    + [(depth, 10, f"cifar10_{depth}") for depth in (8, 14, 20, 32, 56)],
)
def test_s3_networks_have_the_names_and_shapes_of_s3s_code(depth, classes, case):
    lists = json.loads((oracle.FOLDER / "s3_param_lists.json").read_text())[case]
    arch = f"imagenet_resnet{depth}" if classes == 1000 else f"resnet{depth}"
    model = networks.abstract(config(arch, weights="s3"), classes)
    ours = {name: list(value.shape) for name, value in shapes_in_torch(model, TORCHVISION).items()}
    assert (
        sum(np.prod(s, dtype=int) for n, s in ours.items() if ".running_" not in n)
        == (lists["n_params"])
    )
    trained = [name for name in ours if ".running_" not in name]
    assert len(trained) == lists["n_named_parameters"]
    if "state_dict" in lists:
        expected = {name: shape for name, shape in lists["state_dict"] if counts_in_ours(name)}
        assert ours == expected


def test_convolutions_and_linear_layers_change_their_layout():
    names = shapes_in_torch(networks.abstract(config("depthwiseresnet8"), 7))
    assert names["conv1.weight"].shape == (16, 3, 3, 3)
    assert names["layer2.0.depth.weight"].shape == (32, 1, 3, 3)
    assert names["layer2.0.shortcut.0.weight"].shape == (32, 16, 1, 1)
    assert names["layer2.0.shortcut.1.running_var"].shape == (32,)
    assert names["linear.weight"].shape == (7, 64)


def test_a_missing_or_misshapen_array_is_named():
    model = networks.abstract(config("resnet8"), 10)
    weights = shapes_in_torch(model)
    with pytest.raises(ValueError, match=r"linear.bias: expected shape \(10,\), found \(11,\)"):
        torch_names.from_torch(model, weights | {"linear.bias": np.zeros(11, np.float32)})
    del weights["layer1.0.conv2.weight"]
    with pytest.raises(KeyError, match=r"layer1\.0\.conv2\.weight"):
        torch_names.from_torch(model, weights)
