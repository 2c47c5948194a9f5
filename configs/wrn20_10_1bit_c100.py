r"""WRN-20-10 with 1-bit weights on CIFAR-100: 26.8 million weights in 3.5 MiB.

    python train.py --config configs/wrn20_10_1bit_c100.py --workdir runs/wrn20_10_1bit_c100

Reported: 80.0 ± 0.26 % (5 runs; the page of the PyTorch code), 80.65 % (arXiv:1802.08530), and
81.49 % with cutout. WRN-26-10: 81.06 %. An accelerator is needed for the whole of it.

`:depth=26` (any 6n + 2), `:width=4` and `:cutout=18` change the network and the augmentation;
they combine, `:depth=26,cutout=18`.
"""

from ml_collections import ConfigDict
from wrn_family import wrn


def get_config(argument: str = "") -> ConfigDict:
    return wrn("cifar100", "sign", argument)
