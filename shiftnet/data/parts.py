"""The forms in which the images of a split come: in memory, or read when asked for."""

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:  # the digits need neither Pillow nor a JPEG library
    from shiftnet.data.images import Encoded


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


class Source(Protocol):
    """Some images that are read when asked for, in a fixed order; picklable."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """Returns what an image is called, such as its path."""
        ...

    def __getitem__(self, index: int, /) -> "Encoded":
        """Reads an image as it is stored.

        Raises:
          CorruptImage: if it cannot be read.
        """
        ...


class Whole(Source, Protocol):
    """All images of a split, which others are drawn from.

    Attributes:
      labels: int32 [N], of each image.
    """

    labels: np.ndarray

    def own_name(self, index: int, /) -> str:
        """Returns what an image is called wherever the split lies, prepared or not."""
        ...


def digest(source: Whole) -> str:
    """Returns the SHA-256, in hexadecimal, of the names and labels of a split's images, in order.

    Copies of the split have the same, and prepared ones, and hardly any other images have.
    """
    names = "\0".join(map(source.own_name, range(len(source))))
    return hashlib.sha256(os.fsencode(names) + source.labels.astype("<i4").tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of a source.

    Attributes:
      source: what they are taken from.
      indices: int [N], which.
    """

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 [N], of each image; None where they are not known without reading the images."""
        labels = getattr(self.source, "labels", None)
        return None if labels is None else labels[self.indices]

    def name(self, index: int, /) -> str:
        return self.source.name(int(self.indices[index]))

    def __getitem__(self, index: int, /) -> "Encoded":
        return self.source[int(self.indices[index])]
