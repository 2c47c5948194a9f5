"""The builders of wide residual networks on CIFAR, with weights of one bit and with float ones.

The recipe is that of the code published with arXiv:1802.08530 in PyTorch: 256 epochs of batches of
128, SGD with momentum 0.9 and weight decay 5e-4 on every parameter, learning rate from 0.1 to 1e-4
along a cosine with warm restarts at epochs 2, 4, 8, … 128, random crop after reflecting 4 pixels,
random flip, and one mean and standard deviation for both CIFARs. The schedule is the one intended:
what that code gave depended on PyTorch's version.
"""

from ml_collections import ConfigDict

from shiftnet.config import apply_argument, default_config
from shiftnet.data.cifar import WRN_NORMALIZATION


def wrn(dataset: str, weights: str, argument: str) -> ConfigDict:
    """WRN-20-10; `argument` may set `depth`, `width` and `cutout`."""
    config = default_config()
    config.epochs = 256
    config.model.arch = "20"
    config.model.width = 10.0
    config.model.weights = weights
    config.data.name = dataset
    config.data.pad_mode = "reflect"
    config.data.mean, config.data.std = WRN_NORMALIZATION
    config.schedule.name = "sgdr"
    config.schedule.boundaries = (2, 4, 8, 16, 32, 64, 128)
    config.schedule.lr_min = 1e-4
    fields = {"depth": "model.arch", "width": "model.width", "cutout": "data.cutout"}
    apply_argument(config, argument, fields)
    config.model.arch = f"wrn{config.model.arch}"
    return config
