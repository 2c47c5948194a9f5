"""The handwritten digits that come with the package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shiftnet import data

FILE = Path(data.__file__).with_name("digits.npz")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_the_split_is_the_documented_one(digits):
    assert digits.train.images.shape == (1415, 32, 32, 3)
    assert digits.test.images.shape == (382, 32, 32, 3)
    for split in digits.train, digits.test:
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    assert np.bincount(digits.test.labels).tolist() == [38, 39, 37, 39, 39, 39, 39, 38, 35, 39]
    assert len(digits.train) == 1415
    assert digits.validation is None


def test_no_form_is_in_both_splits(digits):
    # Every form starts with 0 1 2 ... 9 three times, so a split at a form's start does too.
    assert digits.test.labels[:30].tolist() == list(range(10)) * 3
    assert digits.train.labels[:30].tolist() == list(range(10)) * 3


def test_the_images_are_the_file_enlarged_four_times(digits):
    with np.load(FILE) as file:
        small, labels = file["images"], file["labels"]
    images = np.concatenate([digits.train.images, digits.test.images])
    expected = np.kron(np.floor(small / 16 * 255 + 0.5), np.ones((1, 4, 4)))
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], expected)
    assert images.min() == 0
    assert images.max() == 255
    np.testing.assert_array_equal(np.concatenate([digits.train.labels, digits.test.labels]), labels)


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
assert len(data.load("digits", data_dir="/nowhere").test) == 382
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
