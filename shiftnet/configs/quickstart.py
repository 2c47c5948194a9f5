r"""A small ShiftResNet on the handwritten digits that come with the package: no download.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

ShiftResNet20 with expansion 1 (34,906 parameters). Expect at least 97 % of the test images to be
right, after a few minutes on two CPU cores. This is also an example for recipes of your own.
"""

from shiftnet.config import Config, apply_argument, default_config


def get_config(argument: str = "") -> Config:
    config = default_config()
    config.epochs = 20
    config.batch_size = 64
    config.model.arch = "shiftresnet20"
    config.data.name = "digits"
    config.data.flip = False  # a mirrored digit is another sign
    config.data.pad = 2
    config.schedule.boundaries = (12, 17)
    names = ("expansion", "weights", "weight_bits")
    apply_argument(config, argument, {name: f"model.{name}" for name in names})
    return config
