r"""ShiftResNet56 on CIFAR-100.

    python train.py --config configs/shiftresnet56_c100.py:expansion=3 \
        --workdir runs/shiftresnet56_3c_c100

    cell      argument     reported  parameters
    1c        expansion=1   63.20 %     107,956
    3c        expansion=3   69.77 %     300,404
    6c        expansion=6   72.33 %     589,076
    9c        expansion=9   73.43 %     877,748

The CIFAR-100 table of the original's page, model ResNet56, column "SRN Acc": top-1 on the test
set. Without an argument, expansion is 1. Parameters are for 100 classes, 90 x (64 + 1) more than
for 10. An older version of the page reports 65.21 % for 1c.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftresnet(56, "cifar100", argument)
