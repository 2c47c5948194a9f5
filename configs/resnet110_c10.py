r"""ResNet110 on CIFAR-10.

    python train.py --config configs/resnet110_c10.py \
        --workdir runs/resnet110_c10

    cell      argument                             reported  parameters
    c         reduction=7.8,reduction_mode=block    89.79 %     223,250
    3c        reduction=2.9,reduction_mode=block    93.18 %     597,506
    6c        reduction=1.5,reduction_mode=block    93.40 %   1,135,886
    9c        reduction=0.95,reduction_mode=block   94.09 %   1,802,426
    original  (none)                                92.46 %   1,730,714

The CIFAR-10 table of the original's page, model ResNet110, column "ResNet Acc": top-1 on the test
set. Where the page gives a reduction in parentheses, that is the one used.
"""

from ml_collections import ConfigDict
from shift_family import resnet


def get_config(argument: str = "") -> ConfigDict:
    return resnet(110, "cifar10", argument)
