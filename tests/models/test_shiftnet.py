"""ShiftNet runs its blocks as one operation each; here against the layers, one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.layers.folding import fold_batch_norms
from shiftnet.layers.pooling import average_pool
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


def in_turn(block: CSCBlock, x: jax.Array, *, train: bool) -> jax.Array:
    """The block's layers, one after the other."""
    y = block.conv1(nnx.relu(block.bn1(x, train=train)))
    y = block.conv2(nnx.relu(block.bn2(block.shift(y), train=train)))
    return x + y if block.stride == 1 else jnp.concatenate([y, average_pool(x)], axis=-1)


def learned(net, x, forward):
    """Outputs, running statistics, and gradients of all parameters and of x."""
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)

    def loss(params, x):
        copy = nnx.merge(graphdef, params, stats, copy=True)
        y = forward(copy, x)
        return jnp.sin(y).sum(), (y, nnx.state(copy, nnx.BatchStat))

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)


def assert_close(found, expected):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max() + 1e-13)

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("stride", "kernel_size", "size"),
    [(1, 3, 5), (2, 5, 6), (2, 3, 1)],
)
@pytest.mark.covering
def test_a_block_is_its_layers(train, stride, kernel_size, size):
    block = functools.partial(CSCBlock, 5, 5 * stride, stride, kernel_size=kernel_size)
    net = randomized(block(expansion=6, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, size, size + 2, 5)))
    found, expected = (
        learned(net, x, functools.partial(forward, train=train))
        for forward in (CSCBlock.__call__, in_turn)
    )
    assert_close(found, expected)


def test_a_folded_network_runs_its_blocks_too():
    net = randomized(ShiftNet(3, width=0.125, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 45, 32, 3)))
    run = nnx.jit(lambda net, x: net(x))
    before = np.asarray(run(net, x))
    fold_batch_norms(net)
    after = run(net, x)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
