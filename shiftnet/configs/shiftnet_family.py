r"""ShiftNet-A, -B and -C on ImageNet.

    python train.py --config configs/shiftnet_a_imagenet.py --config.data.dir=DIR

Reported (arXiv:1711.08141), top-1 / top-5 in per cent: ShiftNet-A 70.1 / 89.7 with 4.1 million
parameters, ShiftNet-B 61.2 / 83.6 with 1.1 million; neither has been trained here yet. ShiftNet-C
is approximate, because its layout was not published: 0.694 million parameters instead of 0.78.

The paper's own training code was never published. The recipe is PyTorch's ImageNet example of that
time: 90 epochs of batches of 256, SGD with momentum 0.9 and weight decay 1e-4, learning rate 0.1,
times 0.1 at epochs 30 and 60, crops and flips as for ResNets. `:weights=s3` and `:weights=sign`
leave convolutions without multiplications between its first and last layer.
"""

from shiftnet.config import Config, apply_argument, default_config

MODEL = ("arch", "weights", "weight_bits")


def get_config(argument: str = "") -> Config:
    config = default_config()
    config.epochs = 90
    config.batch_size = 256
    config.model.arch = "shiftnet_a"
    config.optimizer.weight_decay = 1e-4
    config.schedule.boundaries = (30, 60)
    config.data.name = "imagenet2012"
    apply_argument(config, argument, {name: f"model.{name}" for name in MODEL})
    return config
