"""A recipe that trains in seconds: the digits, a network of one block, few images a step."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jax
from flax import nnx

from shiftnet import checkpoint, config, data, models
from shiftnet.layers import BatchNorm, Conv, Linear, convolve, rectifier
from shiftnet.models.network import Network
from shiftnet.models.shiftresnet import ShiftConvBlock
from shiftnet.quantizers import Form
from shiftnet.training import metrics
from tests import networks


class Small(Network):
    """A ShiftResNet of one block, which compiles in half the time of ShiftResNet8's three."""

    first_and_last = ("conv1", "linear")

    normalized_by: ClassVar = {"conv1": "bn1"}

    def __init__(
        self,
        depth: None,
        num_classes: int,
        *,
        ends: Form,
        dtype: Any,
        rngs: nnx.Rngs,
        expansion: float,
        shift: str,
        **layer: Any,
    ):
        del depth  # it has no other
        super().__init__(dtype)
        self.conv1 = Conv(3, 16, 3, weights=ends, rngs=rngs)
        self.bn1 = BatchNorm(16)
        self.relu = rectifier(16, activations=layer["activations"])
        middle = {"middle_features": int(16 * expansion), "shift": shift}
        block = ShiftConvBlock(16, 32, 2, **middle, rngs=rngs, **layer)
        self.layer1 = nnx.List([block])
        self.linear = Linear(32, num_classes, weights=ends, rngs=rngs)

    def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = convolve(self.conv1, self.bn1, x, self.relu, train=train)
        return self.linear(self.layer1[0](x, train=train).mean((1, 2)))


def known() -> AbstractContextManager[Any]:
    """Lets recipes name the network."""
    family = models.Family(Small, ("expansion", "shift"), example=None)
    return mock.patch.dict(models.FAMILIES, small=family)


def recipe(**overrides: Any):
    """The small network on the digits; overrides by dotted name, with `__` for the dot."""
    values = {
        "epochs": 2,
        "batch_size": 128,
        "model__arch": "small",
        "model__expansion": 1.0,
        "data__name": "digits",
        "data__flip": False,
        "data__pad": 2,
        "schedule__boundaries": (1,),
        "log__tensorboard": False,
        "log__every_seconds": 0.0,
    }
    recipe = config.default_config()
    for name, value in (values | overrides).items():
        group, _, last = name.rpartition("__")
        (recipe[group] if group else recipe)[last] = value
    config.validate(recipe)
    return recipe


def epochs(workdir: Path) -> list[dict[str, Any]]:
    """A run's `metrics.jsonl` without what depends on the clock."""
    clock = ("images_per_second", "time")
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics.read(workdir)]


def taught(place: Path) -> Path:
    """A checkpoint of a network with random numbers that knows the digits."""
    settings, names = recipe(), data.load("digits").class_names
    network = networks.random(settings.model, 10)
    arrays = checkpoint.to_arrays(*nnx.split(network, nnx.Param, nnx.BatchStat)[1:])
    metadata = {
        "config": config.to_json(settings),
        "class_names": list(names),
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
    }
    return checkpoint.write(place, arrays, metadata)
