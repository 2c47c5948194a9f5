r"""DepthwiseResNet110 on CIFAR-100.

    python train.py --config configs/depthwiseresnet110_c100.py:reduction=0.37 \
        --workdir runs/depthwiseresnet110_3c_c100

    cell      argument         reported  parameters
    1c        reduction=1.1     65.80 %     210,166
    3c        reduction=0.37    67.22 %     597,430
    6c        reduction=0.19    68.11 %   1,153,964
    9c        reduction=0.123   68.39 %   1,778,368

The CIFAR-100 table of the original's page, model ResNet110, column "RN Depth Acc": top-1 on the
test set. Without an argument, reduction is 1. Parameters are for 100 classes, 90 x (64 + 1) more
than for 10.
"""

from ml_collections import ConfigDict
from shift_family import depthwiseresnet


def get_config(argument: str = "") -> ConfigDict:
    return depthwiseresnet(110, "cifar100", argument)
