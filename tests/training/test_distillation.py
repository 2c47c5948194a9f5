"""A teacher knows the classes by name, and sees the images as it was trained to."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from shiftnet import checkpoint, packing
from shiftnet.config import to_json
from shiftnet.errors import UserError
from shiftnet.training import trained
from shiftnet.training.distillation import Teacher
from shiftnet.training.mesh import make_mesh
from tests import networks
from tests.test_packing import note
from tests.training.small import recipe

CLASSES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module", params=["checkpoint", "packed"])
def given(request, tmp_path_factory):
    """A network with 3-bit weights, and where it is saved."""
    place = tmp_path_factory.mktemp("teacher") / "net.safetensors"
    config = recipe(model__weights="s3")
    network = networks.random(config.model, 10)
    if request.param == "checkpoint":
        place = place.with_suffix("")
        arrays = checkpoint.to_arrays(*nnx.split(network, nnx.Param, nnx.BatchStat)[1:])
        checkpoint.write(place, arrays, note(config))
    else:
        packing.write(place, nnx.clone(network), note(config))
    return network, place


def test_its_logits_are_those_of_the_pupils_classes_on_the_pupils_images(given):
    network, place = given
    teacher = Teacher.of(trained.read(place, "distill.teacher"), CLASSES[7:1:-1], "shiftresnet8")
    pixels = np.random.default_rng(0).uniform(size=(4, 3, 16, 16)).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (teacher.mean, teacher.std))
    expected = networks.evaluate(network, (pixels - mean) / std)[:, 7:1:-1]
    given_images = np.moveaxis((pixels - 0.5) / 0.25, 1, -1)
    arrays = teacher.on(make_mesh(4))
    run = jax.jit(lambda arrays, x: teacher.logits(arrays, x, (0.5,) * 3, (0.25,) * 3))
    np.testing.assert_allclose(run(arrays, given_images), expected, rtol=2e-3, atol=2e-4)


def test_a_teacher_that_lacks_a_class_is_refused(given):
    with pytest.raises(UserError, match=r"does not know 1 of the 3 classes, such as 'zebra'"):
        Teacher.of(
            trained.read(given[1], "distill.teacher"), [*CLASSES[:2], "zebra"], "shiftresnet8"
        )


def test_another_network_of_the_users_own_is_no_teacher(given):
    found = trained.read(given[1], "distill.teacher")
    settings = recipe(model__weights="s3", model__arch="net.py:Net")
    found = dataclasses.replace(found, metadata={**found.metadata, "config": to_json(settings)})
    with pytest.raises(UserError, match=r"is net\.py:Net, whose code is run only where that"):
        Teacher.of(found, CLASSES, "shiftresnet8")
