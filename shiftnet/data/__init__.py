"""Data sets (`load`), and what happens to their images on the device (`augment`).

`digits` is in this package and needs nothing else; `cifar10` and `cifar100` are TensorFlow
Datasets directories, downloaded and prepared on first use (see `shiftnet.data.cifar`). These are
held in memory. `imagenet2012` (see `shiftnet.data.imagenet_tfds`) and folders of image files (see
`shiftnet.data.folder`) are read image by image, by `shiftnet.data.stream`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shiftnet import errors
from shiftnet.config import DataConfig
from shiftnet.data import cifar, digits
from shiftnet.data.parts import Source, Split, Subset

__all__ = [
    "IMAGENET",
    "IN_MEMORY",
    "NAMES",
    "RGB",
    "Dataset",
    "Source",
    "Split",
    "Subset",
    "TestSet",
    "class_names",
    "load",
    "load_test",
    "normalization",
    "of_recipe",
]

IN_MEMORY = (*cifar.NAMES, *digits.NAMES)
IMAGENET = "imagenet2012"
NAMES = (*IN_MEMORY, IMAGENET)
SOURCES = ("tfds", "folder")

# Of ImageNet, as torchvision's recipes have them; also for other image files.
IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

RGB = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: in host memory (every part a `Split`), or in files (every part a `Source`).

    Attributes:
      name: one of `NAMES`, or the path of a folder.
      train: the images to learn from, without those held out.
      test: the published test split; of image files, those under `val` (see `folder.TEST`).
      validation: the training images held out, or None if none are.
      class_names: one name per class, indexed by label.
      mean, std: of each channel, for pixels in [0, 1]; see `normalization`.
      found: how many images there are of how many classes, and what was left out, in a line.
    """

    name: str
    train: Split | Source
    test: Split | Source
    validation: Split | Source | None
    class_names: tuple[str, ...]
    mean: RGB
    std: RGB
    found: str = ""

    @property
    def images(self) -> dict[str, int]:
        """The number of images of each part; validation has 0 if none are held out."""
        held_out = 0 if self.validation is None else len(self.validation)
        return {"train": len(self.train), "validation": held_out, "test": len(self.test)}


@dataclass(frozen=True, eq=False)
class TestSet:
    """Images to evaluate on.

    Attributes:
      name: one of `NAMES`, or the path of a folder.
      part: the images.
      class_names: indexed by label; those of a folder that have images there.
      found: as in `Dataset`.
    """

    name: str
    part: Split | Source
    class_names: tuple[str, ...]
    found: str = ""


def load(
    name: str,
    *,
    source: str = "tfds",
    data_dir: str = "",
    validation: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    url: str = "",
    sha256: str = "",
    exif: bool = True,
) -> Dataset:
    """Opens a data set, and downloads and prepares a CIFAR before that if it must.

    The held-out images are chosen once and for all: they depend on `validation` and on the size
    of the set alone, not on the seed of a run, so that runs with other seeds are compared on the
    same images and no image moves between training and validation when a run is resumed.

    Args:
      name: one of `NAMES`; a folder has none.
      source: `"tfds"`, or `"folder"` for the image files in `data_dir`.
      data_dir: the TFDS directory, which holds for example `cifar100/3.0.2`. Empty stands for
        `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`. Not used by `digits`.
      validation: how many training images to hold out.
      mean, std: as in `normalization`.
      url, sha256: another source of the CIFAR archive, and another digest to hold it to; empty
        stands for the official ones. Used only to prepare a CIFAR that is not there yet.
      exif: whether the images of a folder are turned as their EXIF orientation says; those of
        `imagenet2012` never are, whose published results are without.

    Raises:
      UserError: for an unknown name, a `validation` out of range, or data that is not there and
        cannot be fetched, is damaged, or is in a form that needs TensorFlow.
    """
    if source not in SOURCES:
        raise errors.unknown("data.source", source, SOURCES)
    if source == "folder" or name == IMAGENET:
        return _image_files(name, source, data_dir, validation, mean, std, exif)
    own_mean, own_std = normalization(name, mean, std)
    if name in digits.NAMES:
        splits = digits.load()
    else:
        splits = cifar.load(name, data_dir, url=url, sha256=sha256)
    train, test = Split(*splits["train"]), Split(*splits["test"])
    held_out = None
    if validation:
        chosen = _chosen(name, len(train), validation)
        held_out = Split(train.images[chosen], train.labels[chosen])
        train = Split(train.images[~chosen], train.labels[~chosen])
    found = f"{len(splits['train'][1])} training and {len(test)} test images"
    return Dataset(name, train, test, held_out, class_names(name), own_mean, own_std, found)


def load_test(name: str, *, source: str = "tfds", data_dir: str = "", exif: bool = True) -> TestSet:
    """Opens the images of a data set to evaluate on.

    Args:
      name, source, data_dir, exif: as for `load`, but a folder may lack `train`, or hold the class
        folders itself.

    Raises:
      UserError: as `load`.
    """
    if source != "folder":
        dataset = load(name, source=source, data_dir=data_dir)
        return TestSet(name, dataset.test, dataset.class_names, dataset.found)
    from shiftnet.data import folder

    test = folder.open_test(data_dir, exif=exif and name != IMAGENET)
    return TestSet(data_dir, test, test.class_names, folder.found(None, test))


def of_recipe(data: DataConfig) -> Dataset:
    """Loads the data set that a recipe's `config.data` names; see `load`."""
    return load(
        data.name,
        source=data.source,
        data_dir=data.dir,
        validation=data.validation,
        mean=data.mean,
        std=data.std,
        url=data.url,
        sha256=data.sha256,
        exif=data.exif,
    )


def _image_files(
    name: str,
    source: str,
    data_dir: str,
    validation: int,
    mean: Sequence[float],
    std: Sequence[float],
    exif: bool,
) -> Dataset:
    train: Source
    test: Source
    if source == "folder":
        if not data_dir:
            raise errors.UserError(
                "data.dir is empty; expected the folder that holds train and val"
            )
        from shiftnet.data import folder

        in_train, in_test = folder.open_training(data_dir, exif=exif and name != IMAGENET)
        train, test, names, name = in_train, in_test, in_train.class_names, data_dir
        found = folder.found(in_train, in_test)
    else:
        from shiftnet.data import imagenet_tfds  # TFDS takes seconds to import

        in_tfds = imagenet_tfds.TfdsSource(cifar.root(data_dir), "train")
        test = imagenet_tfds.TfdsSource(cifar.root(data_dir), "val")
        train, names = in_tfds, in_tfds.class_names
        found = f"{len(train)} training and {len(test)} test images"
    held_out = None
    if validation:
        chosen = _chosen(name, len(train), validation)
        held_out = Subset(train, np.flatnonzero(chosen))
        train = Subset(train, np.flatnonzero(~chosen))
    return Dataset(name, train, test, held_out, names, *normalization(IMAGENET, mean, std), found)


def class_names(name: str) -> tuple[str, ...]:
    """Returns the class names of a set held in memory, by label; needs no data on disk.

    Raises:
      UserError: for an unknown name.
    """
    names = {**cifar.CLASS_NAMES, **digits.CLASS_NAMES}
    if name not in names:
        raise errors.unknown("dataset", name, IN_MEMORY)
    return names[name]


def normalization(
    name: str, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> tuple[RGB, RGB]:
    """Returns the mean and standard deviation that a network's input is normalised with.

    Needs no data on disk.

    Args:
      name: one of `NAMES`.
      mean, std: one number per channel, for pixels in [0, 1]; empty stands for the data set's own.

    Returns:
      The mean and the standard deviation, each of three channels.

    Raises:
      UserError: for an unknown name, or if there are not three finite numbers, or a standard
        deviation is not positive.
    """
    constants = {
        **cifar.NORMALIZATION,
        **digits.NORMALIZATION,
        IMAGENET: IMAGENET_NORMALIZATION,
    }
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
            f"data.{field} is {numbers}; expected three {kind}, one per channel, or () for the "
            f"data set's own"
        )
    return numbers[0], numbers[1], numbers[2]


def _chosen(name: str, length: int, count: int) -> np.ndarray:
    """Draws which of the training images are held out, bool [length]."""
    if not 0 <= count < length:
        raise errors.UserError(
            f"data.validation is {count}; expected 0 to {length - 1}, since {name} has "
            f"{length} training images"
        )
    # RandomState, not Generator: NumPy promises never to change what it draws.
    chosen = np.zeros(length, bool)
    chosen[np.random.RandomState(0).permutation(length)[:count]] = True
    return chosen
