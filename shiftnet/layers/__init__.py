"""Layers that the networks are built from (`flax.nnx`, NHWC).

All of them compute in the precision of their input: parameters are cast to it on use.
"""

from shiftnet.layers.batch_norm import BatchNorm
from shiftnet.layers.conv import Conv
from shiftnet.layers.folding import convolve, fold_batch_norm
from shiftnet.layers.learned_shift import LearnedShift
from shiftnet.layers.linear import Linear
from shiftnet.layers.rectifier import RPReLU, rectifier
from shiftnet.layers.shift import Shift, make_shift

__all__ = [
    "BatchNorm",
    "Conv",
    "LearnedShift",
    "Linear",
    "RPReLU",
    "Shift",
    "convolve",
    "fold_batch_norm",
    "make_shift",
    "rectifier",
]
