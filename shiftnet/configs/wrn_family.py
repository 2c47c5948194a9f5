r"""Wide residual networks on CIFAR, with 1-bit weights and with float ones.

    python train.py --config configs/wrn20_10_1bit_c100.py
    python train.py --config configs/wrn20_10_1bit_c100.py:depth=26,width=4,cutout=18

The recipe is that of the code published with arXiv:1802.08530 in PyTorch: 256 epochs of batches of
128, SGD with momentum 0.9 and weight decay 5e-4 on every parameter, learning rate from 0.1 to 1e-4
along a cosine with warm restarts at epochs 2, 4, 8, … 128, random crop after reflecting 4 pixels,
random flip, and one mean and standard deviation for both CIFARs. The schedule is the one intended:
what that code gave depended on PyTorch's version.

Reported accuracies are in `results/table.toml`. WRN-20-10 has 26.8 million weights, 3.5 MiB in one
bit each; training it on the whole schedule needs an accelerator. `recipe=short` takes 30 epochs,
see `CIFAR_RECIPES` in `shiftnet/config.py`.
"""

from shiftnet.config import CIFAR_RECIPES, Config, apply_argument, default_config
from shiftnet.data.cifar import WRN_NORMALIZATION

FIELDS = {
    "data": "data.name",
    "weights": "model.weights",
    "depth": "model.arch",
    "width": "model.width",
    "cutout": "data.cutout",
}


def get_config(argument: str = "") -> Config:
    config = default_config()
    config.epochs = 256
    config.model.arch = "20"  # the depth alone, until `depth` has been read
    config.model.width = 10.0
    config.data.pad_mode = "reflect"
    config.data.mean, config.data.std = WRN_NORMALIZATION
    config.schedule.name = "sgdr"
    config.schedule.boundaries = (2, 4, 8, 16, 32, 64, 128)
    config.schedule.lr_min = 1e-4
    apply_argument(config, argument, FIELDS, CIFAR_RECIPES)
    config.model.arch = f"wrn{config.model.arch}"
    return config
