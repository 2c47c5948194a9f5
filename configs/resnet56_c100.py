r"""ResNet56 on CIFAR-100.

    python train.py --config configs/resnet56_c100.py \
        --workdir runs/resnet56_c100

    cell      argument                             reported  parameters
    1c        reduction=7.6,reduction_mode=block    58.70 %     117,968
    3c        reduction=2.9,reduction_mode=block    66.89 %     302,576
    6c        reduction=1.5,reduction_mode=block    70.49 %     568,166
    9c        reduction=0.98,reduction_mode=block   71.57 %     871,718
    --        (none)                                69.27 %     861,620

The CIFAR-100 table of the original's page, model ResNet56, column "RN Conv Acc": top-1 on the test
set. Where the page gives a reduction in parentheses, that is the one used. Parameters are for 100
classes, 90 x (64 + 1) more than for 10.
"""

from ml_collections import ConfigDict
from shift_family import resnet


def get_config(argument: str = "") -> ConfigDict:
    return resnet(56, "cifar100", argument)
