"""ShiftNet runs its blocks as one operation each; here against the layers, one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.kernels.implementations import lowered_for, only_xla
from shiftnet.kernels.layouts import from_nhwc, to_nhwc
from shiftnet.models.folding import fold_batch_norms
from shiftnet.models.shiftnet import CSCBlock, ShiftNet

pytestmark = pytest.mark.usefixtures("float64")


def randomized(net):
    """Every parameter and every running statistic in float64, none at a value that hides it."""
    rng = np.random.default_rng(0)
    for variable in jax.tree.leaves(net, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        value = variable[...]
        drawn = rng.uniform(0.5, 1.5, value.shape) if value.ndim == 1 else np.asarray(value)
        variable.set_value(jnp.asarray(drawn, jnp.float64))
    return net


def learned(net, x, *, train, only_layers, layout=None):
    """Outputs, running statistics, and gradients of all parameters and of x."""
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)

    def loss(params, x):
        copy = nnx.merge(graphdef, params, stats, copy=True)
        y = copy(x, train=train) if layout is None else copy(x, train=train, layout=layout)
        return jnp.sin(y).sum(), (y, nnx.state(copy, nnx.BatchStat))

    def run(params, x):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    # A CPU would evaluate by layers in either case.
    with only_xla() if only_layers else lowered_for("gpu"):
        return jax.jit(run)(params, x)


def assert_close(found, expected):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max() + 1e-13)

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("layout", "stride", "kernel_size", "size"),
    [("NHWC", 1, 3, 5), ("NHWC", 2, 5, 6), ("NHWC", 2, 3, 1)],
)
def test_a_block_is_its_layers(train, layout, stride, kernel_size, size):
    block = functools.partial(CSCBlock, 5, 5 * stride, stride, kernel_size=kernel_size)
    net = randomized(block(expansion=6, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, size, size + 2, 5)))
    (_, (y, stats)), (params, dx) = learned(
        net, from_nhwc(x, layout), train=train, only_layers=False, layout=layout
    )
    found = (to_nhwc(y, layout), stats), (params, to_nhwc(dx, layout))
    (_, expected), gradients = learned(net, x, train=train, only_layers=True)
    assert_close(found, (expected, gradients))


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_a_network_is_its_layers(train):
    net = randomized(ShiftNet(3, width=0.125, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 45, 32, 3)))
    found, expected = (
        learned(net, x, train=train, only_layers=only_layers) for only_layers in (False, True)
    )
    assert_close(found, expected)


def test_a_folded_network_runs_its_blocks_too():
    net = randomized(ShiftNet(3, width=0.125, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 45, 32, 3)))
    before = np.asarray(net(x))
    fold_batch_norms(net)
    with lowered_for("gpu"):
        after = nnx.jit(lambda net, x: net(x))(net, x)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
