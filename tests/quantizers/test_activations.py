"""Activation forms give their papers' values and gradients, at ties, zeros and clips too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shiftnet
from shiftnet import models, packing, quantizers
from shiftnet.errors import UserError
from shiftnet.layers import Conv
from shiftnet.layers.folding import fold_batch_norms
from shiftnet.models.counting import count
from shiftnet.models.shiftresnet import ShiftConvBlock
from shiftnet.quantizers import Activation, LearnedStep, ShiftedSign
from tests import networks
from tests.models.test_build import config
from tests.test_packing import images, note, small

ARCHS = [
    *("resnet8", "shiftresnet8", "depthwiseresnet8", "wrn8"),
    *("imagenet_resnet18", "imagenet_resnet50", "shiftnet_b"),
]


def pulled(form: Activation, x: np.ndarray, cotangent: np.ndarray, *, train: bool = False):
    """The form's values, and the gradients of sum(values * cotangent) by `x` and parameters."""
    graphdef, params, stats = nnx.split(form, nnx.Param, nnx.BatchStat)

    def total(params, x):
        y = nnx.merge(graphdef, params, stats, copy=True)(x, train=train)
        return (y * cotangent).sum(), y

    (_, y), (grads, dx) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        params, jnp.asarray(x)
    )
    return (
        np.asarray(y),
        np.asarray(dx),
        {k[-1]: np.asarray(v[...]) for k, v in nnx.to_flat_state(grads)},
    )


def lsq(x: np.ndarray, step: float, low: int, high: int):
    """Value, derivative by x and derivative by the step: equations 1 to 3 of arXiv:1902.08153."""
    v = x / step
    value = np.rint(np.clip(v, low, high)) * step
    by_step = np.where(v <= low, low, np.where(v >= high, high, np.rint(v) - v))
    return value, ((v > low) & (v < high)).astype(float), by_step


def values_with_corners(step: float, low: int, high: int) -> np.ndarray:
    """Random ones, and zeros, ties and both ends of the range exactly; `[2, 3, 3, 4]`."""
    draw = np.random.default_rng(0).normal(size=60) * step * high / 1.5
    corners = step * np.array([0, 0.5, 1.5, -0.5, -1.5, high, low, high + 3, low - 3, 2.5, -1, 1])
    return np.r_[draw, corners].reshape(2, 3, 3, 4)


@pytest.mark.core
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.usefixtures("float64")
def test_a_learned_step_has_the_values_and_gradients_of_lsq(bits, rectified):
    low, high = (0, 2**bits - 1) if rectified else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    form = LearnedStep(4, bits=bits, rectified=rectified)
    unit, multiple = 0.25, 1.5  # powers of two and sums of them, so that ties are exact
    form.unit.set_value(jnp.float32(unit))
    form.step.set_value(jnp.float32(multiple))
    step = unit * multiple
    x = values_with_corners(step, low, high)
    cotangent = np.random.default_rng(1).normal(size=x.shape)
    value, by_x, by_step = lsq(x, step, low, high)
    for train in (False, True):
        y, dx, grads = pulled(form, x, cotangent, train=train)
        np.testing.assert_array_equal(y, value)
        np.testing.assert_array_equal(dx, by_x * cotangent)
    # In training, with the paper's factor for an image of 3 * 3 * 4 values; SGD then changes the
    # multiple of the unit by as much as it would the step, divided by the unit.
    expected = (by_step * cotangent).sum() / np.sqrt(36 * high) / unit
    np.testing.assert_allclose(grads["step"], expected, rtol=1e-6)
    codes, found = form.integers(jnp.asarray(x))
    assert codes.dtype == jnp.int32
    assert found == step
    np.testing.assert_array_equal(np.asarray(codes) * np.asarray(found), value)


@pytest.mark.core
def test_the_first_training_batch_sets_the_step_and_no_later_one():
    form = LearnedStep(3, bits=4)
    first, second = np.random.default_rng(0).normal(size=(2, 8, 5, 5, 3)).astype(np.float32) * 7
    # Before it, the step is that of standard normal values, in evaluation too.
    form(jnp.asarray(first))
    assert form.unit[...] == 0
    large = np.random.default_rng(1).normal(size=10**6)
    (_, step) = form.integers(jnp.asarray(first))
    np.testing.assert_allclose(step, 2 * np.abs(large).mean() / np.sqrt(7), rtol=5e-3)
    # A batch of zeros sets nothing.
    assert not form(jnp.zeros((2, 4, 4, 3)), train=True).any()
    assert form.unit[...] == 0
    form(jnp.asarray(first), train=True)
    expected = 2 * np.abs(first).mean() / np.sqrt(7)
    np.testing.assert_allclose(form.unit[...], expected, rtol=1e-6)
    form(jnp.asarray(second), train=True)
    np.testing.assert_allclose(form.integers(jnp.asarray(second))[1], expected, rtol=1e-6)


@pytest.mark.core
def test_a_step_stays_above_zero_and_can_grow_again():
    form = LearnedStep(3, bits=4)
    form.unit.set_value(jnp.float32(0.5))
    form.step.set_value(jnp.float32(-0.2))
    x = np.full((1, 1, 1, 3), 9.0, np.float32)
    y, _, grads = pulled(form, x, -np.ones_like(x), train=True)
    np.testing.assert_allclose(y, 7 * 0.5 / 1024)
    assert grads["step"] < 0


@pytest.mark.core
@pytest.mark.parametrize("threshold", [0.0, 0.25])
@pytest.mark.usefixtures("float64")
def test_signs_and_their_clipped_straight_through_gradient(threshold):
    x = threshold + np.array([-2, -1, -0.5, -0.0, 0.0, 0.5, 1, 1.25, 3]).reshape(1, 1, 3, 3)
    cotangent = np.random.default_rng(0).normal(size=x.shape)
    form = quantizers.activation("rsign", 3) if threshold else quantizers.activation("sign", 3)
    if threshold:
        form.threshold.set_value(jnp.full(3, threshold, jnp.float32))
    y, dx, grads = pulled(form, x, cotangent)
    centred = x - threshold
    np.testing.assert_array_equal(y, np.where(centred >= 0, 1, -1))
    passed = np.where(np.abs(centred) <= 1, cotangent, 0)
    np.testing.assert_array_equal(dx, passed)
    if threshold:
        np.testing.assert_allclose(grads["threshold"], -passed.sum((0, 1, 2)), rtol=1e-6)
    codes, step = form.integers(jnp.asarray(x))
    assert step == 1
    np.testing.assert_array_equal(codes, y)


@pytest.mark.core
def test_the_running_shares_are_of_clipped_values_and_dead_channels():
    x = np.zeros((4, 16, 2, 3), np.float32)
    x[..., 0] = 10  # always clipped
    x[0, 0, 0, 1] = 1
    x[:, 3:5, :, 1] = 1  # of every eighth row, so none of these
    form = LearnedStep(3, bits=2, rectified=True)
    form.unit.set_value(jnp.float32(1.0))
    signs = ShiftedSign(3)
    nonzero, positive = np.full(3, 0.5), np.full(3, 0.5)
    clipped = 0.0
    for _ in range(70):
        form(jnp.asarray(x), train=True)
        signs(jnp.asarray(x - 0.5), train=True)
        nonzero = 0.9 * nonzero + 0.1 * np.array([1, 1 / 16, 0])
        positive = 0.9 * positive + 0.1 * np.array([1, 1 / 16, 0])
        clipped = 0.9 * clipped + 0.1 / 3
    np.testing.assert_allclose(form.clipped[...], clipped, rtol=1e-5)
    np.testing.assert_allclose(form.nonzero[...], nonzero, rtol=1e-4)
    np.testing.assert_allclose(signs.nonzero[...], positive, rtol=1e-4)
    assert form.dead().tolist() == [False, False, True]
    assert signs.dead().tolist() == [True, False, True]


# In layers and networks


def padded_product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A 3x3 convolution, padded by zeros."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ w[i, j] for i in range(3) for j in range(3)
    )


@pytest.mark.core
@pytest.mark.parametrize("name", ["sign", "int4"])
def test_a_convolution_is_padded_with_zeros_though_no_sign_is_zero(name):
    conv = Conv(4, 6, 3, activations=name, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    codes, step = conv.activation.integers(jnp.asarray(x))
    expected = padded_product(np.asarray(codes) * np.float64(step), np.asarray(conv.weight()))
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-5)


def moved(x: np.ndarray) -> np.ndarray:
    """Shifts by interleaved offsets of 3x3; zeros come in from outside."""
    y = np.zeros_like(x)
    channels = x.shape[-1] // 9 * 9
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    for c in range(x.shape[-1]):
        dh, dw = (c // 3 % 3 - 1, c % 3 - 1) if c < channels else (0, 0)
        y[..., c] = padded[:, 1 + dh : 1 + dh + height, 1 + dw : 1 + dw + width, c]
    return y


@pytest.mark.parametrize("name", ["int4", "sign", "rsign"])
@pytest.mark.usefixtures("float64")
def test_a_shift_block_quantizes_before_the_shift_which_brings_in_zeros(name):
    block = ShiftConvBlock(4, 4, 1, middle_features=20, activations=name, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4))
    w1, w2 = (np.asarray(conv.weight()[0, 0], np.float64) for conv in (block.conv1, block.conv2))
    normal = 1 / np.sqrt(1 + 1e-5)  # the running statistics of a new batch norm

    def quantized(conv, values):
        if name.endswith("sign"):
            return np.where(values >= 0, 1.0, -1.0)
        form = conv.activation
        step = float(form.integers(jnp.asarray(values))[1])
        return np.rint(np.clip(values / step, form.low, form.high)) * step

    def relu(values):
        if name == "sign":
            return values
        return np.where(values > 0, values, 0.25 * values if name == "rsign" else 0)

    y = relu(quantized(block.conv1, x) @ w1 * normal)
    y = moved(quantized(block.conv2, y)) @ w2
    np.testing.assert_allclose(block(jnp.asarray(x)), relu(y * normal) + x, rtol=1e-6, atol=1e-6)
    assert block.conv1.activation.bits == block.conv2.activation.bits


@pytest.mark.parametrize(
    ("arch", "name"), [*((arch, "int4") for arch in ARCHS), ("resnet8", "rsign")]
)
def test_every_network_quantizes_all_inputs_but_the_first_and_last_and_trains_through_them(
    arch, name, monkeypatch
):
    network = networks.abstract(config(arch, activations=name), 10)
    found = quantizers.activations_of_layers(network)
    floats = {layer for layer in quantizers.of_layers(network) if layer not in found}
    assert floats == ({"conv0", "conv_last"} if arch == "wrn8" else {"conv1", "linear"})
    # Each form is called once, and told that this is training: it sets its statistics then.
    kind = type(next(iter(found.values())))
    original, calls = kind.__call__, []

    def spy(self, x, *, train=False):
        calls.append((id(self), train))
        return original(self, x, train=train)

    monkeypatch.setattr(kind, "__call__", spy)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    nnx.eval_shape(lambda model, x: model(x, train=True), network, x)
    assert len(calls) == len(set(calls)) == len(found)
    assert all(train for _, train in calls)


@pytest.mark.parametrize(
    "arch",
    [
        *("shiftresnet8", "depthwiseresnet8"),
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("resnet8", "wrn8")),
    ],
)
def test_inputs_are_unsigned_only_where_nothing_is_negative(arch, monkeypatch):
    least = []
    original = LearnedStep.__call__

    def spy(self, x, *, train=False):
        jax.debug.callback(
            lambda low, lowest: least.append((int(low), float(lowest))), self.low, x.min()
        )
        return original(self, x, train=train)

    monkeypatch.setattr(LearnedStep, "__call__", spy)
    network = networks.random(config(arch, activations="int4"), 10)
    networks.evaluate(network, np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("f4"))
    jax.effects_barrier()
    assert len(least) == len(quantizers.activations_of_layers(network))
    for low, lowest in least:
        assert lowest >= 0 or low < 0
    signed = sum(low < 0 for low, _ in least)
    # ShiftResNet: first convolutions and shortcuts. Depthwise: behind the depthwise convolution.
    assert signed == {"shiftresnet8": 5, "depthwiseresnet8": 3}.get(arch, 0)


def test_float_activations_leave_no_trace_in_a_network():
    plain = networks.abstract(config("shiftresnet8"), 10)
    assert not quantizers.activations_of_layers(plain)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(plain))}
    assert not any("activation" in name or "relu" in name for name in names)


def test_an_unknown_form_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="unknown activation form 'int5'; did you mean 'int"):
        models.check(config("shiftresnet8", activations="int5"))


@pytest.mark.parametrize("name", ["int4", pytest.param("rsign", marks=pytest.mark.slow)])
def test_a_packed_network_computes_the_same_to_the_bit(name, tmp_path):
    _, recipe = small("s3", 2)
    recipe.model.activations = name
    network = networks.random(recipe.model, 10)
    fold_batch_norms(network)
    expected = networks.evaluate(network, np.moveaxis(images(), -1, 1))
    packing.write(tmp_path / "net.safetensors", network, note(recipe), rest="float32")
    found = shiftnet.load(tmp_path / "net.safetensors").network
    np.testing.assert_array_equal(networks.evaluate(found, np.moveaxis(images(), -1, 1)), expected)


def test_counts_tell_the_bits_of_activations_and_learned_steps_belong_to_their_layer():
    plain = {
        layer.name: layer for layer in count(networks.abstract(config("shiftresnet8"), 10)).layers
    }
    network = networks.abstract(config("shiftresnet8", activations="int4"), 10)
    for layer in count(network).layers:
        before = plain[layer.name]
        is_float = layer.name in ("conv1", "linear") or ".bn" in layer.name or layer.name == "bn1"
        is_float |= layer.name.endswith("projection.1")
        assert layer.activation_bits == (32 if is_float else 4), layer.name
        assert layer.multiply_adds == before.multiply_adds
        assert layer.parameters == before.parameters + (not is_float)
        assert layer.output == before.output
