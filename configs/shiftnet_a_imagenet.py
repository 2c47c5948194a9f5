r"""ShiftNet-A on ImageNet.

    python train.py --config configs/shiftnet_a_imagenet.py --workdir runs/shiftnet_a_imagenet

Reported (arXiv:1711.08141), top-1 / top-5: 70.1 / 89.7 %, with 4.1 million parameters. Not run here
yet, and trained there by a recipe that is not known. `:weights=s3` and `:weights=sign` leave
convolutions without multiplications between its first and last layer.
"""

from ml_collections import ConfigDict
from shiftnet_family import shiftnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftnet("shiftnet_a", argument)
