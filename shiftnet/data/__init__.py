"""Data sets (`load`), and what happens to their images on the device (`augment`).

`digits` is in this package and needs nothing else; `cifar10` and `cifar100` are TensorFlow
Datasets directories, downloaded and prepared on first use (see `shiftnet.data.cifar`). These are
held in memory. `imagenet2012`, other prepared sets (see `shiftnet.data.tfds_source`) and folders
of image files (see `shiftnet.data.folder`), which `shiftnet prepare` may have resized (see
`shiftnet.data.prepared`), are read image by image, by `shiftnet.data.stream`; images that are made
small are read once and held in memory too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shiftnet import errors
from shiftnet.config import SMALL, DataConfig
from shiftnet.data import cifar, digits
from shiftnet.data.classes import listed
from shiftnet.data.parts import Source, Split, Subset, digest

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
    "described",
    "load",
    "load_test",
    "normalization",
    "of_recipe",
]

IN_MEMORY = (*cifar.NAMES, *digits.NAMES)
IMAGENET = "imagenet2012"
NAMES = (*IN_MEMORY, IMAGENET)
SOURCES = ("tfds", "folder", "hf")

# Of ImageNet, as torchvision's recipes have them; also for other image files.
IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# The part of a folder's images that is held out for the test where it has no folder for that.
TEST_SHARE = 0.1

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
      undivided: the digest of the images that `test` was drawn from where there are no others to
        test on, see `parts.digest`; else empty.
    """

    name: str
    train: Split | Source
    test: Split | Source
    validation: Split | Source | None
    class_names: tuple[str, ...]
    mean: RGB
    std: RGB
    found: str = ""
    undivided: str = ""

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
      held_out: whether they were drawn from the images that a network learned from.
      undivided: as in `Dataset`, of held-out images.
    """

    name: str
    part: Split | Source
    class_names: tuple[str, ...]
    found: str = ""
    held_out: bool = False
    undivided: str = ""


def load(
    name: str,
    *,
    source: str = "tfds",
    data_dir: str = "",
    validation: float = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    url: str = "",
    sha256: str = "",
    exif: bool = True,
    size: int = 0,
    resize: int = 0,
    workers: int = -1,
    on_corrupt: str = "error",
) -> Dataset:
    """Opens a data set, and downloads and prepares a CIFAR before that if it must.

    The held-out images are chosen once and for all: they depend on `validation` and on the size
    of the set alone, not on the seed of a run, so that runs with other seeds are compared on the
    same images and no image moves between training and validation when a run is resumed.

    Args:
      name: one of `NAMES`, or a name on the Hugging Face hub; a folder has none.
      source: `"tfds"`; `"folder"` for the image files in `data_dir`; or `"hf"` for a Hugging Face
        data set, on disk in `data_dir` or else on the hub.
      data_dir: the TFDS directory, which holds for example `cifar100/3.0.2`. Empty stands for
        `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`. Not used by `digits`.
      validation: how many training images to hold out; below 1: which part of them.
      mean, std: as in `normalization`.
      url, sha256: another source of the CIFAR archive, and another digest to hold it to; empty
        stands for the official ones. Used only to prepare a CIFAR that is not there yet.
      exif: whether the images of a folder are turned as their EXIF orientation says; those of
        `imagenet2012` never are, whose published results are without.
      size: side in pixels of the images that a folder's are made into; up to `SMALL` they are read
        now and held in memory, and 0 leaves them in their files whatever their size will be.
      resize: of images that are held in memory, the shorter side before the center crop; 0: `size`.
      workers: of images that are held in memory, the processes that decode them, see
        `shiftnet.data.workers.num_workers`.
      on_corrupt: of these, whether to raise for a file that cannot be decoded (`"error"`) or leave
        it out (`"skip"`).

    Raises:
      UserError: for an unknown name, a `validation` out of range, or data that is not there and
        cannot be fetched, is damaged, or is in a form that needs TensorFlow.
    """
    if source not in SOURCES:
        raise errors.unknown("data.source", source, SOURCES)
    if source != "tfds" or name not in IN_MEMORY:
        small = is_small(name, source, size)
        dataset = _in_files(name, source, data_dir, validation, mean, std, exif, small, size)
        return _read(dataset, size, resize or size, workers, on_corrupt) if small else dataset
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


def load_test(
    name: str,
    *,
    source: str = "tfds",
    data_dir: str = "",
    exif: bool = True,
    size: int = 0,
    trained_on: bool = False,
    undivided: str = "",
    listing: str = "",
) -> TestSet:
    """Opens the images of a data set to evaluate on.

    Args:
      name, source, data_dir, exif: as for `load`, but a folder may lack `train`, or hold the class
        folders itself.
      size: side in pixels of what is seen of the images.
      trained_on: whether a network learned from what lies there, so that where images of it were
        held out for the test, only these are taken.
      undivided: likewise wherever a copy of these images lies, see `Dataset.undivided`.
      listing: a CSV file that lists the images of the folder and their classes, in place of class
        folders; see `folder.ListedSource`.

    Raises:
      UserError: as `load`.
    """
    if source != "folder":
        dataset = load(name, source=source, data_dir=data_dir, exif=exif)
        test, found, of = dataset.test, dataset.found, dataset.undivided
        learned_from = bool(of) and (trained_on or of == undivided)
        if of and not learned_from:
            from shiftnet.data import hf_source

            test, _ = hf_source.open_splits(name, data_dir, exif=exif)
            found = f"{len(test)} images of {len(test.class_names)} classes"
        return TestSet(
            dataset.name,
            test,
            dataset.class_names,
            found,
            held_out=learned_from,
            undivided=of if learned_from else "",
        )
    from shiftnet.data import folder

    exif = exif and name != IMAGENET
    if listing:
        listed_images = folder.ListedSource(listing, data_dir, exif=exif)
        return TestSet(data_dir, listed_images, listed_images.class_names)
    if trained_on or undivided:
        images = folder.open_undivided(data_dir, exif=exif)
        if images is not None and (trained_on or digest(images) == undivided):
            dataset = _in_files(name, source, data_dir, 0, (), (), exif, small=False, size=size)
            of = dataset.undivided
            return TestSet(
                data_dir,
                dataset.test,
                images.class_names,
                dataset.found,
                held_out=True,
                undivided=of,
            )
    test = folder.open_test(data_dir, exif=exif)
    folder.check_side(test, size, data_dir)
    return TestSet(data_dir, test, test.class_names, folder.found(test))


def source_of(directory: Path, data: DataConfig) -> str:
    """Returns the `data.source` of what a directory holds, for a network of a recipe.

    Args:
      directory: has prepared data sets, what `datasets` saved, or images.
      data: of the recipe that the network was trained by.
    """
    from shiftnet.data import hf_source

    if hf_source.is_saved(directory):
        return "hf"
    known = data.name in (*cifar.NAMES, IMAGENET) or (directory / data.name).is_dir()
    of_tfds = data.source == "tfds" and data.name not in digits.NAMES and known
    return "tfds" if of_tfds and cifar.holds_datasets(directory) else "folder"


def described(data: DataConfig) -> str:
    """Returns what the images of a recipe are called, for a person to read."""
    if data.source == "folder":
        return "a folder of images"
    return "a Hugging Face data set" if data.source == "hf" and data.dir else data.name


def is_small(name: str, source: str, size: int) -> bool:
    """Tells whether image files made into `size` pixels a side are held in memory."""
    return 0 < size <= SMALL and (name != IMAGENET or source != "tfds")


def fit(data: DataConfig, side: int) -> None:
    """Fills in the sizes of image files that a recipe leaves to its network.

    Args:
      data: a recipe's `config.data`; changed.
      side: of the images that the network was made for, in pixels.

    Raises:
      UserError: for a `data.resize` below the size, and crops of files whose images are held in
        memory.
    """
    if data.source == "tfds" and data.name in IN_MEMORY:
        return
    data.size = data.size or side
    if is_small(data.name, data.source, data.size):
        data.resize = data.resize or data.size
        usual = DataConfig()
        for field in ("crop_scale", "crop_ratio"):
            if data[field] != usual[field]:
                raise errors.UserError(
                    f"data.{field} would be ignored: images of {data.size} pixels a side are held "
                    f"in memory and cropped by data.pad; leave it at {usual[field]}"
                )
    if 0 < data.resize < data.size:
        raise errors.UserError(
            f"data.resize must be at least {data.size}, the side of the network's images, or 0; "
            f"found {data.resize}"
        )


def of_recipe(data: DataConfig) -> Dataset:
    """Loads the data set that a recipe's `config.data` names, after `fit`; see `load`."""
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
        size=data.size,
        resize=data.resize,
        workers=data.workers,
        on_corrupt=data.on_corrupt,
    )


def _in_files(
    name: str,
    source: str,
    data_dir: str,
    validation: float,
    mean: Sequence[float],
    std: Sequence[float],
    exif: bool,
    small: bool,
    size: int = 0,
) -> Dataset:
    train: Source
    test: Source | None
    undivided = ""
    if source == "folder":
        if not data_dir:
            raise errors.UserError(
                "data.dir is empty; expected the folder that holds train and val"
            )
        from shiftnet.data import folder

        train, test = folder.open_training(data_dir, exif=exif and name != IMAGENET)
        folder.check_side(train, size, data_dir)
        names, name = train.class_names, data_dir
        found = folder.found(train, test)
        if test is None:
            undivided = digest(train)
            train, test = _divided(train, _chosen(name, len(train), TEST_SHARE))
            found += f"; no folder {folder.TEST[0]}: {len(test)} of them are held out for the test"
    elif source == "hf":
        from shiftnet.data import hf_source

        train, test = hf_source.open_splits(name, data_dir, exif=exif)
        names, name = train.class_names, data_dir or name
        found = f"{len(train)} training images of {len(names)} classes"
        if test is None:
            undivided = digest(train)
            train, test = _divided(train, _chosen(name, len(train), TEST_SHARE))
            found += f"; no test split: {len(test)} of them are held out for the test"
        else:
            found += f" and {len(test)} test images"
    else:
        directory = cifar.root(data_dir)
        if name != IMAGENET and not (directory / name).is_dir():
            raise errors.unknown("dataset", name, NAMES)
        from shiftnet.data import tfds_source  # TFDS takes seconds to import

        train = tfds_source.TfdsSource(directory, name, "train")
        test = tfds_source.TfdsSource(directory, name, "test")
        names = train.class_names
        found = f"{len(train)} training and {len(test)} test images"
    held_out = None
    if validation:
        train, held_out = _divided(train, _chosen(name, len(train), validation))
    # What a network of small images was trained on before, if anything, was a CIFAR.
    own = normalization(cifar.NAMES[0] if small else IMAGENET, mean, std)
    return Dataset(name, train, test, held_out, names, *own, found, undivided)


def _divided(source: Source, chosen: np.ndarray) -> tuple[Source, Source]:
    """Returns the images that are not chosen, and those that are."""
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def _read(dataset: Dataset, size: int, resize: int, workers: int, on_corrupt: str) -> Dataset:
    """Reads all images of a data set in files."""
    from shiftnet.data.stream import read_all  # Grain takes seconds to import

    parts: dict[str, Any] = {}
    found = f"{dataset.found}; resized to {size}x{size} and held in memory"
    for which in ("train", "test", "validation"):
        source = getattr(dataset, which)
        if source is None:
            continue
        parts[which], skipped = read_all(
            source, size=size, resize=resize, workers=workers, on_corrupt=on_corrupt
        )
        if skipped:
            found += f"; left out {len(skipped)} corrupt {which} files: {listed(skipped)}"
    return replace(dataset, found=found, **parts)


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


def num_validation(name: str, images: int, validation: float) -> int:
    """Returns how many of a data set's training images `data.validation` holds out.

    Args:
      name: of the data set, for the error.
      images: how many there are.
      validation: their number, or below 1 a part of them, of which at least one is taken.

    Raises:
      UserError: where none would be left to learn from.
    """
    is_share = 0 < validation < 1
    count = max(1, round(validation * images)) if is_share else int(validation)
    if not 0 <= count < images:
        raise errors.UserError(
            f"data.validation is {validation:g}; expected 0 to {images - 1}, since {name} has "
            f"{images} training images"
        )
    return count


def _chosen(name: str, images: int, validation: float) -> np.ndarray:
    """Draws which of the training images are held out, bool [images]; see `num_validation`."""
    # RandomState, not Generator: NumPy promises never to change what it draws.
    chosen = np.zeros(images, bool)
    count = num_validation(name, images, validation)
    chosen[np.random.RandomState(0).permutation(images)[:count]] = True
    return chosen
