"""The images that steps are chosen from."""

import numpy as np

import shiftnet.data
from shiftnet.data import Source, Split, Subset
from shiftnet.errors import UserError
from shiftnet.files import path_of
from shiftnet.inference import Classifier
from shiftnet.interchange.convert import UNKNOWN


def images(model: Classifier, directory: str | None, count: int, size: int) -> np.ndarray:
    """Reads some of the images that a network was trained on, uint8 `[count, size, size, 3]`.

    Args:
      model: the network.
      directory: where its data set is prepared, or a folder as for training; None: as in training.
      count: how many, drawn once and for all.
      size: of the images, in pixels.

    Raises:
      UserError: where there are none, or those in memory are not of that size.
    """
    found_in = part(model, directory)
    # RandomState, not Generator: NumPy promises never to change what it draws.
    chosen = np.sort(np.random.RandomState(0).permutation(len(found_in))[:count])
    if isinstance(found_in, Split):
        found = found_in.images[chosen]
        if (side := found.shape[1]) != size:
            raise UserError(
                f"--image-size is {size}, but the images that steps are chosen from have {side} "
                "pixels a side; take that, or name a folder of image files by --calibrate-on"
            )
    else:
        from shiftnet.data.stream import EvalStream  # Grain takes seconds to import

        stream = EvalStream(
            Subset(found_in, chosen),
            size=size,
            resize=round(size * model.preprocess.resize / model.preprocess.size),
            batch_size=len(chosen),
            on_corrupt="skip",
            workers=0,
        )
        (batch,) = stream
        found = batch.images[batch.labels >= 0]
    if not len(found):
        raise UserError("there are no images to calibrate on")
    return found


def part(model: Classifier, directory: str | None, *, test: bool = False) -> Split | Source:
    """Opens the training or the test set of a network; arguments as of `images`."""
    data = model.config.data
    if directory is None:
        if data.source == "tfds" and data.name == UNKNOWN:
            raise UserError(
                f"{model.path} does not say which images its network was trained on; name some by "
                "--calibrate-on"
            )
        dataset = shiftnet.data.of_recipe(data)
    else:
        place = path_of(directory, "--calibrate-on")
        if not place.is_dir() or not any(place.iterdir()):
            raise UserError(
                f"--calibrate-on must be a directory of images or of prepared data sets, found "
                f"{place}"
            )
        source = shiftnet.data.source_of(place, data)
        dataset = shiftnet.data.load(data.name, source=source, data_dir=directory, exif=data.exif)
    return dataset.test if test else dataset.train
