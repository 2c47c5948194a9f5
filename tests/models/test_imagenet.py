"""ImageNet ResNets, latent and deployed, give the originals' logits for weights by recipe."""

import json

import numpy as np
import pytest
from flax import nnx

from shiftnet.interchange import torch_names
from tests import networks, oracle
from tests.models.test_build import config


def weights_by_recipe(kind: str, names: list, seed: int) -> dict[str, np.ndarray]:
    """Weights that were not stored, drawn as the case's `recipe` says, in float32."""
    draw = np.random.RandomState(seed)
    shapes = {name.removeprefix("module."): shape for name, shape in names}
    arrays: dict[str, np.ndarray] = {}
    variance = 1.0  # of what the convolution before gives, about
    for name, shape in shapes.items():
        if name.endswith(("weight_sign", "num_batches_tracked")):
            continue
        if len(shape) == 4 and (kind == "latent" or name == "conv1.weight"):
            fan_in, fan_out = np.prod(shape[1:]), np.prod(shape[2:]) * shape[0]
            value = draw.standard_normal(shape) * np.sqrt(2 / fan_out)
            if name.endswith(".weight"):
                variance = 2.75 * fan_in if f"{name}_val" in shapes else 2 * fan_in / fan_out
        elif len(shape) == 4:
            value = np.array([-4, -2, -1, 0, 1, 2, 4])[draw.randint(0, 7, size=shape)]
            variance = 6 * np.prod(shape[1:])
        elif len(shape) == 2:
            value = draw.standard_normal(shape) / np.sqrt(shape[1])
        elif name.endswith("running_mean"):
            value = 0.1 * draw.standard_normal(shape) * np.sqrt(variance)
        elif name.endswith("running_var"):
            value = variance * (0.75 + 0.5 * draw.random_sample(shape))
        elif name.endswith("weight"):
            value = 1 + 0.1 * draw.standard_normal(shape)
        else:
            value = 0.1 * draw.standard_normal(shape)
        arrays[name] = value.astype(np.float32)
    return arrays


@oracle.every_case("img", slow=["s3_resnet18_latents"])
@pytest.mark.usefixtures("float64")
def test_imagenet_resnets_give_the_originals_logits(name):
    case = oracle.case("img", name)
    hyper = case.hyper
    listed = json.loads((oracle.FOLDER / hyper["names_file"]).read_text())
    arrays = weights_by_recipe(hyper["kind"], listed["names"], hyper["seed"])
    for key, expected in listed["check_first_tensors"].items():
        key = key.removeprefix("module.")
        if key in arrays:
            np.testing.assert_allclose(oracle.summary(arrays[key]), expected, rtol=1e-6, atol=1e-6)

    depth = "50" if "50" in name else "18"
    form = "s3" if hyper["kind"] == "latent" else "float"
    model = networks.abstract(config(f"imagenet_resnet{depth}", weights=form), 1000)
    wide = {key: value.astype(np.float64) for key, value in arrays.items()}
    torch_names.from_torch(model, wide, torch_names.TORCHVISION)
    assert isinstance(model, nnx.Module)
    x = np.random.RandomState(hyper["seed"] + 1).standard_normal((1, 3, 224, 224))
    logits = networks.evaluate(model, x.astype(np.float32).astype(np.float64))
    oracle.assert_near({"logits": logits}, {"logits": case.arrays["eval/logits"]}, 1e-11)
