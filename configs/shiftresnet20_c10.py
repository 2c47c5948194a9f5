r"""ShiftResNet20 on CIFAR-10.

    python train.py --config configs/shiftresnet20_c10.py:expansion=3 \
        --workdir runs/shiftresnet20_3c_c10

    cell      argument     reported  parameters
    c         expansion=1   85.78 %      34,906
    3c        expansion=3   89.56 %      95,642
    6c        expansion=6   91.07 %     186,746
    9c        expansion=9   91.79 %     277,850

The CIFAR-10 table of the original's page, model ResNet20, column "ShiftResNet Acc": top-1 on the
test set. Without an argument, expansion is 1. An older version of the page reports 86.66, 90.08,
90.59 and 91.69 % instead.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftresnet(20, "cifar10", argument)
