r"""DepthwiseResNet20 on CIFAR-100.

    python train.py --config configs/depthwiseresnet20_c100.py:reduction=0.38 \
        --workdir runs/depthwiseresnet20_3c_c100

    cell      argument         reported  parameters
    1c        reduction=1.12    61.32 %      40,585
    3c        reduction=0.38    64.51 %      99,806
    6c        reduction=0.19    65.38 %     189,224
    9c        reduction=0.125   65.59 %     282,900

The CIFAR-100 table of the original's page, model ResNet20, column "RN Depth Acc": top-1 on the
test set. Without an argument, reduction is 1. Parameters are for 100 classes, 90 x (64 + 1) more
than for 10.
"""

from ml_collections import ConfigDict
from shift_family import depthwiseresnet


def get_config(argument: str = "") -> ConfigDict:
    return depthwiseresnet(20, "cifar100", argument)
