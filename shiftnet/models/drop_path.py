"""Stochastic depth: in training, residual branches are left out for some images.

Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382, with the branches that stay
scaled up in training, as timm and torchvision do, so that evaluation needs no change. The rate
rises linearly over the branches, up to that of the last one.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet.models.network import Network


class _Dropping:
    """What `drop_path` does while one forward pass is traced."""

    def __init__(self, keys: jax.Array | None, rate: float, branches: int):
        self.keys, self.rate, self.branches = keys, rate, branches
        self.numbers = itertools.count(1)


_current: contextvars.ContextVar[_Dropping | None] = contextvars.ContextVar("drop", default=None)


def drop_path(branch: jax.Array) -> jax.Array:
    """Leaves a residual branch out for some images, within `dropping`; elsewhere returns it.

    Args:
      branch: `[N, H, W, C]`, what a block adds to its shortcut.
    """
    dropping = _current.get()
    if dropping is None:
        return branch
    number = next(dropping.numbers)
    if dropping.keys is None:  # they are counted
        return branch
    keep = 1 - dropping.rate * number / dropping.branches

    def is_kept(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), keep)

    factors = jax.vmap(is_kept)(dropping.keys).astype(branch.dtype) / keep
    return branch * factors[:, None, None, None]


def path_dropper() -> Callable[[jax.Array], jax.Array] | None:
    """Returns `drop_path` within `dropping`, and None where it would do nothing."""
    return None if _current.get() is None else drop_path


@contextlib.contextmanager
def dropping(keys: jax.Array | None, rate: float, branches: int) -> Iterator[None]:
    """Drops paths of the network that is called within, in training.

    Args:
      keys: a random key for each image, `[N]`; None drops nothing.
      rate: the probability that the last branch is left out, below 1.
      branches: from `count_branches`.
    """
    token = _current.set(None if keys is None else _Dropping(keys, rate, branches))
    try:
        yield
    finally:
        _current.reset(token)


def count_branches(network: Network) -> int:
    """Counts the residual branches of a network, with numbers or without."""
    counting = _Dropping(None, 0.0, 0)
    graphdef, state = nnx.split(network)

    def run(state: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(images, train=True)

    token = _current.set(counting)
    try:
        jax.eval_shape(run, state, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    finally:
        _current.reset(token)
    return next(counting.numbers) - 1
