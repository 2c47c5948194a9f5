r"""ShiftResNet on CIFAR, and the ResNet and DepthwiseResNet that it is compared with.

    python train.py --config configs/shiftresnet20_c100.py:expansion=3

The recipe is `default_config()`, that of the code published with arXiv:1711.08141: 164 epochs of
batches of 128, SGD with momentum 0.9 and weight decay 5e-4 on every parameter, learning rate 0.1,
times 0.1 at epochs 82 and 123, random crop after zero padding by 4, random flip.

`configs/{shiftresnet,resnet,depthwiseresnet}{20,56,110}_{c10,c100}.py` are the networks of that
code's page. Its rows, by the size of the shift network's middle channels, are these arguments:

    row   shiftresnet   resnet (with reduction_mode=block)   depthwiseresnet
                        20       56       110                20       56       110
    1c    expansion=1   reduction=7.2  7.6  7.8              reduction=1.12   1.12   1.1
    3c    expansion=3             2.8  2.9  2.9                        0.38   0.37   0.37
    6c    expansion=6             1.5  1.5  1.5                        0.19   0.19   0.19
    9c    expansion=9             0.98 0.98 0.98                       0.125  0.124  0.123

ResNet110's row 9c on CIFAR-10 has reduction 0.95. Where the page gives a second reduction in
parentheses, that is the one used. Expansion and reduction are 1 without an argument, which for
ResNet is the page's last row. `weights` and `weight_bits` give any of them low-bit weights.

`results/table.toml` has the accuracy that the page reports for each row (the best test accuracy of
any epoch), parameters and multiply-adds; `docs/results.md` shows them. The page has no CIFAR-10
numbers for DepthwiseResNet.

`recipe=short` trains any of them in 30 epochs, see `CIFAR_RECIPES` in `shiftnet/config.py`:

    python train.py --config configs/shiftresnet20_c100.py:recipe=short
"""

from shiftnet.config import CIFAR_RECIPES, Config, apply_argument, default_config

MODEL = ("arch", "expansion", "reduction", "reduction_mode", "weights", "weight_bits")


def get_config(argument: str = "") -> Config:
    config = default_config()
    fields = {name: f"model.{name}" for name in MODEL}
    apply_argument(config, argument, fields | {"data": "data.name"}, CIFAR_RECIPES)
    if config.model.arch.startswith("depthwiseresnet"):
        config.model.reduction_mode = "block"  # the only mode that the original has for it
    return config
