r"""DepthwiseResNet110 on CIFAR-10.

    python train.py --config configs/depthwiseresnet110_c10.py:reduction=0.37 \
        --workdir runs/depthwiseresnet110_3c_c10

    cell      argument         reported  parameters
    c         reduction=1.1           -     204,316
    3c        reduction=0.37          -     591,580
    6c        reduction=0.19          -   1,148,114
    9c        reduction=0.123         -   1,772,518

The original's page has no CIFAR-10 numbers for this network; the cells are those of its CIFAR-100
table. Without an argument, reduction is 1.
"""

from ml_collections import ConfigDict
from shift_family import depthwiseresnet


def get_config(argument: str = "") -> ConfigDict:
    return depthwiseresnet(110, "cifar10", argument)
