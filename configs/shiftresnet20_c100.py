r"""ShiftResNet20 on CIFAR-100.

    python train.py --config configs/shiftresnet20_c100.py:expansion=3 \
        --workdir runs/shiftresnet20_3c_c100

    cell      argument     reported  parameters
    1c        expansion=1   55.05 %      40,756
    3c        expansion=3   65.83 %     101,492
    6c        expansion=6   69.73 %     192,596
    9c        expansion=9   70.77 %     283,700

The CIFAR-100 table of the original's page, model ResNet20, column "SRN Acc": top-1 on the test
set. Without an argument, expansion is 1. Parameters are for 100 classes, 90 x (64 + 1) more than
for 10. The page's text gives 70.77 % for expansion 3; its table, followed here, has that number at
9c.
"""

from ml_collections import ConfigDict
from shift_family import shiftresnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftresnet(20, "cifar100", argument)
