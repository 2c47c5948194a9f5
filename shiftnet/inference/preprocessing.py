"""From people's images to a network's input."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import shiftnet.data
from shiftnet import models
from shiftnet.config import Config
from shiftnet.data import RGB, augment, cifar, images
from shiftnet.data.images import CorruptImage
from shiftnet.files import path_of
from shiftnet.interchange.convert import UNKNOWN

# One image: the path of a file, an image of Pillow's, or uint8 [H, W, 3] or (grey) [H, W].
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


class Preprocessing(NamedTuple):
    """Resizes images, takes their middle and normalizes them, as in the network's evaluation.

    Attributes:
      size: side in pixels of the middle that is taken.
      resize: what the shorter side is resized to before that, in pixels.
      exif: whether images are turned as their EXIF orientation says.
      mean: per channel, for pixels in [0, 1]; subtracted.
      std: likewise; divided by.
    """

    size: int
    resize: int
    exif: bool
    mean: RGB
    std: RGB

    @classmethod
    def of(cls, config: Config, mean: RGB, std: RGB) -> "Preprocessing":
        """Returns what a recipe's network was evaluated with.

        A network that was trained on a data set without files, such as a CIFAR, takes whole images
        in that data set's size, or else in the size that its family was made for.
        """
        data, usual = config.data, models.image_size(config.model.arch)
        size = data.size or usual
        resize = data.resize or round(size * 8 / 7)
        if data.source == "tfds" and data.name in (*shiftnet.data.IN_MEMORY, UNKNOWN):
            usual = cifar.SIDE if data.name in shiftnet.data.IN_MEMORY else usual
            if usual != data.size:
                size = resize = usual
        return cls(size, resize, data.exif, mean, std)

    def pixels(self, image: ImageLike) -> np.ndarray:
        """Returns what the network sees of an image, before it is normalized.

        Args:
          image: a path, an image of Pillow's, or an array, uint8 [H, W, 3] or [H, W].

        Returns:
          uint8 [size, size, 3].

        Raises:
          CorruptImage: if a file cannot be read or decoded.
          ValueError: for an array of another shape or dtype.
          TypeError: for anything else.
        """
        if isinstance(image, str | os.PathLike):
            try:
                content = path_of(image, "the image").read_bytes()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise CorruptImage(os.fspath(image), f"cannot be read ({reason})") from error
            return images.for_evaluation(
                content,
                size=self.size,
                resize=self.resize,
                name=os.fspath(image),
                exif=self.exif,
            )
        if isinstance(image, np.ndarray | jax.Array):
            array = np.asarray(image)
            if (
                array.dtype != np.uint8
                or array.ndim not in (2, 3)
                or array.shape[2:] not in {(), (3,)}
                or not array.size
            ):
                raise ValueError(
                    "expected an image as uint8 [H, W, 3] or [H, W], "
                    f"got {array.dtype} {array.shape}"
                )
            image = Image.fromarray(array)
        if not isinstance(image, Image.Image):
            raise TypeError(f"expected a path, a PIL image or an array, got {type(image).__name__}")
        return images.middle(image, size=self.size, resize=self.resize, exif=self.exif)

    def __call__(self, images: np.ndarray | ImageLike | Iterable[ImageLike]) -> jax.Array:
        """Returns the network's input for images.

        Args:
          images: one or more, as of `pixels`; or a uint8 array [N, H, W, 3], which is normalized
            alone, in the size that it has.

        Returns:
          float32 [N, size, size, 3].

        Raises:
          ValueError, TypeError: as `pixels`.
        """
        return self.normalize(self.stack(images))

    def stack(self, images: np.ndarray | ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Returns uint8 [N, size, size, 3]; as in calling, without normalizing."""
        if (array := stacked(images)) is not None:
            return array
        found = [self.pixels(image) for image in each(images)]
        return np.stack(found) if found else np.zeros((0, self.size, self.size, 3), np.uint8)

    def normalize(self, pixels: np.ndarray) -> jax.Array:
        """Normalizes uint8 [N, H, W, 3] to float32."""
        return augment.normalize(jnp.asarray(pixels), self.mean, self.std)


def stacked(images: object) -> np.ndarray | None:
    """Returns an array of images as it is; None for anything but an array.

    Raises:
      ValueError: for an array that is not uint8 [N, H, W, 3].
    """
    if not isinstance(images, np.ndarray | jax.Array):
        return None
    array = np.asarray(images)
    empty = 0 in array.shape[1:]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or empty:
        raise ValueError(f"expected uint8 [N, H, W, 3], got {array.dtype} {array.shape}")
    return array


def each(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Returns the images of an iterable, or the one that was given alone."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    return images
