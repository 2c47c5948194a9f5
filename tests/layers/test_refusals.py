"""What a layer would compute wrongly without a word is refused, in one sentence."""

import jax.numpy as jnp
import pytest
from flax import nnx

from shiftnet.layers import BatchNorm, Conv, LearnedShift, Linear, make_shift

pytestmark = pytest.mark.core

IMAGES = jnp.ones((2, 4, 4, 3))
LAYERS = {
    "Linear": lambda: Linear(5, 2, rngs=nnx.Rngs(0)),
    "Conv": lambda: Conv(5, 2, 1, rngs=nnx.Rngs(0)),
    "BatchNorm": lambda: BatchNorm(5),
    "LearnedShift": lambda: LearnedShift(5, "sparse", rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_of_other_channels_or_of_integers(name):
    layer = LAYERS[name]()
    with pytest.raises(ValueError, match=rf"{name} needs x of 5 channels, got .*\(2, 4, 4, 3\)"):
        layer(IMAGES)
    with pytest.raises(ValueError, match=f"{name} needs a floating x, got uint8"):
        layer(jnp.ones((2, 4, 4, 5), jnp.uint8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "stride and groups, whole numbers of at least 1, got 3, 0 and 1"),
        ({"kernel_size": 2}, "an odd kernel_size"),
        ({"groups": 4}, "groups that divide its 6 and 6 channels, got 4"),
    ],
)
def test_a_convolution_of_impossible_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        Conv(6, 6, **{"kernel_size": 3, **settings}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(4, 4, 6), (2, 3, 4, 4, 6), (4, 6)])
def test_a_convolution_of_what_are_no_images(shape):
    with pytest.raises(ValueError, match=r"Conv needs x \[N, H, W, C\], got the shape"):
        Conv(6, 6, 1, stride=2, rngs=nnx.Rngs(0))(jnp.ones(shape))


def test_a_kind_of_shift_that_does_not_exist():
    with pytest.raises(ValueError, match="unknown kind of shift 'Fixed'; did you mean 'fixed'"):
        make_shift(4, kind="Fixed", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown kind of learned shift 'foo'; known: active, sp"):
        LearnedShift(4, "foo", rngs=nnx.Rngs(0))


def test_training_on_no_pixels_which_would_make_statistics_of_nan():
    with pytest.raises(ValueError, match="BatchNorm needs pixels to train on"):
        BatchNorm(3)(IMAGES[:0], train=True)
