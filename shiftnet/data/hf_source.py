"""Hugging Face data sets: from the hub, or a folder that `datasets.save_to_disk` wrote.

It takes the package `datasets`, `pip install "shiftnet[datasets]"`; from its version 4 on that runs
no code that a data set brings. What is downloaded lies in its own cache (`$HF_HOME`).
"""

from pathlib import Path
from typing import Any

import numpy as np

from shiftnet.data.images import CorruptImage, Encoded
from shiftnet.errors import UserError
from shiftnet.files import path_of

TRAIN = "train"
# The first of these that a data set has is the one to test on.
TEST = ("test", "validation", "valid", "val")
# What `save_to_disk` writes into a folder, for several splits or for one.
SAVED = ("dataset_dict.json", "state.json")


class HfSource:
    """The images of a split, read when asked for.

    Args:
      split: a `datasets.Dataset`; the first column of images and the labels named `label`, or else
        the first column of classes, are taken.
      name: of the data set and split, for errors and as the beginning of images' names.
      exif: whether images are turned as their EXIF orientation says, as `datasets` does.

    Attributes:
      class_names: indexed by label.
      labels: int32 [N], of each image.

    Raises:
      UserError: if it has no images, no classes, or an image without a class.
    """

    def __init__(self, split: Any, name: str, *, exif: bool) -> None:
        from datasets import ClassLabel, Image

        self._name, self._exif = name, exif
        images = [key for key, kind in split.features.items() if isinstance(kind, Image)]
        classes = [key for key, kind in split.features.items() if isinstance(kind, ClassLabel)]
        if not images or not classes or not len(split):
            raise UserError(
                f"{name} has {len(split)} examples of {', '.join(split.features)}; expected a "
                "column of images and one of classes (ClassLabel)"
            )
        label = "label" if "label" in classes else classes[0]
        self.class_names = tuple(split.features[label].names)
        self.labels = np.asarray(split.with_format("numpy")[label][:], np.int32)
        if self.labels.min() < 0:
            raise UserError(
                f"{name} has images without a class, such as number {self.labels.argmin()}"
            )
        self._image = images[0]
        self._images = split.select_columns([self._image]).cast_column(
            self._image, Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns what an image is called: the data set's name and the image's number."""
        return f"{self._name}[{index}]"

    def own_name(self, index: int) -> str:
        """Returns the image's number, which alone names it."""
        return str(index)

    def __getitem__(self, index: int) -> Encoded:
        """Reads an image.

        Raises:
          IndexError: if there is no such image.
          CorruptImage: if its file cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image = self._images[int(index)][self._image] or {}
        content, name = image.get("bytes"), self.name(index)
        if content is None:
            try:
                content = Path(image.get("path") or "").read_bytes()
            except OSError as error:
                raise CorruptImage(name, f"cannot be read ({error.strerror})") from error
        return Encoded(content, int(self.labels[index]), name, self._exif)


def is_saved(folder: Path) -> bool:
    """Tells whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in SAVED)


def open_splits(name: str, directory: str, *, exif: bool) -> tuple[HfSource, HfSource | None]:
    """Opens a data set's images to train on, and those to test on, or None if it has none.

    Args:
      name: on the hub, such as `AI-Lab-Makerere/beans`; not used where there is a directory.
      directory: what `save_to_disk` wrote, or a folder that `datasets.load_dataset` reads.
      exif: as of `HfSource`.

    Raises:
      UserError: if `datasets` is not installed, there is no such data set, it has no split `train`,
        or its splits have different classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            'data.source=hf needs the package datasets: pip install "shiftnet[datasets]"'
        ) from error
    what = str(path_of(directory, "data.dir")) if directory else name
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if directory and is_saved(Path(what)):
            found = datasets.load_from_disk(what)
        elif directory and not Path(what).is_dir():
            raise UserError(f"{what} is not a directory; expected what save_to_disk wrote")
        else:
            found = datasets.load_dataset(what)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and httpx each have their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what} cannot be read as a Hugging Face data set ({type(error).__name__}: {reason})"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    splits = found if isinstance(found, dict) else {TRAIN: found}
    if TRAIN not in splits:
        raise UserError(f"{what} has the splits {', '.join(splits)}; expected one named {TRAIN}")
    train = HfSource(splits[TRAIN], f"{what}/{TRAIN}", exif=exif)
    key = next((key for key in TEST if key in splits), None)
    if key is None:
        return train, None
    test = HfSource(splits[key], f"{what}/{key}", exif=exif)
    if test.class_names != train.class_names:
        raise UserError(f"{what}: {key} has other classes than {TRAIN}")
    return train, test
