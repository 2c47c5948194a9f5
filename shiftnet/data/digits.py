"""The UCI handwritten digits, which come with this package (see `digits.md`)."""

from pathlib import Path

import numpy as np

NAMES = ("digits",)
CLASS_NAMES = {"digits": tuple("0123456789")}

# Mean and standard deviation over all pixels of the 1,415 training images, divided by 255; the
# three channels are equal.
NORMALIZATION = {"digits": ((0.3055, 0.3055, 0.3055), (0.3754, 0.3754, 0.3754))}

# The last three of the fourteen filled-in forms that the file consists of.
TEST_IMAGES = 382


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the set, brought to the shape of CIFAR.

    Every pixel becomes a square of 4x4, its grey level of 0 to 16 is scaled to 0 to 255 (rounded
    to nearest), and the three channels are copies of it.

    Returns:
      `{"train": (images, labels), "test": (images, labels)}`: uint8 [N, 32, 32, 3] and int32 [N],
      with N = 1415 and 382.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        grey, labels = file["images"].astype(np.int32), file["labels"].astype(np.int32)
    grey = ((grey * 255 + 8) // 16).astype(np.uint8)
    images = np.repeat(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=-1)
    return {
        "train": (images[:-TEST_IMAGES], labels[:-TEST_IMAGES]),
        "test": (images[-TEST_IMAGES:], labels[-TEST_IMAGES:]),
    }
