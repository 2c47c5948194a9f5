r"""WRN-20-10 with float weights on CIFAR-100: what the 1-bit weights are compared with.

    python train.py --config configs/wrn20_10_c100.py --workdir runs/wrn20_10_c100

Reported: 80.5 ± 0.24 % (5 runs; the page of the PyTorch code). An accelerator is needed for the
whole of it.

`:depth=26` (any 6n + 2), `:width=4` and `:cutout=18` change the network and the augmentation;
they combine, `:depth=26,cutout=18`.
"""

from ml_collections import ConfigDict
from wrn_family import wrn


def get_config(argument: str = "") -> ConfigDict:
    return wrn("cifar100", "float", argument)
