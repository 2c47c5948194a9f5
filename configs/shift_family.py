"""The builders of the shift family on CIFAR: ShiftResNet, and the ResNets it is compared with.

The recipe is `default_config()`, that of the code published with arXiv:1711.08141: 164 epochs of
batches of 128, SGD with momentum 0.9 and weight decay 5e-4 on every parameter, learning rate 0.1,
times 0.1 at epochs 82 and 123, random crop after zero padding by 4, random flip. The named files
beside this one differ in the network and the data set alone; all of them take `weights` and
`weight_bits` as arguments too, for networks that were never published. The accuracy that they quote
as reported is the best test accuracy of any epoch, as that code keeps it.
"""

from ml_collections import ConfigDict

from shiftnet.config import apply_argument, default_config


def shiftresnet(depth: int, dataset: str, argument: str) -> ConfigDict:
    """ShiftResNet of that depth; `argument` may set `expansion`."""
    return _recipe(f"shiftresnet{depth}", dataset, argument, "expansion")


def resnet(depth: int, dataset: str, argument: str) -> ConfigDict:
    """ResNet of that depth; `argument` may set `reduction` and `reduction_mode`."""
    return _recipe(f"resnet{depth}", dataset, argument, "reduction", "reduction_mode")


def depthwiseresnet(depth: int, dataset: str, argument: str) -> ConfigDict:
    """DepthwiseResNet of that depth; `argument` may set `reduction`, of mode `block`."""
    config = _recipe(f"depthwiseresnet{depth}", dataset, argument, "reduction")
    config.model.reduction_mode = "block"  # the only mode the original has for it
    return config


def _recipe(arch: str, dataset: str, argument: str, *model_fields: str) -> ConfigDict:
    config = default_config()
    config.model.arch = arch
    config.data.name = dataset
    names = (*model_fields, "weights", "weight_bits")
    apply_argument(config, argument, {name: f"model.{name}" for name in names})
    return config
