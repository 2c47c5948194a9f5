r"""Networks with S3 and DenseShift weights on ImageNet and CIFAR, and their float counterparts.

    python train.py --config configs/s3_resnet18_imagenet.py --config.data.dir=DIR
    python train.py --config configs/s3_resnet20_c100.py:weights=denseshift,weight_bits=4

The recipe is that of the code published with S3 (NeurIPS 2021): 200 epochs of batches of 256, SGD
with momentum 0.9 and weight decay 1e-4 on every parameter and latent, learning rate from 0.1 to 0
along a cosine, epoch by epoch, and S3's regularizer times 1e-5. On ImageNet the images are cropped
at random to 224 x 224 and mirrored in training, resized to 256 and cropped from the center in
evaluation; `--config.data.source=folder` reads a folder of image files instead of TFDS. For CIFAR
that code has no recipe; ours takes ImageNet's optimizer and schedule, and CIFAR's crops, and
`recipe=short` 30 epochs, see `CIFAR_RECIPES` in `shiftnet/config.py`.

Reported for ImageNet, top-1 / top-5 in per cent; none of it has been trained here yet:

    s3_resnet18_imagenet            69.83 / 89.23 (paper), 69.508 / 88.968 (released checkpoint)
    s3_resnet50_imagenet            75.75 / 92.80 (paper), 75.748 / 92.800 (released checkpoint)
    denseshift_resnet18_imagenet    none
    resnet18_imagenet               69.6 / 89.2 (beside S3)
    resnet50_imagenet               76.00 / 93.00 (beside S3)
"""

from shiftnet.config import CIFAR_RECIPES, Config, apply_argument, default_config

FIELDS = {
    "arch": "model.arch",
    "data": "data.name",
    "weights": "model.weights",
    "weight_bits": "model.weight_bits",
}


def get_config(argument: str = "") -> Config:
    config = default_config()
    config.epochs = 200
    config.batch_size = 256
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    apply_argument(config, argument, FIELDS, CIFAR_RECIPES)
    return config
