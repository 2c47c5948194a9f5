"""Data sets: on the host as uint8 arrays (`load`), on the device as batches (`augment`).

`digits` is in this package and needs nothing else; `cifar10` and `cifar100` are TensorFlow
Datasets directories, downloaded and prepared on first use (see `shiftnet.data.cifar`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shiftnet import errors
from shiftnet.data import cifar, digits

NAMES = (*cifar.NAMES, *digits.NAMES)

RGB = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Split:
    """Some images and their classes, in a fixed order.

    Attributes:
      images: uint8 [N, H, W, 3].
      labels: int32 [N], indices into `Dataset.class_names`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in host memory.

    Attributes:
      name: one of `NAMES`.
      train: the images to learn from, without those held out.
      test: the published test split.
      validation: the training images held out, or None if none are.
      class_names: one name a class, indexed by label.
      mean, std: of each channel, for pixels in [0, 1]; see `normalization`.
    """

    name: str
    train: Split
    test: Split
    validation: Split | None
    class_names: tuple[str, ...]
    mean: RGB
    std: RGB


def load(
    name: str,
    *,
    data_dir: str = "",
    validation: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    url: str = "",
    sha256: str = "",
) -> Dataset:
    """Reads a data set, and downloads and prepares it before that if it must.

    The held-out images are chosen once and for all: they depend on `validation` and on the size
    of the set alone, not on the seed of a run, so that runs with other seeds are compared on the
    same images and no image moves between training and validation when a run is resumed.

    Args:
      name: one of `NAMES`.
      data_dir: the TFDS directory, which holds for example `cifar100/3.0.2`. Empty stands for
        `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`. Not used by `digits`.
      validation: how many training images to hold out.
      mean, std: as in `normalization`.
      url, sha256: another source of the CIFAR archive, and another digest to hold it to; empty
        stands for the official ones. Used only to prepare a CIFAR that is not there yet.

    Raises:
      UserError: for an unknown name, a `validation` out of range, or data that is not there and
        cannot be fetched, is damaged, or is in a form that needs TensorFlow.
    """
    own_mean, own_std = normalization(name, mean, std)
    if name in digits.NAMES:
        splits = digits.load()
    else:
        splits = cifar.load(name, data_dir, url=url, sha256=sha256)
    train, test = Split(*splits["train"]), Split(*splits["test"])
    held_out = None
    if validation:
        train, held_out = _hold_out(name, train, validation)
    return Dataset(name, train, test, held_out, class_names(name), own_mean, own_std)


def class_names(name: str) -> tuple[str, ...]:
    """The names of a data set's classes, indexed by label; needs no data on disk.

    Raises:
      UserError: for an unknown name.
    """
    names = {**cifar.CLASS_NAMES, **digits.CLASS_NAMES}
    if name not in names:
        raise errors.unknown("dataset", name, NAMES)
    return names[name]


def normalization(
    name: str, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> tuple[RGB, RGB]:
    """The mean and standard deviation that a network's input is normalised with.

    Needs no data on disk.

    Args:
      name: one of `NAMES`.
      mean, std: one number a channel, for pixels in [0, 1]; empty stands for the data set's own.

    Returns:
      The mean and the standard deviation, each of three channels.

    Raises:
      UserError: for an unknown name, or when there are not three finite numbers, or a standard
        deviation is not positive.
    """
    constants = {**cifar.NORMALIZATION, **digits.NORMALIZATION}
    if name not in constants:
        raise errors.unknown("dataset", name, NAMES)
    own_mean, own_std = constants[name]
    return _rgb("mean", mean or own_mean), _rgb("std", std or own_std)


def _rgb(field: str, values: Sequence[float]) -> RGB:
    numbers = tuple(float(value) for value in values)
    if (
        len(numbers) != 3
        or not np.isfinite(numbers).all()
        or (field == "std" and min(numbers) <= 0)
    ):
        kind = "positive numbers" if field == "std" else "numbers"
        raise errors.UserError(
            f"data.{field} is {numbers}; expected three {kind}, one a channel, or () for the "
            f"data set's own"
        )
    return numbers[0], numbers[1], numbers[2]


def _hold_out(name: str, train: Split, count: int) -> tuple[Split, Split]:
    if not 0 <= count < len(train):
        raise errors.UserError(
            f"data.validation is {count}; expected 0 to {len(train) - 1}, since {name} has "
            f"{len(train)} training images"
        )
    # RandomState, not Generator: NumPy promises never to change what it draws.
    chosen = np.zeros(len(train), bool)
    chosen[np.random.RandomState(0).permutation(len(train))[:count]] = True
    return (
        Split(train.images[~chosen], train.labels[~chosen]),
        Split(train.images[chosen], train.labels[chosen]),
    )
