"""Folding batch norms into convolutions, and whole networks after training, changes no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.kernels import native
from shiftnet.kernels.implementations import only_xla
from shiftnet.kernels.shift import plain as plain_shift
from shiftnet.layers import BatchNorm, Conv, fold_batch_norm
from shiftnet.layers.folding import Packed, fix_weights, fold_batch_norms, pack_weights
from shiftnet.quantizers import Float, LowBitWeight, of_layers
from tests import networks
from tests.models.test_build import config


@pytest.mark.core
@pytest.mark.parametrize("arch", ["shiftresnet8", "depthwiseresnet8", "wrn8"])
def test_folding_changes_no_logits(arch):
    model = networks.random(config(arch), 10)
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    before = networks.evaluate(model, x)
    fold_batch_norms(model)
    assert not nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    np.testing.assert_allclose(networks.evaluate(model, x), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be trained"):
        model(np.moveaxis(x, 1, -1), train=True)


@pytest.mark.core
@pytest.mark.parametrize(
    ("form", "fix"),
    [("sign", Float.of), ("s3", LowBitWeight.quantized), ("denseshift", LowBitWeight.quantized)],
)
def test_fixing_weights_changes_no_logits(form, fix):
    model = networks.random(config("shiftresnet8", weights=form), 10)
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    before = networks.evaluate(model, x)
    fix_weights(model, fix)
    assert {type(weight) for weight in of_layers(model).values()} == {Float}  # the ends otherwise
    np.testing.assert_allclose(networks.evaluate(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arch", ["resnet8", "depthwiseresnet8", "mobileresnet8", "shuffleresnet8", "wrn8"]
)
def test_packed_weights_and_joint_operations_change_no_logits(arch):
    """In a network for predictions on a CPU, against layers that run one by one in plain XLA."""
    model = networks.random(config(arch), 10)
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    apart = nnx.clone(model)
    for _, layer in list(nnx.iter_modules(apart)):
        if isinstance(layer, Conv):
            object.__setattr__(layer, "__class__", type("Own", (Conv,), {}))
    with only_xla():
        before = networks.evaluate(apart, x)
    pack_weights(model)
    if native.load().library is not None:
        assert nnx.to_flat_state(nnx.state(model, Packed))
    np.testing.assert_allclose(networks.evaluate(model, x), before, rtol=1e-4, atol=1e-4)


def of(kernel: jax.Array) -> Conv:
    """A 1x1 convolution with this kernel, `[C, features]`."""
    return Conv(*kernel.shape, 1, init=lambda *_: kernel[None, None], rngs=nnx.Rngs(0))


# One row and one column for each channel, some beyond the image.
OFFSETS = ([0, 1, -2, 3, 0], [0, -1, 1, 0, -5])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("affine", "offsets"), [(True, OFFSETS), (True, None), (False, OFFSETS)])
@pytest.mark.usefixtures("float64")
def test_a_folded_batch_norm_is_the_one_after_the_convolution(train, affine, offsets):
    """Values, gradients and running statistics."""
    offsets = offsets and tuple(map(np.array, offsets))
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(1, 2, (4, 3, 2, 3))), jnp.asarray(rng.normal(size=(3, 5)))
    bn = BatchNorm(5, affine=affine)
    for variable in jax.tree.leaves(bn, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        variable.set_value(jnp.asarray(rng.uniform(0.5, 2, 5)))

    def folded(bn, x, kernel):
        kernel, bias = fold_batch_norm(of(kernel), bn, x, train=train, offsets=offsets)
        return moved(x @ kernel) + bias

    def in_turn(bn, x, kernel):
        return bn(moved(x @ kernel), train=train)

    def moved(y):
        return y if offsets is None else plain_shift(y, *offsets)

    def run(forward):
        graphdef, params, stats = nnx.split(bn, nnx.Param, nnx.BatchStat)

        def loss(params, x, kernel):
            copy = nnx.merge(graphdef, params, stats, copy=True)
            y = forward(copy, x, kernel)
            return jnp.sin(y).sum(), (y, nnx.state(copy, nnx.BatchStat))

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x, kernel)

    found, expected = run(folded), run(in_turn)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    jax.tree.map(compare, found, expected)


def test_a_mean_far_from_zero_costs_no_digits():
    x = np.random.default_rng(0).normal(1000, 1, (4096, 4)).astype(np.float32)
    kernel = np.eye(4, dtype=np.float32)
    bn = BatchNorm(4)
    fold_batch_norm(of(jnp.asarray(kernel)), bn, jnp.asarray(x), train=True)
    variance = x.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(bn.var[...], 0.9 + 0.1 * variance, rtol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("common", [0, 100, 1e4, 1e6])
def test_a_kernel_that_cancels_what_channels_share_keeps_its_bound_and_stays_finite(
    common, shifted
):
    """The truth is the layers' own formula in float64."""
    rng = np.random.default_rng(0)
    x = common * rng.normal(size=(8, 32, 32, 1)) * rng.uniform(0.5, 2, 8)
    x += rng.normal(size=(8, 32, 32, 8))
    kernel = rng.normal(size=(8, 12)) / 3
    _, _, (strongest, *_) = np.linalg.svd((x - x.mean((0, 1, 2))).reshape(-1, 8), False)
    kernel -= np.outer(strongest, strongest @ kernel)
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    offsets = (np.arange(12) % 3 - 1, np.arange(12) // 3 % 3 - 1) if shifted else None

    def loss(x, kernel):
        bn = BatchNorm(12)
        folded, bias = fold_batch_norm(of(kernel), bn, x, train=True, offsets=offsets)
        return jnp.sin(x @ folded + bias).sum(), folded

    (_, folded), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    if shifted:
        with jax.enable_x64(True):
            exact = np.asarray(plain_shift(jnp.asarray(exact), *offsets))
    variance = exact.var((0, 1, 2)) + 1e-5
    deviations = x.astype(np.float64).std((0, 1, 2))
    bound = np.finfo(np.float32).eps * (deviations @ abs(kernel)) ** 2
    error = abs(np.asarray(folded) * np.sqrt(variance) / kernel - 1)
    assert (error <= np.minimum(bound / variance, 1) + 1e-6).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
