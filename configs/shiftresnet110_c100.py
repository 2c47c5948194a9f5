r"""ShiftResNet110 on CIFAR-100.

    python train.py --config configs/shiftresnet110_c100.py:expansion=3 \
        --workdir runs/shiftresnet110_3c_c100

    cell      argument     reported  parameters
    1c        expansion=1   68.01 %     208,756
    3c        expansion=3   72.10 %     598,772
    6c        expansion=6   73.17 %   1,183,796
    9c        expansion=9   73.71 %   1,768,820

The CIFAR-100 table of the original's page, model ResNet110, column "SRN Acc": top-1 on the test
set. Without an argument, expansion is 1. Parameters are for 100 classes, 90 x (64 + 1) more than
for 10. An older version of the page reports 67.84 % for 1c and 71.83 % for 3c.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftresnet(110, "cifar100", argument)
