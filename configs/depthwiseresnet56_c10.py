r"""DepthwiseResNet56 on CIFAR-10.

    python train.py --config configs/depthwiseresnet56_c10.py:reduction=0.37 \
        --workdir runs/depthwiseresnet56_3c_c10

    cell      argument         reported  parameters
    c         reduction=1.12          -     101,017
    3c        reduction=0.37          -     294,283
    6c        reduction=0.19          -     569,270
    9c        reduction=0.124         -     871,085

The original's page has no CIFAR-10 numbers for this network; the cells are those of its CIFAR-100
table. Without an argument, reduction is 1.
"""

from ml_collections import ConfigDict
from shift_family import depthwiseresnet


def get_config(argument: str = "") -> ConfigDict:
    return depthwiseresnet(56, "cifar10", argument)
