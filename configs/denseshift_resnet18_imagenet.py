r"""ResNet-18 with 3-bit DenseShift weights on ImageNet.

    python train.py --config configs/denseshift_resnet18_imagenet.py \
        --workdir runs/denseshift_resnet18_imagenet

No accuracy of this recipe is known here: the page of the published code has none. Not run here yet.

`:weight_bits=2` and `:weight_bits=4` take other widths. From a folder of image files in place of
TFDS: `--config.data.source=folder --config.data.dir=DIR`.
"""

from ml_collections import ConfigDict
from s3_family import imagenet


def get_config(argument: str = "") -> ConfigDict:
    return imagenet("imagenet_resnet18", "denseshift", argument)
