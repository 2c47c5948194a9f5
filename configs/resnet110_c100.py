r"""ResNet110 on CIFAR-100.

    python train.py --config configs/resnet110_c100.py \
        --workdir runs/resnet110_c100

    cell      argument                             reported  parameters
    1c        reduction=7.8,reduction_mode=block    65.79 %     229,100
    3c        reduction=2.9,reduction_mode=block    70.22 %     603,356
    6c        reduction=1.5,reduction_mode=block    72.21 %   1,141,736
    9c        reduction=0.98,reduction_mode=block   72.67 %   1,757,048
    --        (none)                                72.11 %   1,736,564

The CIFAR-100 table of the original's page, model ResNet110, column "RN Conv Acc": top-1 on the
test set. Where the page gives a reduction in parentheses, that is the one used. Parameters are for
100 classes, 90 x (64 + 1) more than for 10.
"""

from ml_collections import ConfigDict
from shift_family import resnet


def get_config(argument: str = "") -> ConfigDict:
    return resnet(110, "cifar100", argument)
