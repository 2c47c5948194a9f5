r"""ResNet20 on CIFAR-10.

    python train.py --config configs/resnet20_c10.py \
        --workdir runs/resnet20_c10

    cell      argument                             reported  parameters
    c         reduction=7.2,reduction_mode=block    84.77 %      38,030
    3c        reduction=2.8,reduction_mode=block    88.81 %      96,206
    6c        reduction=1.5,reduction_mode=block    91.30 %     179,936
    9c        reduction=0.98,reduction_mode=block   91.96 %     275,648
    original  (none)                                91.35 %     272,474

The CIFAR-10 table of the original's page, model ResNet20, column "ResNet Acc": top-1 on the test
set. Where the page gives a reduction in parentheses, that is the one used.
"""

from ml_collections import ConfigDict
from shift_family import resnet


def get_config(argument: str = "") -> ConfigDict:
    return resnet(20, "cifar10", argument)
