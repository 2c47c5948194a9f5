"""TrivialAugment's and RandAugment's operations against Pillow's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from shiftnet.data import policies

SIZE = (17, 24)  # height, width


def picture(seed=0):
    """Smooth colours with some noise, so that geometry and histograms show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [np.sin(x / 3 + k) * 60 + np.cos(y / 4 - k) * 50 + 110 + 10 * k for k in range(3)]
    noisy = np.stack(waves, -1) + rng.normal(0, 8, (*SIZE, 3))
    return np.clip(noisy, 20, 230).astype(np.uint8)


def affine(image, matrix, offset):
    """Pillow's transform with output pixel centres about the middle of the image."""
    height, width = SIZE
    (a, b), (c, d) = matrix
    dx, dy = offset
    x0 = width / 2 - a * width / 2 - b * height / 2 - dx
    y0 = height / 2 - c * width / 2 - d * height / 2 - dy
    return transform(image, (a, b, x0, c, d, y0))


def transform(image, numbers):
    return image.transform(image.size, Image.Transform.AFFINE, numbers)


def rotation(degrees):
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (cos, sin), (-sin, cos)


PILLOW = {
    "identity": lambda image, m: image,
    # As torchvision: positions are measured from the corner.
    "shear_x": lambda image, m: transform(image, (1, m, 0, 0, 1, 0)),
    "shear_y": lambda image, m: transform(image, (1, 0, 0, m, 1, 0)),
    "translate_x": lambda image, m: affine(image, ((1, 0), (0, 1)), (m, 0)),
    "translate_y": lambda image, m: affine(image, ((1, 0), (0, 1)), (0, m)),
    "rotate": lambda image, m: affine(image, rotation(m), (0, 0)),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "solarize": lambda image, m: ImageOps.solarize(image, m),
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
}
CASES = [
    *((name, m) for name in ("shear_x", "shear_y") for m in (-0.31, 0.17)),
    *((name, m) for name in ("translate_x", "translate_y") for m in (-5.0, 9.0)),
    ("rotate", -22.0),
    ("rotate", 71.0),
    *((n, m) for n in ("brightness", "color", "contrast", "sharpness") for m in (-0.63, 0.0, 0.87)),
    ("posterize", 8.0),
    ("posterize", 3.0),
    ("solarize", 255.0),
    ("solarize", 120.5),
    ("identity", 0.0),
    ("autocontrast", 0.0),
    ("equalize", 0.0),
]


def test_every_operation_is_pillows_to_one_level():
    assert {name for name, _ in CASES} == set(policies.OPERATIONS) == set(PILLOW)
    images = np.stack([picture(i) for i in range(len(CASES))])
    numbers = [policies.OPERATIONS.index(name) for name, _ in CASES]
    ours = policies.apply(
        jnp.asarray(images), jnp.array(numbers), jnp.array([m for _, m in CASES], jnp.float32)
    )
    for (name, magnitude), image, found in zip(CASES, images, np.asarray(ours), strict=True):
        expected = np.asarray(PILLOW[name](Image.fromarray(image), magnitude), np.int32)
        difference = np.abs(found.astype(np.int32) - expected)
        # A position within rounding of a pixel's edge may fall on either side.
        geometric = name.startswith(("shear", "translate", "rotate"))
        allowed = 0.01 if geometric else 0.0
        assert (difference > 1).any(-1).mean() <= allowed, f"{name} {magnitude}"


@pytest.mark.parametrize("augment", [policies.trivial_augment, policies.rand_augment])
def test_policies_follow_the_key_and_keep_shape_and_dtype(augment):
    images = jnp.asarray(np.stack([picture(i) for i in range(4)] * 16))
    once = jax.jit(augment)(jax.random.key(3), images)
    assert once.shape == images.shape
    assert once.dtype == jnp.uint8
    np.testing.assert_array_equal(once, jax.jit(augment)(jax.random.key(3), images))
    other = jax.jit(augment)(jax.random.key(4), images)
    changed = (np.asarray(once) != np.asarray(images)).any((1, 2, 3)).mean()
    assert changed > 0.5
    assert (np.asarray(once) != np.asarray(other)).any()
