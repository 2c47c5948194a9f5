r"""ResNet20 with 3-bit S3 weights on CIFAR-10.

    python train.py --config configs/s3_resnet20_c10.py --workdir runs/s3_resnet20_c10

`:weight_bits=2`, `:weights=denseshift` and `:weights=float` take other weights; they combine,
`:weights=denseshift,weight_bits=4`. No accuracy is reported for this network by S3's page.
"""

from ml_collections import ConfigDict
from s3_family import cifar


def get_config(argument: str = "") -> ConfigDict:
    return cifar("resnet20", "cifar10", argument)
