r"""WRN-20-10 with 1-bit weights on CIFAR-10.

    python train.py --config configs/wrn20_10_1bit_c10.py --workdir runs/wrn20_10_1bit_c10

Reported: 95.28 % (arXiv:1802.08530), and 96.08 % with cutout. WRN-26-10: 95.54 %. An accelerator
is needed for the whole of it.

`:depth=26` (any 6n + 2), `:width=4` and `:cutout=18` change the network and the augmentation;
they combine, `:depth=26,cutout=18`.
"""

from ml_collections import ConfigDict
from wrn_family import wrn


def get_config(argument: str = "") -> ConfigDict:
    return wrn("cifar10", "sign", argument)
