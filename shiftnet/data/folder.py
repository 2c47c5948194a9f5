"""Images in folders, one a class: `train/<class>/*` and `val/<class>/*`, as PyTorch users have."""

import os
from pathlib import Path

import numpy as np

from shiftnet.data.images import Encoded
from shiftnet.errors import UserError

SPLITS = ("train", "val")
EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")  # in any case of letters


class FolderSource:
    """The images of a split, sorted by class and then by file name, and read when asked for.

    A class is a folder; its label is its place among the sorted names, which is how torchvision's
    `ImageFolder` numbers them. Hidden folders and files, and files without one of `EXTENSIONS`, are
    left out. What is pickled is the list of names, about 25 bytes an image for ImageNet.

    Args:
      directory: holds `train` and `val`.
      split: `"train"` or `"val"`.

    Attributes:
      class_names: the names of the folders, indexed by label.
      labels: int32 [N], of each image.

    Raises:
      UserError: when the directory is not laid out so, or a class has no images.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str) -> None:
        root = Path(directory).expanduser()
        if not root.is_dir():
            raise UserError(f"{root} is not a directory; expected one that holds train and val")
        if missing := [name for name in SPLITS if not (root / name).is_dir()]:
            raise UserError(
                f"{root} has no folder {missing[0]}; expected train/<class>/* and val/<class>/*"
            )
        self._folder = root / split
        try:
            names = sorted(name for name in os.listdir(self._folder) if not name.startswith("."))
            classes = [name for name in names if (self._folder / name).is_dir()]
            if not classes:
                loose = sum(name.lower().endswith(EXTENSIONS) for name in names)
                images = f"; move its {loose} images into one folder a class" if loose else ""
                raise UserError(f"{self._folder} has no class folders{images}")
            files = [_images(self._folder / name) for name in classes]
        except OSError as error:
            raise UserError(f"{self._folder} cannot be read ({error})") from error
        self.class_names = tuple(classes)
        counts = [len(in_class) for in_class in files]
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
        # One string of bytes, not a million objects: this goes to every worker process.
        encoded = [os.fsencode(name) for in_class in files for name in in_class]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Encoded:
        """Reads an image's file.

        Raises:
          IndexError: when there is no such image.
          UserError: when the file cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        label = int(self.labels[index])
        file = os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])
        path = self._folder / self.class_names[label] / file
        try:
            return Encoded(path.read_bytes(), label, str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def _images(folder: Path) -> list[str]:
    names = sorted(
        name
        for name in os.listdir(folder)
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )
    if not names:
        raise UserError(f"{folder} has no images; expected files that end in {_listed()}")
    return names


def _listed() -> str:
    return f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"


def check_same_classes(train: FolderSource, val: FolderSource) -> None:
    """Refuses two splits whose labels stand for different classes.

    Raises:
      UserError: when a class is in one of them and not in the other.
    """
    for has, lacks in ((train, val), (val, train)):
        if missing := sorted(set(has.class_names) - set(lacks.class_names)):
            raise UserError(
                f"{lacks._folder} has no folder {missing[0]}, which {has._folder} has "
                f"({len(missing)} such classes of {len(has.class_names)})"
            )
