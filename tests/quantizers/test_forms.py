"""Weight forms give the originals' weights and gradients, zeros included; any layer takes any."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet import models, quantizers
from shiftnet.errors import UserError
from shiftnet.interchange import torch_names
from shiftnet.layers import Conv, Linear
from shiftnet.quantizers import LowBitWeight, initializers
from tests import networks, oracle
from tests.models.test_build import config

# Every form at every width, by its arguments to `quantizers.make`.
LOW_BIT = [
    (name, bits)
    for name, (_, widths) in quantizers.FORMS.items()
    if name != "float"
    for bits in (0, *widths)
]
SMALL = ("resnet8", "shiftresnet8", "depthwiseresnet8", "wrn8")
MORE = ("sign", "denseshift", "ternary", "pot", "apot")
# Those whose latents are signs and gates; `test_rounded.py` has the others.
GATED = [(name, bits) for name, bits in LOW_BIT if name in ("sign", "s3", "denseshift")]


def with_latents(weight: quantizers.Weight, latents: dict[str, np.ndarray]) -> quantizers.Weight:
    for name, value in latents.items():
        getattr(weight, name).set_value(jnp.asarray(value))
    return weight


def gradients(weight: quantizers.Weight, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """Of sum(weight * cotangent), by latent."""
    graphdef, state = nnx.split(weight)
    grads = jax.grad(lambda s: (nnx.merge(graphdef, s)() * jnp.asarray(cotangent)).sum())(state)
    return {path[-1]: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}


def corners(names: list[str]) -> tuple[dict[str, np.ndarray], int]:
    """Latents below, at and above zero in every combination; and how many combinations."""
    rows = np.array(list(itertools.product((-0.7, 0.0, 0.3), repeat=len(names))))
    return dict(zip(names, rows.T.copy(), strict=True)), len(rows)


# S3, against its code

LATENTS = {
    "sign": "weight",
    "gate": "weight_val",
    "shift1": "weight_shift",
    "shift2": "weight_shift2",
}


def hwio(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, (2, 3, 1, 0)).astype(np.float64)


def s3_of_case(case: oracle.Case) -> quantizers.Weight:
    latents = {ours: hwio(case.arrays[f"latent/{theirs}"]) for ours, theirs in LATENTS.items()}
    weight = quantizers.make("s3")(latents["sign"].shape, rngs=nnx.Rngs(0))
    return with_latents(weight, latents)


@oracle.every_case("s3conv", core=["i4_o6_k3"])
@pytest.mark.usefixtures("float64")
def test_s3_weights_and_their_gradients_are_the_originals_bit_for_bit(name):
    case = oracle.case("s3conv", name)
    weight = s3_of_case(case)
    np.testing.assert_array_equal(weight(), hwio(case.arrays["w"]))
    grads = gradients(weight, hwio(case.arrays["w_cotangent"]))
    for ours, theirs in LATENTS.items():
        expected = hwio(case.arrays[f"wgrad/{theirs}"])
        np.testing.assert_array_equal(grads[ours], expected, err_msg=ours)


@oracle.every_case("s3conv")
@pytest.mark.usefixtures("float64")
def test_a_convolution_with_s3_weights_is_the_originals(name):
    case = oracle.case("s3conv", name)
    hyper = case.hyper
    conv = Conv(
        hyper["in_channels"],
        hyper["out_channels"],
        hyper["kernel_size"],
        stride=hyper["stride"],
        rngs=nnx.Rngs(0),
    )
    conv.weight = s3_of_case(case)
    x, cotangent = (
        networks.channels_last(case.arrays[key]).astype(np.float64) for key in ("x", "cotangent")
    )
    graphdef, state = nnx.split(conv)

    @jax.jit
    def run(state, x):
        y, pull = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return y, *pull(jnp.asarray(cotangent))

    y, grads, grad_x = run(state, jnp.asarray(x))
    named = torch_names.to_torch(nnx.merge(graphdef, grads))
    ours = {name.removeprefix("."): value for name, value in named.items()}
    outputs = {"y": networks.channels_first(y), "grad_x": networks.channels_first(grad_x)}
    oracle.assert_near(outputs, {key: case.arrays[key] for key in outputs}, 1e-14)
    oracle.assert_near(ours, case.part("grad/"), 1e-14)


@oracle.every_case("s3conv", core=["i4_o6_k3"])
@pytest.mark.usefixtures("float64")
def test_s3s_regulariser_and_its_gradient_are_the_originals(name):
    case = oracle.case("s3conv", name)
    graphdef, state = nnx.split(s3_of_case(case))
    value, grads = jax.value_and_grad(
        lambda s: case.hyper["alpha"] * nnx.merge(graphdef, s).regularizer()
    )(state)
    np.testing.assert_allclose(value, case.arrays["reg/value_times_alpha"], rtol=1e-14)
    # At exactly zero the PyTorch of S3's days gave 0, a later one -alpha / 2.
    expected = hwio(case.arrays["reg/grad_weight_val_torch1.0"])
    np.testing.assert_array_equal(grads["gate"][...], expected)


# Every form, restated in NumPy


def value_and_slopes(name: str, bits: int, latents: list[np.ndarray], fan_in: int):
    """What the papers say of one form: the weight, and its derivative by each latent."""
    signs = np.where(latents[0] >= 0, 1.0, -1.0)
    if name == "sign":
        return np.sqrt(2 / fan_in) * signs, [np.ones_like(signs)]
    gates = [(t > 0).astype(float) for t in latents[1:]]
    if name == "s3":
        (sparse, *gates), order = gates, -1
    else:
        sparse, order = np.ones_like(signs), 1
    # s ← [t] (s + 1): ds/dt is s + 1 before, times the gates after.
    exponent, slopes = np.zeros_like(signs), []
    for gate in gates[::order]:
        slopes = [slope * gate for slope in slopes] + [exponent + 1]
        exponent = gate * (exponent + 1)
    slopes = slopes[::order]
    weight = signs * sparse * 2**exponent
    if name == "s3":
        by_exponent = weight * np.log(2)
        first = [sparse * 2**exponent, signs * 2**exponent]
    else:
        by_exponent = signs * 0.5 / np.sqrt(exponent + 1)
        first = [np.sqrt(exponent + 1)]
    return weight, first + [by_exponent * slope for slope in slopes]


@pytest.mark.core
@pytest.mark.parametrize(("name", "bits"), GATED)
@pytest.mark.usefixtures("float64")
def test_weights_and_slopes_at_every_combination_of_signs_and_zeros(name, bits):
    weight = quantizers.make(name, bits)((1, 1, 1, 1), rngs=nnx.Rngs(0))
    names = [n for n in ("sign", "latent", "gate") if hasattr(weight, n)]
    names += [f"shift{i}" for i in range(1, getattr(weight, "num_shifts", 0) + 1)]
    latents, count = corners(names)
    fan_in = 6
    weight = quantizers.make(name, bits)((fan_in, count), rngs=nnx.Rngs(0))
    latents = {n: np.tile(value, (fan_in, 1)) for n, value in latents.items()}
    with_latents(weight, latents)
    expected, slopes = value_and_slopes(name, bits, list(latents.values()), fan_in)
    np.testing.assert_array_equal(weight(), expected)
    grads = gradients(weight, np.ones_like(expected))
    assert sorted(grads) == sorted(names)
    for latent, slope in zip(names, slopes, strict=True):
        np.testing.assert_allclose(grads[latent], slope, rtol=1e-14, err_msg=latent)
    # All levels are reached, and codes lead back to the weights.
    assert isinstance(weight, LowBitWeight)
    levels = np.array(weight.levels)
    quantized = weight.quantized()
    np.testing.assert_array_equal(levels[np.asarray(quantized.codes)] * quantized.scale, expected)
    np.testing.assert_array_equal(quantized(), expected.astype(np.float32))
    assert set(np.unique(quantized.codes)) == set(range(len(levels)))


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "bits", "levels", "width"),
    [
        ("sign", 0, [-1, 1], 1),
        ("s3", 2, [-1, 0, 1], 2),
        ("s3", 0, [-4, -2, -1, 0, 1, 2, 4], 3),
        ("s3", 4, [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64], 4),
        ("denseshift", 2, [-2, -1, 1, 2], 2),
        ("denseshift", 0, [-8, -4, -2, -1, 1, 2, 4, 8], 3),
        ("denseshift", 4, [-(2**i) for i in range(7, -1, -1)] + [2**i for i in range(8)], 4),
    ],
)
def test_levels_and_bits(name, bits, levels, width):
    weight = quantizers.make(name, bits)((3, 3, 8, 5), rngs=nnx.Rngs(0))
    assert list(weight.levels) == levels
    assert weight.bits == width
    assert weight.size == 360
    assert weight.packed_bytes == 360 * width // 8
    assert quantizers.make(name, bits)((1, 1, 3, 3), rngs=nnx.Rngs(0)).packed_bytes == -(
        -9 * width // 8
    )


@pytest.mark.core
def test_bfloat16_and_float32_hold_every_level_exactly():
    for name, bits in GATED[1:]:  # 1-bit weights have a scale
        weight = quantizers.make(name, bits)((64, 64), rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(weight(), weight().astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.core
def test_latents_start_normal_with_he_s_deviation_of_the_outputs():
    weight = quantizers.make("s3")((3, 3, 64, 128), rngs=nnx.Rngs(0))
    latents = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(weight))]
    assert len(latents) == 4
    for latent in latents:
        scaled = latent.ravel() * np.sqrt(3 * 3 * 128 / 2)
        assert abs(scaled.mean()) < 0.02
        assert abs(scaled.std() - 1) < 0.01
        assert abs((np.abs(scaled) < 1).mean() - 0.6827) < 0.01
    assert len({latent.tobytes() for latent in latents}) == 4
    plain = initializers.he_normal_fan_out(jax.random.key(0), (3, 3, 64, 128))
    assert abs(float(plain.std()) * np.sqrt(3 * 3 * 128 / 2) - 1) < 0.01


# In layers and networks


@pytest.mark.core
@pytest.mark.parametrize(
    "make", [lambda **kw: Conv(4, 8, 3, **kw), lambda **kw: Linear(4, 8, **kw)]
)
def test_a_layer_takes_its_form_by_name_when_it_is_made(make):
    layer = make(weights="s3", bits=2, rngs=nnx.Rngs(0))
    assert isinstance(layer.weight, quantizers.S3)
    assert layer.weight.levels == (-1, 0, 1)
    assert isinstance(make(rngs=nnx.Rngs(0)).weight, quantizers.Float)
    with pytest.raises(UserError, match="unknown weight form 's4'; did you mean 's3'"):
        make(weights="s4", rngs=nnx.Rngs(0))


def test_float_layers_of_a_low_bit_network_start_as_those_of_the_float_network_of_a_seed():
    def ends(form):
        model = models.build(config("resnet8", weights=form), 10, rngs=nnx.Rngs(3))
        return model.conv1.weight(), model.linear.weight(), model.linear.bias[...]

    for ours, expected in zip(jax.jit(lambda: ends("s3"))(), ends("float"), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("arch", "form"),
    [
        *((arch, form) for arch in SMALL for form in ("sign", "s3", "denseshift")),
        *(("shiftresnet8", form) for form in ("ternary", "apot", "pot", "int")),
        *(("imagenet_resnet50", "s3"), ("shiftnet_a", "sign")),
        *(
            pytest.param(arch, form, marks=pytest.mark.slow)
            for arch in ("imagenet_resnet50", "shiftnet_a")
            for form in ("sign", "s3", "denseshift")
            if (arch, form) not in {("imagenet_resnet50", "s3"), ("shiftnet_a", "sign")}
        ),
    ],
)
def test_every_network_carries_every_form_in_all_layers_but_the_first_and_last(arch, form):
    network = networks.abstract(config(arch, weights=form), 10)
    found = quantizers.of_layers(network)
    floats = {name for name, weight in found.items() if isinstance(weight, quantizers.Float)}
    assert floats == ({"conv0", "conv_last"} if arch == "wrn8" else {"conv1", "linear"})
    kinds = {type(weight) for name, weight in found.items() if name not in floats}
    assert kinds == {quantizers.FORMS[form][0]}
    whole = networks.abstract(config(arch, weights=form, quantize_first_last=True), 10)
    assert {type(weight) for weight in quantizers.of_layers(whole).values()} == kinds


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param(name, bits, marks=pytest.mark.slow if bits or name in MORE else ())
        for name, bits in LOW_BIT
    ],
)
def test_a_shift_network_of_low_bit_weights_learns_through_them(name, bits):
    fields = config("shiftresnet8", weights=name, weight_bits=bits)
    network = networks.random(fields, 10)
    x = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    result = networks.differentiate(
        network, x, networks.cross_entropy(np.arange(4)), train=True, regularizer=1e-5
    )
    assert np.isfinite(result.output).all()
    quiet = [name for name, grad in result.grads.items() if not np.abs(grad).max() > 0]
    assert quiet == []


def test_the_regulariser_sums_over_all_layers():
    network = networks.random(config("resnet8", weights="s3"), 10)
    expected = sum(
        np.maximum(-np.asarray(weight.gate[...], np.float64), 0).sum()
        for weight in quantizers.of_layers(network).values()
        if isinstance(weight, quantizers.S3)
    )
    assert expected > 10
    np.testing.assert_allclose(quantizers.regularizer(network), expected, rtol=1e-5)
    plain = networks.random(config("resnet8"), 10)
    assert quantizers.regularizer(plain) == 0


@pytest.mark.core
@pytest.mark.parametrize(("name", "bits"), GATED)
def test_weights_can_be_set_from_their_codes(name, bits):
    weight = quantizers.make(name, bits)((3, 3, 8, 16), rngs=nnx.Rngs(0))
    assert isinstance(weight, LowBitWeight)
    codes = np.random.default_rng(0).integers(0, len(weight.levels), weight.shape).astype(np.uint8)
    weight.set_quantized(codes)
    np.testing.assert_array_equal(weight.quantized().codes, codes)
    # As far from zero as they would have started, so that training can move them.
    for leaf in jax.tree.leaves(nnx.state(weight)):
        np.testing.assert_allclose(np.abs(leaf), np.sqrt(2 / (9 * 16)), rtol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize(("name", "bits"), GATED)
def test_latents_start_the_nearer_to_zero_the_nearer_a_weight_is_to_another_level(name, bits):
    value = np.random.default_rng(0).normal(size=(16, 32))
    weight = quantizers.make(name, bits)(value.shape, rngs=nnx.Rngs(0))
    codes, factor = weight.nearest(value)
    weight.start_from(value)
    np.testing.assert_array_equal(weight.quantized().codes, codes)
    latents = {path[0]: np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(weight))}
    levels = factor * np.asarray(weight.levels)
    if isinstance(weight.scale, float):
        levels = levels * weight.scale
    edges = (levels[1:] + levels[:-1]) / 2
    for latent, found in latents.items():
        np.testing.assert_allclose(np.square(found).mean(), 2 / 32, rtol=1e-2, err_msg=latent)
        if latent in ("sign", "latent"):
            np.testing.assert_array_equal(found >= 0, value >= 0)
            distance = np.abs(value)
        elif latent == "gate":
            distance = np.abs(np.abs(value) - edges[edges > 0].min())
        else:
            continue
        ratio = np.abs(found) / np.maximum(distance, 1e-3 * distance.max())
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4, err_msg=latent)


def test_codes_of_scaled_weights_are_right_whatever_the_scale():
    # The scale is no power of two, and compiled code may divide by multiplying.
    latent = np.tile(np.array([-0.5, 0.5], np.float32), 4)
    for fan_in in (3, 8, 16, 72, 144, 576):
        weight = quantizers.make("sign")((fan_in, 8), rngs=nnx.Rngs(0))
        with_latents(weight, {"latent": np.tile(latent, (fan_in, 1))})
        graphdef, state = nnx.split(weight)
        run = jax.jit(lambda state, graphdef=graphdef: nnx.merge(graphdef, state).quantized())
        np.testing.assert_array_equal(run(state).codes[0], latent > 0, err_msg=str(fan_in))
