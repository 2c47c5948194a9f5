"""The UCI handwritten digits, which come with this package (see `digits.md`)."""

from pathlib import Path

import numpy as np

NAMES = ("digits",)
CLASS_NAMES = {"digits": tuple("0123456789")}

# Mean and standard deviation over all pixels of the 1,442 training images, divided by 255; the
# three channels are equal.
NORMALIZATION = {"digits": ((0.3051, 0.3051, 0.3051), (0.3238, 0.3238, 0.3238))}


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the set, brought to the shape of CIFAR.

    The 8x8 pixels are interpolated linearly to 32x32 (a square of equal pixels for each would leave
    a shift of one pixel nothing to see), the grey levels of 0 to 16 are scaled to 0 to 255 (rounded
    to nearest), and the three channels are copies of them.

    Returns:
      `{"train": (images, labels), "test": (images, labels)}`: uint8 [N, 32, 32, 3] and int32 [N],
      with N = 1442 and 355: of each digit, every fifth image is a test image.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        grey, labels = file["images"], file["labels"].astype(np.int32)
    # Where the centre of each of the 32 pixels lies among the centres of the 8, and their weights.
    place = ((np.arange(32) + 0.5) / 4 - 0.5).clip(0, 7)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(8)))
    grey = np.floor(weights @ grey @ weights.T * (255 / 16) + 0.5).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[4::5]] = True
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}
