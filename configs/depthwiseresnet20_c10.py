r"""DepthwiseResNet20 on CIFAR-10.

    python train.py --config configs/depthwiseresnet20_c10.py:reduction=0.38 \
        --workdir runs/depthwiseresnet20_3c_c10

    cell      argument         reported  parameters
    c         reduction=1.12          -      34,735
    3c        reduction=0.38          -      93,956
    6c        reduction=0.19          -     183,374
    9c        reduction=0.125         -     277,050

The original's page has no CIFAR-10 numbers for this network; the cells are those of its CIFAR-100
table. Without an argument, reduction is 1.
"""

from ml_collections import ConfigDict
from shift_family import depthwiseresnet


def get_config(argument: str = "") -> ConfigDict:
    return depthwiseresnet(20, "cifar10", argument)
