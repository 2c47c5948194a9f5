r"""ResNet-50 with float weights on ImageNet: what low-bit weights are compared with.

    python train.py --config configs/resnet50_imagenet.py --workdir runs/resnet50_imagenet

Reported beside S3, top-1 / top-5: 76.00 / 93.00 %. Not run here yet. From a folder of image files
in place of TFDS: `--config.data.source=folder --config.data.dir=DIR`.
"""

from ml_collections import ConfigDict
from s3_family import imagenet


def get_config(argument: str = "") -> ConfigDict:
    return imagenet("imagenet_resnet50", "float", argument)
