r"""ResNet56 on CIFAR-10.

    python train.py --config configs/resnet56_c10.py \
        --workdir runs/resnet56_c10

    cell      argument                             reported  parameters
    c         reduction=7.6,reduction_mode=block    88.32 %     112,118
    3c        reduction=2.9,reduction_mode=block    91.20 %     296,726
    6c        reduction=1.5,reduction_mode=block    93.01 %     562,316
    9c        reduction=0.98,reduction_mode=block   93.74 %     865,868
    original  (none)                                92.01 %     855,770

The CIFAR-10 table of the original's page, model ResNet56, column "ResNet Acc": top-1 on the test
set. Where the page gives a reduction in parentheses, that is the one used.
"""

from ml_collections import ConfigDict
from shift_family import resnet


def get_config(argument: str = "") -> ConfigDict:
    return resnet(56, "cifar10", argument)
