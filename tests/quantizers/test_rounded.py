"""Forms that round a float weight are their papers' formulas, forward and backward, and keep their
weights through codes, packed files and other networks' numbers.

Each formula is written down again here in NumPy and float64, one weight at a time where that says
it more plainly.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftnet import quantizers
from shiftnet.quantizers import bits as packing
from tests.quantizers.test_forms import gradients, with_latents

ROUNDED = [
    (name, width)
    for name, (form, widths) in quantizers.FORMS.items()
    if isinstance(form, type) and issubclass(form, quantizers.Rounded)
    for width in (widths or (0,))
]
EXTREMES = [
    ("ternary", 0),
    ("apot", 2),
    ("apot", 4),
    ("pot", 2),
    ("pot", 5),
    ("int", 2),
    ("int", 8),
]


# The papers


def ternary(w, cotangent):
    """BitNet b1.58: weights, and gradients by latent, of sum(weights * cotangent)."""
    gamma = np.abs(w).sum() / w.size
    weight = gamma * np.clip(np.rint(w / gamma), -1, 1)
    return weight, {"unrounded": cotangent}


def pot(w, cotangent, bits):
    """DeepShift-Q, within as many powers as `bits` holds beside the sign and zero."""
    powers = {2: 1, 3: 3, 4: 7, 5: 15}[bits]
    highest = np.abs(w).sum() / w.size * {2: 1, 3: 2, 4: 4, 5: 8}[bits]
    weight = np.zeros_like(w)
    for place, value in np.ndenumerate(w):
        if value == 0:
            continue
        below = round(math.log2(highest / abs(value)))  # powers below the highest
        if below < powers:
            weight[place] = math.copysign(highest * 2.0 ** -max(below, 0), value)
    return weight, {"unrounded": cotangent}


def lsq(w, cotangent, bits, step):
    """Equations 1 to 3 of the paper, and the factor of its section 2.2."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight, by_w, by_step = np.zeros_like(w), np.zeros_like(w), 0.0
    for place, value in np.ndenumerate(w):
        v = value / step
        weight[place] = np.rint(min(max(v, low), high)) * step
        if v <= low:
            slope = low
        elif v >= high:
            slope = high
        else:
            slope = np.rint(v) - v
            by_w[place] = cotangent[place]
        by_step += slope * cotangent[place]
    return weight, {"unrounded": by_w, "step": np.array(by_step / math.sqrt(w.size * high))}


# Sums of powers of two, by the paper's figure and tables: of magnitudes from 0 to 1.
APOT_LEVELS = {
    2: [0, 1],
    3: [0, 1 / 4, 1 / 2, 1],
    4: [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1],
}


def apot(w, cotangent, bits, alpha):
    """The paper's weight normalisation, projection, and reparameterised clipping function."""
    levels = np.array(APOT_LEVELS[bits])
    mean, sigma = w.mean(), w.std()
    normal = (w - mean) / (sigma + 1e-5)
    weight, by_normal, by_alpha = np.zeros_like(w), np.zeros_like(w), 0.0
    for place, value in np.ndenumerate(normal):
        x = min(abs(value) / alpha, 1)
        nearest = levels[np.abs(levels - x).argmin()] * np.sign(value)
        weight[place] = alpha * nearest
        if abs(value) > alpha:
            by_alpha += np.sign(value) * cotangent[place]
        else:
            by_alpha += (nearest - value / alpha) * cotangent[place]
            by_normal[place] = cotangent[place]
    # Of normal = (w - mean) / (sigma + 1e-5), where d sigma / dw = (w - mean) / (size sigma).
    through_sigma = (by_normal * normal).sum() * (w - mean) / (w.size * sigma)
    by_w = (by_normal - by_normal.mean() - through_sigma) / (sigma + 1e-5)
    return weight, {"unrounded": by_w, "clip": np.array(by_alpha)}


def restated(name, bits, latents, cotangent):
    w = latents["unrounded"]
    if name == "ternary":
        return ternary(w, cotangent)
    if name == "pot":
        return pot(w, cotangent, bits)
    if name == "int":
        return lsq(w, cotangent, bits, latents["step"])
    return apot(w, cotangent, bits, latents["clip"])


def compare(name, bits, latents):
    """A weight of these latents against its paper's formula, in float64."""
    w = latents["unrounded"]
    weight = with_latents(quantizers.make(name, bits)(w.shape, rngs=nnx.Rngs(0)), latents)
    cotangent = np.random.default_rng(1).normal(size=w.shape)
    expected, slopes = restated(name, bits, latents, cotangent)
    np.testing.assert_allclose(weight(), expected, rtol=1e-12, atol=1e-15)
    found = gradients(weight, cotangent)
    assert found.keys() == slopes.keys()
    for latent, slope in slopes.items():
        scale = np.abs(slope).max()
        np.testing.assert_allclose(found[latent], slope, atol=1e-11 * scale, err_msg=latent)
    quantized = weight.quantized()
    np.testing.assert_array_equal(quantized(), weight())
    return weight


@pytest.mark.core
@pytest.mark.parametrize(("name", "bits"), ROUNDED)
@pytest.mark.usefixtures("float64")
def test_weights_and_gradients_are_the_papers(name, bits):
    draw = np.random.default_rng(0)
    w = draw.normal(size=(3, 3, 4, 8)) * 0.1
    w.flat[::17] = 0
    w.flat[5], w.flat[9] = 2.0, -1.5  # beyond every clip
    latents = {"unrounded": w}
    if name == "int":
        latents["step"] = np.array(2 * np.abs(w).mean() / math.sqrt(2 ** (bits - 1) - 1))
    elif name == "apot":
        latents["clip"] = np.array(1.7)
    compare(name, bits, latents)


@pytest.mark.core
@pytest.mark.usefixtures("float64")
def test_halves_of_a_ternary_weight_go_to_zero():
    w = np.array([[0, 0.5, -0.5, 1.5, -1.5, 2, -2, 0]])  # the mean of the sizes is 1
    weight = compare("ternary", 0, {"unrounded": w})
    assert np.asarray(weight()).tolist() == [[0, 0, 0, 1, -1, 1, -1, 0]]


@pytest.mark.core
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.usefixtures("float64")
def test_ties_zeros_and_clips_of_an_integer_weight(bits):
    # All halves, the clips themselves, what is just inside them and what is beyond.
    steps = np.arange(-(2**bits) - 3, 2**bits + 3) / 2
    steps = np.concatenate([steps, steps[:4] + 1e-9, steps[-4:] - 1e-9])
    compare("int", bits, {"unrounded": steps[None] * 0.25, "step": np.array(0.25)})


@pytest.mark.core
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.usefixtures("float64")
def test_a_power_of_two_weight_is_rounded_in_its_logarithm(bits):
    powers = np.exp2(np.arange(-18, 4) / 2)  # every other one lies between two levels
    w = np.concatenate([powers * (1 + 1e-9), -powers * (1 - 1e-9), np.zeros(3)])
    w[-1] = len(w) / 2 - np.abs(w).sum()  # so that the mean of the sizes is a power of two
    assert w[-1] > 0
    compare("pot", bits, {"unrounded": w[None]})


@pytest.mark.core
@pytest.mark.usefixtures("float64")
def test_five_bits_are_deepshifts_own_powers_up_to_the_scale():
    w = np.random.default_rng(0).normal(size=(64, 32))
    weight = quantizers.make("pot", 5)(w.shape, rngs=nnx.Rngs(0))
    # A mean of 1 / 8 makes the highest level 1, as DeepShift-Q has it.
    w *= 0.125 / np.abs(w).mean()
    with_latents(weight, {"unrounded": w})
    expected = np.sign(w) * np.exp2(np.rint(np.log2(np.abs(w))))
    np.testing.assert_allclose(weight(), expected, rtol=1e-12)


@pytest.mark.core
@pytest.mark.usefixtures("float64")
def test_zeros_and_clips_of_an_additive_weight():
    # Mean 0; zero, and one number on each side beyond every clip.
    w = np.array([[0.0, 0, 1, -1, 2, -2, 9, -9]])
    for clip in (0.2, 1.0, 5.0):
        compare("apot", 4, {"unrounded": w, "clip": np.array(clip)})


@pytest.mark.core
def test_an_additive_weight_between_two_levels_takes_the_smaller():
    weight = quantizers.make("apot", 4)((4, 4), rngs=nnx.Rngs(0))
    middles = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 9], np.float32)
    levels = np.asarray(weight._level(jnp.asarray(np.concatenate([middles, -middles]))))
    assert levels.tolist() == [0, 1, 2, 3, 4, 6, 8, 0, -1, -2, -3, -4, -6, -8]


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "bits", "levels"),
    [
        ("ternary", 0, [1]),
        ("apot", 2, [1]),
        ("apot", 3, [1, 2, 4]),
        ("apot", 0, [1, 2, 3, 4, 6, 8, 10]),
        ("pot", 2, [1]),
        ("pot", 3, [1, 2, 4]),
        ("pot", 4, [1, 2, 4, 8, 16, 32, 64]),
        ("pot", 0, [2**i for i in range(15)]),
    ],
)
def test_levels_are_symmetric_with_zero(name, bits, levels):
    weight = quantizers.make(name, bits)((3, 3), rngs=nnx.Rngs(0))
    assert list(weight.levels) == [*(-level for level in reversed(levels)), 0, *levels]


@pytest.mark.core
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_weights_use_every_code_and_start_with_the_papers_step(bits):
    weight = quantizers.make("int", bits)((16, 16), rngs=nnx.Rngs(0))
    assert list(weight.levels) == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert weight.bits == bits
    assert weight.packed_bytes == 16 * 16 * bits // 8 + 4
    mean = np.abs(np.asarray(weight.unrounded[...], np.float64)).mean()
    np.testing.assert_allclose(
        weight.step[...], 2 * mean / math.sqrt(2 ** (bits - 1) - 1), rtol=1e-6
    )


# Any shape


@st.composite
def weights(draw):
    name, bits = draw(st.sampled_from(ROUNDED))
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 9), st.integers(1, 9)),
            st.tuples(
                st.sampled_from([1, 3]), st.just(1), st.integers(1, 5), st.integers(1, 5)
            ).map(lambda s: (s[0], s[0], *s[2:])),
        )
    )
    return name, bits, shape, draw(st.integers(0, 2**32 - 1))


@pytest.mark.core
@settings(max_examples=10)
@given(weights())
def test_weights_of_any_shape_come_back_from_their_codes(drawn):
    name, bits, shape, seed = drawn
    form = quantizers.make(name, bits)
    weight = form(shape, rngs=nnx.Rngs(seed))
    quantized = weight.quantized()
    expected = np.asarray(weight())
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(quantized(), expected)
    packed = packing.pack(np.asarray(quantized.codes), weight.bits)
    assert len(packed) == weight.packed_bytes - 4
    codes = packing.unpack(packed, weight.bits, shape)
    # As a packed file brings them back, and as the latents of a network that goes on training.
    scale = np.asarray(quantized.scale)
    fixed = quantizers.Fixed(weight, codes, scale)
    np.testing.assert_array_equal(fixed(), expected)
    other = form(shape, rngs=nnx.Rngs(seed + 1))
    other.set_quantized(codes, scale)
    np.testing.assert_allclose(other(), expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "bits"), EXTREMES)
def test_a_layer_of_zeros_stays_finite(name, bits):
    weight = quantizers.make(name, bits)((4, 4), rngs=nnx.Rngs(0))
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(weight))
    nnx.update(weight, zeros)
    np.testing.assert_array_equal(weight(), np.zeros((4, 4)))
    for grad in gradients(weight, np.ones((4, 4), np.float32)).values():
        assert np.isfinite(grad).all()
    weight.start_from(np.zeros((4, 4)))
    np.testing.assert_array_equal(weight(), np.zeros((4, 4)))


# From float weights


@pytest.mark.core
@pytest.mark.parametrize(("name", "bits"), ROUNDED)
def test_a_form_keeps_the_float_weights_to_learn_from(name, bits):
    value = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32)
    weight = quantizers.make(name, bits)(value.shape, rngs=nnx.Rngs(0))
    weight.start_from(value)
    np.testing.assert_array_equal(weight.unrounded[...], value)
    assert ((value * np.asarray(weight())) >= -0.05).all()  # an additive one's mean is taken off


@pytest.mark.core
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_integer_weight_starts_with_the_step_that_comes_nearest(bits):
    value = np.random.default_rng(0).normal(size=(3, 3, 16, 32)).astype(np.float32) * 0.05
    weight = quantizers.make("int", bits)(value.shape, rngs=nnx.Rngs(0))
    weight.start_from(value)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = np.geomspace(1e-4, 1, 2000) * np.abs(value).max()
    best = min(
        np.square(value - s * np.clip(np.rint(value / s), low, high)).sum()
        for s in steps.astype(np.float64)
    )
    assert np.square(value - np.asarray(weight(), np.float64)).sum() <= 1.01 * best


def test_codes_come_back_where_nearly_all_weights_are_zero():
    for seed in range(5):
        kernel = np.random.default_rng(seed).normal(size=(3, 3, 16, 20)) * 0.1
        kernel[..., :18] = 0
        weight, other = (quantizers.make("pot", 5)(kernel.shape, rngs=nnx.Rngs(0)) for _ in "ab")
        weight.start_from(kernel)
        quantized = weight.quantized()
        other.set_quantized(np.asarray(quantized.codes), np.asarray(quantized.scale))
        np.testing.assert_array_equal(other.quantized().codes, quantized.codes)
        np.testing.assert_allclose(other(), weight(), rtol=1e-5)
