"""The order in which an epoch takes the training images, drawn on the host."""

import functools

import numpy as np


def generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Returns the random numbers of an epoch, by Philox; of each stream others.

    Args:
      seed: of the run, 0 to 2^64 - 1.
      epoch: counted from 0.
      stream: likewise.
    """
    return np.random.Generator(np.random.Philox(key=seed | epoch << 64, counter=stream << 128))


@functools.lru_cache(maxsize=2)  # where an epoch ends, a worker may need two
def shuffled(seed: int, epoch: int, length: int) -> np.ndarray:
    """Returns a permutation of `length` images, int32 `[length]`."""
    return generator(seed, epoch, 0).permutation(np.arange(length, dtype=np.int32))


def balanced(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """Returns an order in which every class comes equally often, give or take one.

    A class with few images has all of them, again and again, each time in another order; of a class
    with many only some are taken.

    Args:
      seed, epoch: as for `generator`.
      labels: int32 `[N]`, each image's class.

    Returns:
      int32 `[N]`, indices of images.
    """
    rng = generator(seed, epoch, 0)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    places = rng.permutation(len(labels))
    order = np.empty(len(labels), np.int32)
    for number, images in enumerate(members):
        own = places[number :: len(members)]
        rounds = -(-len(own) // len(images))
        drawn = np.concatenate([rng.permutation(images) for _ in range(rounds)])
        order[own] = drawn[: len(own)]
    return order
