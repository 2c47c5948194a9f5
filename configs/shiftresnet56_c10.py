r"""ShiftResNet56 on CIFAR-10.

    python train.py --config configs/shiftresnet56_c10.py:expansion=3 \
        --workdir runs/shiftresnet56_3c_c10

    cell      argument     reported  parameters
    c         expansion=1   89.69 %     102,106
    3c        expansion=3   92.48 %     294,554
    6c        expansion=6   93.49 %     583,226
    9c        expansion=9   93.17 %     871,898

The CIFAR-10 table of the original's page, model ResNet56, column "ShiftResNet Acc": top-1 on the
test set. Without an argument, expansion is 1. An older version of the page reports 89.71, 92.11,
92.69 and 92.74 % instead.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftresnet(56, "cifar10", argument)
