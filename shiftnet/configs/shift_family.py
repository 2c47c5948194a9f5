r"""ShiftResNet on CIFAR, and the ResNet and DepthwiseResNet that it is compared with.

    python train.py --config configs/shiftresnet20_c100.py:expansion=3

The recipe is `default_config()`, that of the code published with arXiv:1711.08141: 164 epochs of
batches of 128, SGD with momentum 0.9 and weight decay 5e-4 on every parameter, learning rate 0.1,
times 0.1 at epochs 82 and 123, random crop after zero padding by 4, random flip.

`configs/{shiftresnet,resnet,depthwiseresnet,mobileresnet,shuffleresnet}{20,56,110}_{c10,c100}.py`
are the networks of that code's page, today or earlier. Its rows, by the size of the shift network's
middle channels, are these arguments:

    row   shiftresnet   resnet (with reduction_mode=block)   resnet (with reduction_mode=net)
                        20    56    110                      20    56    110
    1c    expansion=1   7.2   7.6   7.8       reduction=     7.2    8.4    8.4
    3c    expansion=3   2.8   2.9   2.9                      2.8    2.8    2.8
    6c    expansion=6   1.5   1.5   1.5                      1.45   1.45   1.45
    9c    expansion=9   0.98  0.98  0.98                     0.96   0.96   0.96

    row   depthwiseresnet and mobileresnet                   shuffleresnet
          20    56    110                                    20    56    110
    1c    1.12  1.12  1.1                     reduction=     0.38  0.38  0.37
    3c    0.38  0.37  0.37                                   0.13  0.128 0.125
    6c    0.19  0.19  0.19                                   0.065 0.065 0.065
    9c    0.125 0.124 0.123                                  0.04  0.04  0.04

ResNet110's row 9c on CIFAR-10 has reduction 0.95. Where the page gives a second reduction in
parentheses, that is the one used. Expansion and reduction are 1 without an argument, which for
ResNet is the page's last row. For mode net the page gave no reductions: these bring the parameters
closest to the shift network's of that row. `weights` and `weight_bits` give any network low-bit
weights, `activations` quantizes the inputs of its convolutions, and with `quantize_first_last` the
first and the last layer are low-bit too. `shiftresnet{32,44}` are there too.

The mobile, shuffle and whole-net columns stood on earlier pages; the mobile and shuffle blocks were
removed from that code because they "didn't learn or did worse". So was the depthwise block without
a shortcut, `depthwiseresnet20_c100.py:reduction=0.38,depthwise_skip=false`. `docs/networks.md` says
what training these networks asks for.

`results/table.toml` has the accuracy that the page reports for each row (the best test accuracy of
any epoch), parameters and multiply-adds; `docs/results.md` shows them. The page has no CIFAR-10
numbers for DepthwiseResNet, MobileResNet and ShuffleResNet.

`recipe=short` trains any of them in 30 epochs, see `CIFAR_RECIPES` in `shiftnet/config.py`:

    python train.py --config configs/shiftresnet20_c100.py:recipe=short

`recipe=distilled` does so too, learning from a larger network that was trained by `recipe=short`.
"""

from shiftnet.config import CIFAR_RECIPES, Config, apply_argument, default_config
from shiftnet.models import FAMILIES, parse_arch

MODEL = (
    *("arch", "expansion", "reduction", "reduction_mode", "depthwise_skip"),
    *("weights", "weight_bits", "weights_first_last", "activations", "quantize_first_last"),
)
# Of Muon's kernels in the short recipes, above expansion 1: with it ShiftResNet20 3c has 66.28 % of
# CIFAR-100's test images after 30 epochs, without 64.38 %; 1c does not overfit.
SHORT_DECAY = 0.015


def get_config(argument: str = "") -> Config:
    config = default_config()
    fields = {name: f"model.{name}" for name in MODEL}
    recipe = apply_argument(config, argument, fields | {"data": "data.name"}, CIFAR_RECIPES)
    if recipe in ("short", "distilled") and config.model.expansion > 1:
        config.optimizer.muon_weight_decay = SHORT_DECAY
    family = FAMILIES[parse_arch(config.model.arch)[0]]
    if family.reduction_mode == "block" and "reduction_mode=" not in argument:
        config.model.reduction_mode = "block"  # the only mode that the original has for it
    return config
