"""A recipe that trains in seconds: the digits, the smallest network, few images a step."""

from typing import Any

from shiftnet import config


def recipe(**overrides: Any):
    """ShiftResNet8 on the digits; overrides by dotted name, with `__` for the dot."""
    values = {
        "epochs": 2,
        "batch_size": 128,
        "model__arch": "shiftresnet8",
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
