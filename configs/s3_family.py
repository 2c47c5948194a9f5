"""The builders of networks with S3 and DenseShift weights, and of their float twins.

The recipe is that of the code published with S3 (NeurIPS 2021): 200 epochs of batches of 256, SGD
with momentum 0.9 and weight decay 1e-4 on every parameter and latent, learning rate from 0.1 to 0
along a cosine, epoch by epoch, and S3's regulariser times 1e-5. On ImageNet the images are cut at
random to 224 x 224 and mirrored in training, resized to 256 and cut from the middle in evaluation.
"""

from ml_collections import ConfigDict

from shiftnet.config import apply_argument, default_config


def imagenet(arch: str, weights: str, argument: str) -> ConfigDict:
    """A network on ImageNet; `argument` may set `weight_bits`."""
    config = _recipe(arch, weights)
    config.data.name = "imagenet2012"
    apply_argument(config, argument, {"weight_bits": "model.weight_bits"})
    return config


def cifar(arch: str, dataset: str, argument: str) -> ConfigDict:
    """A network on CIFAR, with its crops; `argument` may set `weights` and `weight_bits`.

    S3's code names no recipe for CIFAR; this takes ImageNet's optimiser and schedule.
    """
    config = _recipe(arch, "s3")
    config.data.name = dataset
    fields = {"weights": "model.weights", "weight_bits": "model.weight_bits"}
    apply_argument(config, argument, fields)
    return config


def _recipe(arch: str, weights: str) -> ConfigDict:
    config = default_config()
    config.epochs = 200
    config.batch_size = 256
    config.model.arch = arch
    config.model.weights = weights
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    return config
