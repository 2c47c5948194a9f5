"""Weights go to the originals' names and layouts and come back unchanged."""

import jax
import numpy as np
import pytest
from flax import nnx

from shiftnet import models
from shiftnet.models import torch_names
from tests import networks, oracle
from tests.models.test_build import config

pytestmark = pytest.mark.core


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_a_round_trip_changes_nothing(family):
    model = networks.abstract(config(f"{family}8"), 10)
    random = np.random.default_rng(0)
    original = {
        name: random.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes_in_torch(model).items()
    }
    torch_names.from_torch(model, original | {"bn1.num_batches_tracked": np.array(3)})
    back = torch_names.to_torch(model)
    assert sorted(back) == sorted(original)
    for name, value in original.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def shapes_in_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.state(model))
    return torch_names.to_torch(nnx.merge(nnx.graphdef(model), zeros))


@oracle.every_case("net")
def test_names_and_shapes_are_the_originals(name):
    case = oracle.case("net", name)
    hyper = case.hyper
    model = networks.abstract(networks.model_config(hyper), hyper["num_classes"])
    expected = {
        key: value.shape
        for key, value in case.part("sd/").items()
        if not key.endswith("num_batches_tracked")
    }
    assert {key: value.shape for key, value in shapes_in_torch(model).items()} == expected


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
