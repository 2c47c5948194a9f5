"""A recipe that trains in seconds: the digits, the smallest network, few images a step."""

from pathlib import Path
from typing import Any

from flax import nnx

from shiftnet import checkpoint, config, data
from shiftnet.training import metrics
from tests import networks


def recipe(**overrides: Any):
    """ShiftResNet8 on the digits; overrides by dotted name, with `__` for the dot."""
    values = {
        "epochs": 2,
        "batch_size": 128,
        "model__arch": "shiftresnet8",
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
