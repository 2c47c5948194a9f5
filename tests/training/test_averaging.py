"""Averaged networks, and batch statistics estimated anew, against PyTorch's numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet import checkpoint, data, packing
from shiftnet.config import default_config
from shiftnet.data import Split
from shiftnet.data.augment import normalize
from shiftnet.data.folder import FolderSource
from shiftnet.layers import BatchNorm, Conv
from shiftnet.training import batch_statistics
from shiftnet.training.averaging import moving_average
from shiftnet.training.batch_statistics import make_estimator, unfold
from shiftnet.training.mesh import make_mesh
from tests import networks, oracle
from tests.data.image_files import wnid, write_folder
from tests.test_packing import note
from tests.training.small import recipe

NUMBERS = json.loads((oracle.GOLDEN / "torch.json").read_text())


@pytest.mark.core
@pytest.mark.usefixtures("float64")
def test_the_moving_average_is_pytorchs():
    average = jnp.full((2, 3), 7.0)  # of no meaning before the first step
    pairs = zip(NUMBERS["ema"]["values"], NUMBERS["ema"]["averages"], strict=True)
    for step, (now, expected) in enumerate(pairs):
        average = moving_average(average, jnp.asarray(now), jnp.int32(step), decay=0.75, every=1)
        np.testing.assert_allclose(average, expected, rtol=1e-14)


@pytest.mark.usefixtures("float64")
def test_the_moving_average_waits_for_updates_of_several_steps():
    values, averages = (np.asarray(NUMBERS["ema"][name]) for name in ("values", "averages"))
    average = jnp.zeros((2, 3))
    for step in range(3 * len(values)):
        now = jnp.asarray(values[step // 3])
        average = moving_average(average, now, jnp.int32(step), decay=0.75, every=3)
        if step % 3 == 2:
            np.testing.assert_allclose(average, averages[step // 3], rtol=1e-14)


class Two(nnx.Module):
    """1x1, batch norm, ReLU, 1x1, batch norm."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1, self.bn1 = Conv(3, 4, 1, rngs=rngs), BatchNorm(4)
        self.conv2, self.bn2 = Conv(4, 5, 1, rngs=rngs), BatchNorm(5)

    def __call__(self, x, *, train=False):
        y = nnx.relu(self.bn1(self.conv1(x), train=train))
        return self.bn2(self.conv2(y), train=train)


def test_estimated_statistics_are_those_of_pytorchs_update_bn():
    expected, network = NUMBERS["update_bn"], Two()
    for conv, weight in zip((network.conv1, network.conv2), expected["weights"], strict=True):
        value = np.asarray(weight, np.float32).T[None, None]
        conv.weight.value.set_value(jnp.asarray(value))
    batches = np.moveaxis(np.asarray(expected["images"], np.uint8), 2, -1).reshape(6, 2, 2, 3)
    images = np.empty_like(batches)
    images[np.random.RandomState(0).permutation(6)] = batches  # the order it takes them in
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    estimate = make_estimator(
        graphdef,
        Split(images, np.zeros(6, np.int32)),
        default_config().data,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        batch_size=2,
        batches=100,
        mesh=make_mesh(2),
    )
    found = nnx.merge(graphdef, params, estimate(params, stats))
    for norm, mean, var in zip(
        (found.bn1, found.bn2), expected["means"], expected["vars"], strict=True
    ):
        np.testing.assert_allclose(norm.mean[...], mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(norm.var[...], var, rtol=2e-5)


class Flax(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, momentum=0.97, rngs=nnx.Rngs(0))
        self.other = nnx.BatchStat(jnp.float32(7))

    def __call__(self, x, *, train=False):
        return self.norm(self.conv(x), use_running_average=not train).mean((1, 2))


def test_statistics_of_flaxs_own_batch_norm_are_estimated_by_its_momentum():
    digits, network = data.load("digits"), Flax()
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    estimate = estimator_of(recipe(), digits)(graphdef)
    found = nnx.merge(graphdef, params, estimate(params, stats))
    images = digits.train.images[np.random.RandomState(0).permutation(len(digits.train))[:128]]
    values = network.conv(normalize(images, digits.mean, digits.std))
    np.testing.assert_allclose(found.norm.mean[...], values.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.norm.var[...], values.var((0, 1, 2)), rtol=1e-4)
    assert found.other[...] == 7


def test_corrupt_files_have_no_part_in_estimated_statistics(tmp_path):
    root = write_folder(tmp_path / "images", (3, 5), (1, 1))
    (root / "train" / wnid(0) / f"{wnid(0)}_0.JPEG").write_bytes(b"")
    part = FolderSource(root / "train")
    settings = recipe(data__source="folder", data__size=32, data__on_corrupt="skip").data
    (images,) = batch_statistics._batches(part, np.arange(8), settings, 8)
    assert images.shape == (8, 32, 32, 3)
    assert images.reshape(8, -1).any(-1).all()  # none is black


def test_the_first_batchs_unit_of_a_learned_step_is_not_estimated():
    settings = recipe(model__arch="shiftresnet8", model__activations="int8")
    network, digits = networks.random(settings.model, 10), data.load("digits")
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    estimate = estimator_of(settings, digits)(graphdef)
    before = checkpoint.to_arrays(params, stats)
    found = checkpoint.to_arrays(params, estimate(params, stats))
    units = [name for name in found if name.endswith(".unit")]
    assert units
    assert all(before[name] == found[name] > 0 for name in units)
    assert not np.allclose(before["bn1.mean"], found["bn1.mean"])


def estimator_of(settings, digits):
    """`make_estimator` but for the graphdef."""
    return lambda graphdef: make_estimator(
        graphdef,
        digits.train,
        settings.data,
        mean=digits.mean,
        std=digits.std,
        batch_size=128,
        batches=1,
        mesh=make_mesh(128),
    )


@pytest.mark.parametrize(
    ("arch", "activations"),
    [("shiftresnet8", "float"), ("shiftresnet8", "int8"), ("wrn8", "float")],
)
def test_a_packed_networks_batch_norms_get_their_statistics_back(arch, activations, tmp_path):
    settings = recipe(
        model__arch=arch,
        model__width=0.5 if arch == "wrn8" else 1.0,
        model__activations=activations,
    )
    network, digits = networks.random(settings.model, 10), data.load("digits")
    trained = checkpoint.to_arrays(*nnx.split(network, nnx.Param, nnx.BatchStat)[1:])
    packing.write(tmp_path / "net.safetensors", network, note(settings))
    packed, _ = packing.read(tmp_path / "net.safetensors")
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    before = networks.evaluate(packed, x)

    unfold(packed, networks.abstract(settings.model, 10), estimator_of(settings, digits))
    np.testing.assert_allclose(networks.evaluate(packed, x), before, rtol=1e-3, atol=1e-4)
    found = checkpoint.to_arrays(*nnx.split(packed, nnx.Param, nnx.BatchStat)[1:])
    assert found.keys() == trained.keys()
    assert all(found[name].shape == trained[name].shape for name in trained)
    inner = [name for name in found if arch == "wrn8" and name.endswith("bn0.var")]
    for name in inner:  # without scale and bias, the statistics are the old ones
        np.testing.assert_allclose(found[name], trained[name], rtol=1e-3)
    first = "bn1" if arch == "shiftresnet8" else "bn_last"
    assert not jax.numpy.allclose(found[f"{first}.mean"], trained[f"{first}.mean"])
