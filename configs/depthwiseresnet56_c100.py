r"""DepthwiseResNet56 on CIFAR-100.

    python train.py --config configs/depthwiseresnet56_c100.py:reduction=0.37 \
        --workdir runs/depthwiseresnet56_3c_c100

    cell      argument         reported  parameters
    1c        reduction=1.12    65.30 %     106,867
    3c        reduction=0.37    66.49 %     300,133
    6c        reduction=0.19    67.46 %     575,120
    9c        reduction=0.124   67.75 %     876,935

The CIFAR-100 table of the original's page, model ResNet56, column "RN Depth Acc": top-1 on the
test set. Without an argument, reduction is 1. Parameters are for 100 classes, 90 x (64 + 1) more
than for 10.
"""

from ml_collections import ConfigDict
from shift_family import depthwiseresnet


def get_config(argument: str = "") -> ConfigDict:
    return depthwiseresnet(56, "cifar100", argument)
