r"""ResNet-50 with 3-bit S3 weights on ImageNet.

    python train.py --config configs/s3_resnet50_imagenet.py --workdir runs/s3_resnet50_imagenet

Reported, top-1 / top-5: 75.75 / 92.80 % (paper), 75.748 / 92.800 % (released checkpoint). Not run
here yet.

`:weight_bits=2` and `:weight_bits=4` take other widths. From a folder of image files in place of
TFDS: `--config.data.source=folder --config.data.dir=DIR`.
"""

from ml_collections import ConfigDict
from s3_family import imagenet


def get_config(argument: str = "") -> ConfigDict:
    return imagenet("imagenet_resnet50", "s3", argument)
