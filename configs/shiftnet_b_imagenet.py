r"""ShiftNet-B on ImageNet.

    python train.py --config configs/shiftnet_b_imagenet.py --workdir runs/shiftnet_b_imagenet

Reported (arXiv:1711.08141), top-1 / top-5: 61.2 / 83.6 %, with 1.1 million parameters. Not run here
yet, and trained there by a recipe that is not known. `:weights=s3` and `:weights=sign` leave
convolutions without multiplications between its first and last layer.
"""

from ml_collections import ConfigDict
from shiftnet_family import shiftnet


def get_config(argument: str = "") -> ConfigDict:
    return shiftnet("shiftnet_b", argument)
