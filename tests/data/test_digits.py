"""The handwritten digits that come with the package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shiftnet import data

FILE = Path(data.__file__).with_name("digits.npz")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_the_split_is_the_documented_one(digits):
    assert digits.train.images.shape == (1442, 32, 32, 3)
    assert digits.test.images.shape == (355, 32, 32, 3)
    for split in digits.train, digits.test:
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    assert np.bincount(digits.test.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert digits.validation is None


def test_every_image_of_the_file_is_in_one_split(digits):
    with np.load(FILE) as file:
        small, labels = file["images"], file["labels"]
    order = np.argsort(labels, kind="stable")
    fifth = np.concatenate([np.arange(n) % 5 == 4 for n in np.bincount(labels)])
    for split, chosen in (digits.test, fifth), (digits.train, ~fifth):
        at = np.sort(order[chosen])
        np.testing.assert_array_equal(split.labels, labels[at])
        # Each pixel of the file lies between the two middle ones of its four, so their mean over a
        # linear stretch is the pixel itself; at peaks and edges it falls short of it.
        blocks = split.images[..., 0].reshape(-1, 8, 4, 8, 4).astype(float)
        enlarged = blocks[:, :, 1:3, :, 1:3].mean((2, 4))
        assert np.corrcoef(enlarged.ravel(), small[at].ravel())[0, 1] > 0.99


def test_enlarging_interpolates_linearly_between_the_centres(digits):
    # Pillow is an independent implementation of the same resampling.
    with np.load(FILE) as file:
        small, labels = file["images"], file["labels"]
    for digit in range(10):
        first = small[np.flatnonzero(labels == digit)[0]].astype(np.float32) * (255 / 16)
        want = np.asarray(Image.fromarray(first).resize((32, 32), Image.Resampling.BILINEAR))
        got = digits.train.images[np.flatnonzero(digits.train.labels == digit)[0]]
        for channel in range(3):
            np.testing.assert_allclose(got[..., channel], want, atol=0.501)
    assert digits.train.images.min() == 0
    assert digits.train.images.max() == 255


def test_the_normalization_is_that_of_the_training_images(digits):
    pixels = digits.train.images / 255
    np.testing.assert_allclose(digits.mean, pixels.mean((0, 1, 2)), atol=5e-5)
    np.testing.assert_allclose(digits.std, pixels.std((0, 1, 2)), atol=5e-5)


def test_the_file_stays_small():
    assert FILE.stat().st_size < 100_000


@pytest.mark.core
def test_digits_need_neither_tfds_nor_pillow_nor_a_data_directory():
    code = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "PIL", "sklearn"):
    sys.modules[name] = None
from shiftnet import data
assert len(data.load("digits", data_dir="/nowhere").test) == 355
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
