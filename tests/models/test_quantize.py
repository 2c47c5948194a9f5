"""Any Flax network with low-bit weights: it computes nearly the same, and can be trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shiftnet
from shiftnet import quantizers
from shiftnet.errors import UserError

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


class Net(nnx.Module):
    """Layers in an attribute, in a list, in a sequence, and one in two places."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs) for _ in "ab"])
        self.tied = self.blocks[0]
        self.head = nnx.Sequential(
            nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 5, rngs=rngs)
        )

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(self.tied(x).mean((1, 2)))


LAYERS = {"blocks.1", "head.layers.0", "head.layers.2", "stem"}


def test_eight_bits_change_little_and_a_layer_in_two_places_stays_one():
    network = Net()
    before = network(X)
    tied = {*shiftnet.quantize(network, "int", bits=8)} - LAYERS
    assert len(tied) == 1  # under one of its names
    assert network.tied is network.blocks[0]
    assert len(quantizers.of_layers(network)) == 5
    np.testing.assert_allclose(network(X), before, atol=0.03 * np.abs(before).max())
    np.testing.assert_array_equal(nnx.jit(lambda net, x: net(x))(network, X), network(X))


@pytest.mark.parametrize(("weights", "bits"), [("sign", 0), ("s3", 3), ("ternary", 0), ("pot", 4)])
def test_weights_are_levels_times_a_factor_near_the_kernel(weights, bits):
    network, plain = Net(), Net()
    shiftnet.quantize(network, weights, bits=bits, skip=["stem", "head.*"])
    assert isinstance(network.stem, nnx.Conv)
    kernel, layer = np.asarray(plain.blocks[1].kernel[...]), network.blocks[1]
    assert len(np.unique(layer.weight())) <= len(layer.weight.levels)
    new = layer.factor * np.asarray(layer.weight())
    assert np.corrcoef(new.ravel(), kernel.ravel())[0, 1] > 0.75
    # No other factor would be nearer.
    assert np.square(new - kernel).sum() <= np.square(1.01 * new - kernel).sum()
    assert np.square(new - kernel).sum() <= np.square(0.99 * new - kernel).sum()


def test_gradients_reach_the_latents_and_activations_settle_on_the_first_batch():
    network = Net()
    shiftnet.quantize(network, "s3", activations="int8", skip=["stem"])
    network.eval()
    shape = jax.tree.map(np.asarray, nnx.state(network, nnx.BatchStat))
    network(X)
    jax.tree.map(np.testing.assert_array_equal, shape, nnx.state(network, nnx.BatchStat))
    network.train()
    gradients = nnx.grad(lambda net: (net(X) ** 2).sum())(network)
    flat = dict(nnx.to_flat_state(gradients))
    latents = {path: leaf for path, leaf in flat.items() if "weight" in path}
    assert len({path[: path.index("weight")] for path in latents}) == 4
    assert all(np.abs(leaf[...]).max() > 0 for leaf in latents.values())


def test_a_network_in_evaluation_stays_in_it():
    class Normed(nnx.Module):
        def __init__(self):
            self.mix = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.mix(x))

    network = Normed()
    network.eval()
    shiftnet.quantize(network, "int", activations="int8")
    before = jax.tree.map(np.asarray, nnx.state(network))
    network(X)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(network))


def test_it_computes_within_any_transformation():
    network = Net()
    shiftnet.quantize(network, "int", bits=4)
    network.eval()
    want = network(X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(jax.jit(lambda x: network(x))(X), want)
    close(jax.vmap(lambda x: network(x[None])[0])(X), want)
    close(jax.lax.map(lambda x: network(x[None])[0], X), want)
    assert jax.eval_shape(network, X).shape == want.shape
    assert np.abs(jax.grad(lambda x: network(x).sum())(X)).max() > 0


class Depthwise(nnx.Module):
    def __init__(self, features=4):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 4, (1, 1), rngs=rngs)
        self.each = nnx.Conv(features, 4, (3, 3), feature_group_count=features, rngs=rngs)

    def __call__(self, x):
        return self.each(self.first(x))


@pytest.mark.parametrize("activations", ["int8", "rsign"])
def test_a_depthwise_convolution_has_as_many_steps_or_thresholds_as_channels(activations):
    network, plain = Depthwise(), Depthwise()
    shiftnet.quantize(network, "int", activations=activations, skip=["first"])
    network.train()
    quantized = network(X)
    assert quantized.shape == (*X.shape[:3], 4)
    if activations == "int8":
        np.testing.assert_allclose(quantized, plain(X), atol=0.05 * np.abs(plain(X)).max())
    else:
        assert network.each.activation.threshold.shape == (4,)


def test_layers_get_other_forms_one_call_after_the_other():
    network = Depthwise()
    assert shiftnet.quantize(network, "s3", skip=["each"]) == ["first"]
    assert shiftnet.quantize(network, "int", bits=8, skip=["first"]) == ["each"]
    forms = quantizers.of_layers(network)
    assert {path: type(form).__name__ for path, form in forms.items()} == {
        "first": "S3",
        "each": "Int",
    }
    assert np.isfinite(network(X)).all()
    with pytest.raises(UserError, match=r"no nnx\.Conv or nnx\.Linear to quantize"):
        shiftnet.quantize(network, "s3")


@pytest.mark.parametrize("weights", ["s3", "sign", "apot"])
def test_all_that_it_computes_with_is_in_its_state(weights):
    networks = [Depthwise(), Depthwise()]
    networks[1].first.kernel[...] = 3 * networks[1].first.kernel[...]
    for network in networks:
        shiftnet.quantize(network, weights)
    graphdefs, states = zip(*map(nnx.split, networks), strict=True)
    assert graphdefs[0] == graphdefs[1]
    for network, state in zip(networks, states, strict=True):
        np.testing.assert_array_equal(nnx.merge(graphdefs[0], state)(X), network(X))
    assert not np.allclose(networks[0](X), networks[1](X))
    # Not trained.
    gradients = nnx.grad(lambda network: network(X).sum())(networks[0])
    assert not any("factor" in path for path, _ in nnx.to_flat_state(gradients))


def test_layers_in_tuples_are_replaced():
    class Blocks(nnx.Module):
        def __init__(self):
            layers = [nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(3)]
            self.blocks = nnx.data((layers[0], {"deep": (layers[1],)}, layers[0]))
            self.last = layers[2]

        def __call__(self, x):
            first, middle, tied = self.blocks
            return self.last(tied(middle["deep"][0](first(x))))

    network = Blocks()
    before = network(X)
    assert len(shiftnet.quantize(network, "int", bits=8)) == 3
    assert network.blocks[0] is network.blocks[2]
    assert len(quantizers.of_layers(network)) == 3
    np.testing.assert_allclose(network(X), before, atol=0.05 * np.abs(before).max())


def test_the_dtype_stays():
    rngs = nnx.Rngs(0)
    network = nnx.Sequential(
        nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=rngs),
        nnx.Linear(4, 4, dtype=jnp.bfloat16, rngs=rngs),
    )
    x = X.astype(jnp.bfloat16)
    shiftnet.quantize(network, "int", bits=8)
    assert network(x).dtype == network.layers[0](x).dtype == jnp.bfloat16


@pytest.mark.parametrize("weights", ["sign", "denseshift", "int"])
def test_zeros_stay_zeros_or_are_refused(weights):
    network = Depthwise()
    network.each.kernel[...] = 0 * network.each.kernel[...]
    if weights == "int":
        shiftnet.quantize(network, weights)
        assert not np.any(network(X))
        return
    with pytest.raises(UserError, match=f"each has a kernel of zeros, and {weights} has no zero"):
        shiftnet.quantize(network, weights)
    assert not np.any(network(X)), "it was changed"


def test_a_kernel_of_three_dimensions_or_a_layer_alone_is_refused_and_unchanged():
    network = nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Conv(4, 4, 3, rngs=nnx.Rngs(0))
    )
    before = network(X[0, :, :4, :1] * np.ones(4))
    with pytest.raises(UserError, match=r"layers\.1 has a kernel of 3 dimensions"):
        shiftnet.quantize(network, "int")
    np.testing.assert_array_equal(network(X[0, :, :4, :1] * np.ones(4)), before)
    with pytest.raises(UserError, match="the network is a layer itself"):
        shiftnet.quantize(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "int")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"skip": ["stm"]}, "no layer's path matches 'stm'; there are .*stem"),
        ({"skip": ["*"]}, r"no nnx\.Conv or nnx\.Linear to quantize"),
        ({"weights": "s4"}, "unknown weight form 's4'"),
        ({"activations": "int9"}, "unknown activation form 'int9'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(options, sentence):
    network = Net()
    before = network(X)
    with pytest.raises(UserError, match=sentence):
        shiftnet.quantize(network, **{"weights": "s3", **options})
    np.testing.assert_array_equal(network(X), before)


class Tied(nnx.Module):
    """Two layers with one kernel, each with its own bias; a third module may hold it too."""

    def __init__(self, third=False):
        self.first, self.second = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in "ab")
        self.second.kernel = self.first.kernel
        if third:
            self.table = self.first.kernel

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.parametrize("weights", ["ternary", "s3"])
def test_the_size_of_a_kernel_does_not_matter(weights):
    def outputs(size):
        network = nnx.Sequential(nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0)))
        network.layers[0].kernel.set_value(network.layers[0].kernel[...] * size)
        shiftnet.quantize(network, weights)
        return network(X.reshape(-1, 64)) / size

    np.testing.assert_allclose(outputs(1e-7), outputs(1), rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_kernel_share_its_weight():
    network, x = Tied(), X[0, 0, :, :1] * np.ones(4, np.float32)
    before = network(x)
    assert shiftnet.quantize(network, "int", bits=8) == ["first", "second"]
    assert network.first.weight is network.second.weight
    np.testing.assert_allclose(network(x), before, atol=0.03 * np.abs(before).max())


@pytest.mark.parametrize(
    ("third", "skip", "sentence"),
    [
        (False, ["first"], "second shares its kernel with first, which is not replaced"),
        (True, [], "first shares its kernel with the network itself, which is not replaced"),
    ],
)
def test_a_kernel_that_would_be_shared_no_more_is_refused(third, skip, sentence):
    network = Tied(third)
    with pytest.raises(UserError, match=sentence):
        shiftnet.quantize(network, "int", skip=skip)
    assert network.first.kernel is network.second.kernel


def test_a_network_within_a_transformation_is_refused():
    def inside(network):
        shiftnet.quantize(network, "int")

    with pytest.raises(UserError, match=r"first is traced: quantize before jax\.jit"):
        nnx.jit(inside)(Tied())
