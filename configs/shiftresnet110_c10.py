r"""ShiftResNet110 on CIFAR-10.

    python train.py --config configs/shiftresnet110_c10.py:expansion=3 \
        --workdir runs/shiftresnet110_3c_c10

    cell      argument     reported  parameters
    c         expansion=1   90.67 %     202,906
    3c        expansion=3   92.42 %     592,922
    6c        expansion=6   93.03 %   1,177,946
    9c        expansion=9   93.36 %   1,762,970

The CIFAR-10 table of the original's page, model ResNet110, column "ShiftResNet Acc": top-1 on the
test set. Without an argument, expansion is 1. An older version of the page reports 90.34, 91.98,
93.17 and 92.76 % instead.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftresnet(110, "cifar10", argument)
