r"""ResNet-18 with float weights on ImageNet: what low-bit weights are compared with.

    python train.py --config configs/resnet18_imagenet.py --workdir runs/resnet18_imagenet

Reported beside S3, top-1 / top-5: 69.6 / 89.2 %. Not run here yet. From a folder of image files in
place of TFDS: `--config.data.source=folder --config.data.dir=DIR`.
"""

from ml_collections import ConfigDict
from s3_family import imagenet


def get_config(argument: str = "") -> ConfigDict:
    return imagenet("imagenet_resnet18", "float", argument)
