r"""ResNet20 on CIFAR-100.

    python train.py --config configs/resnet20_c100.py \
        --workdir runs/resnet20_c100

    cell      argument                             reported  parameters
    1c        reduction=7.2,reduction_mode=block    50.23 %      43,880
    3c        reduction=2.8,reduction_mode=block    60.72 %     102,056
    6c        reduction=1.5,reduction_mode=block    65.59 %     185,786
    9c        reduction=0.98,reduction_mode=block   68.30 %     281,498
    --        (none)                                66.25 %     278,324

The CIFAR-100 table of the original's page, model ResNet20, column "RN Conv Acc": top-1 on the test
set. Where the page gives a reduction in parentheses, that is the one used. Parameters are for 100
classes, 90 x (64 + 1) more than for 10. The page's text gives 68.30 % for reduction 2.8; its
table, followed here, has that number at 9c.
"""

from ml_collections import ConfigDict
from shift_family import resnet


def get_config(argument: str = "") -> ConfigDict:
    return resnet(20, "cifar100", argument)
