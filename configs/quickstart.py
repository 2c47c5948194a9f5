r"""A small ShiftResNet on the handwritten digits that come with the package: no download.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

ShiftResNet20 with expansion 1 (34,906 parameters), no flips: a mirrored digit is another sign. To
expect: at least 97 % of the test images right after a few minutes on two CPU cores.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "expansion=1") -> ConfigDict:
    config = shiftresnet(20, "digits", argument)
    config.epochs = 20
    config.batch_size = 64
    config.data.flip = False
    config.data.pad = 2
    config.schedule.boundaries = (12, 17)
    return config
