"""The builder of ShiftNets on ImageNet.

The paper's own training code was never published. The recipe is PyTorch's ImageNet example of that
time: 90 epochs of batches of 256, SGD with momentum 0.9 and weight decay 1e-4, learning rate 0.1,
times 0.1 at epochs 30 and 60, crops and flips as for ResNets.
"""

from ml_collections import ConfigDict

from shiftnet.config import apply_argument, default_config


def shiftnet(arch: str, argument: str) -> ConfigDict:
    """ShiftNet-A or -B; `argument` may set `weights` and `weight_bits`."""
    config = default_config()
    config.epochs = 90
    config.batch_size = 256
    config.model.arch = arch
    config.optimizer.weight_decay = 1e-4
    config.schedule.boundaries = (30, 60)
    config.data.name = "imagenet2012"
    fields = {"weights": "model.weights", "weight_bits": "model.weight_bits"}
    apply_argument(config, argument, fields)
    return config
