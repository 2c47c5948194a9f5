r"""A small ShiftResNet on the handwritten digits that come with the package: no download.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

ShiftResNet8 with expansion 3 (29,338 parameters), no flips: a mirrored digit is another sign. To
expect: at least 97 % of the test images right after a few minutes on two CPU cores.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "expansion=3") -> ConfigDict:
    config = shiftresnet(8, "digits", argument)
    config.epochs = 30
    config.batch_size = 64
    config.data.flip = False
    config.schedule.boundaries = (15, 24)
    return config
