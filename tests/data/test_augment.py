"""The on-device augmentation, against restatements in NumPy."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.data import augment
from shiftnet.errors import UserError

pytestmark = pytest.mark.core


def random_images(count, side=32, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3))
    return images.astype(np.uint8)


# The order of an epoch


def test_an_epoch_visits_every_example_once():
    order = augment.epoch_order(0, 0, 1000)
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))


def test_the_order_depends_on_seed_and_epoch_alone():
    order = augment.epoch_order(3, 5, 100)
    np.testing.assert_array_equal(order, augment.epoch_order(3, 5, 100))
    traced = jax.jit(augment.epoch_order, static_argnums=2)(jnp.int32(3), jnp.int32(5), 100)
    np.testing.assert_array_equal(order, traced)
    for other in (4, 5), (3, 6), (5, 3):
        assert (np.asarray(order) != np.asarray(augment.epoch_order(*other, 100))).any()


def test_the_order_is_not_biased():
    # Where does example 0 end up? 2000 epochs in 10 bins; 27.9 is the 99.9 % point of
    # chi-square with 9 degrees of freedom.
    orders = jax.vmap(lambda epoch: augment.epoch_order(0, epoch, 50))(jnp.arange(2000))
    places = np.argmin(np.asarray(orders), axis=1)
    counts = np.bincount(places // 5, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_order_and_augmentation_do_not_share_their_random_numbers():
    keys = {
        tuple(jax.random.key_data(augment._key(7, stream, number)).tolist())
        for stream in (augment._ORDER, augment._AUGMENT)
        for number in range(100)
    }
    assert len(keys) == 200


# Crops and flips


def crop_flip_numpy(images, offsets, flips, pad, pad_mode):
    mode = {"zero": "constant", "reflect": "reflect"}[pad_mode]
    side = images.shape[1]
    out = []
    for image, (top, left), flip in zip(images, offsets, flips, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=mode)
        crop = padded[top : top + side, left : left + side]
        out.append(np.fliplr(crop) if flip else crop)
    return np.stack(out)


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
@pytest.mark.parametrize(("pad", "side"), [(4, 32), (1, 8), (0, 8), (7, 8)])
def test_every_place_and_flip_gives_the_crop_that_numpy_gives(pad, side, pad_mode):
    places = 2 * pad + 1
    offsets = np.stack(np.divmod(np.arange(places**2), places), axis=1).repeat(2, axis=0)
    flips = np.arange(len(offsets)) % 2 == 1
    images = random_images(len(offsets), side)
    found = augment.crop_flip_at(images, offsets, flips, pad=pad, pad_mode=pad_mode)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, crop_flip_numpy(images, offsets, flips, pad, pad_mode))


@pytest.mark.parametrize("flip", [True, False])
def test_crop_flip_applies_what_draw_draws(flip):
    key, images = augment.augment_key(0, 3), random_images(64)
    offsets, flips = augment.draw(key, 64, pad=4, flip=flip)
    found = augment.crop_flip(key, images, pad=4, pad_mode="zero", flip=flip)
    np.testing.assert_array_equal(found, crop_flip_numpy(images, offsets, flips, 4, "zero"))


def test_every_place_is_as_likely_and_half_are_flipped():
    count = 81 * 250
    offsets, flips = augment.draw(jax.random.key(1), count, pad=4, flip=True)
    assert offsets.dtype == jnp.int32
    assert flips.dtype == jnp.bool_
    cells = np.asarray(offsets[:, 0] * 9 + offsets[:, 1])
    counts = np.bincount(cells, minlength=81)
    assert counts.shape == (81,)
    # The 99.9 % points of chi-square with 80 and with 2 * 81 - 1 degrees of freedom: the second
    # also fails when flips go with places.
    assert ((counts - 250) ** 2 / 250).sum() < 124.8
    joint = np.bincount(cells * 2 + np.asarray(flips), minlength=162)
    assert ((joint - 125) ** 2 / 125).sum() < 221.3
    assert abs(np.asarray(flips).mean() - 0.5) < 3.3 * 0.5 / count**0.5


def test_in_turns_each_image_is_mirrored_in_every_second_epoch_half_of_them_first():
    images, order = random_images(400, 4), np.random.default_rng(0).permutation(400)
    flipped = np.zeros((3, 400), bool)
    for epoch in range(3):
        batch = augment.flip_in_turns(5, epoch, jnp.asarray(order), images[order])
        flipped[epoch, order] = (batch != images[order]).any((1, 2, 3))
        kept = np.where(
            flipped[epoch, order, None, None, None], images[order, :, ::-1], images[order]
        )
        np.testing.assert_array_equal(batch, kept)
    np.testing.assert_array_equal(flipped[0], ~flipped[1])
    np.testing.assert_array_equal(flipped[0], flipped[2])
    assert abs(flipped[0].mean() - 0.5) < 3.3 * 0.5 / 400**0.5
    other = augment.flip_in_turns(6, 0, jnp.arange(400), images)
    assert ((other != images).any((1, 2, 3)) != flipped[0]).any()


def test_without_flip_no_image_is_mirrored():
    _, flips = augment.draw(jax.random.key(0), 1000, pad=4, flip=False)
    assert not flips.any()


def test_without_padding_and_flip_images_stay_as_they_are():
    images = random_images(16)
    found = augment.crop_flip(jax.random.key(0), images, pad=0, pad_mode="reflect", flip=False)
    np.testing.assert_array_equal(found, images)


def test_a_step_is_augmented_alike_whenever_it_is_run():
    images = random_images(32)

    @jax.jit
    def run(seed, step):
        key = augment.augment_key(seed, step)
        return augment.crop_flip(key, images, pad=4, pad_mode="zero", flip=True)

    np.testing.assert_array_equal(run(1, 7), run(1, 7))
    for other in (1, 8), (2, 7), (7, 1):
        assert (run(1, 7) != run(*other)).any()


def test_an_unknown_pad_mode_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown data\.pad_mode 'reflected'.*'reflect'"):
        augment.crop_flip(
            jax.random.key(0), random_images(2), pad=4, pad_mode="reflected", flip=True
        )


ON_DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from shiftnet.data import augment

images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)

def batch(images, step):
    order = augment.epoch_order(5, step, 64)
    key = augment.augment_key(5, step)
    crops = augment.crop_flip(key, images[order], pad=4, pad_mode="reflect", flip=True)
    return augment.normalize(crops, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

def crops(images, step):
    key = augment.augment_key(5, step)
    return augment.crop_flip(key, images, pad=4, pad_mode="zero", flip=True)

results = {}
for count in (1, 8):
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
    split, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    results[count] = (
        jax.jit(batch, in_shardings=(copied, None), out_shardings=split)(images, 3),
        jax.jit(crops, in_shardings=(split, None), out_shardings=split)(images, 3),
    )
    assert len(results[count][0].sharding.device_set) == count
for one, eight in zip(results[1], results[8], strict=True):
    np.testing.assert_array_equal(one, eight)
text = jax.jit(crops, in_shardings=(split, None), out_shardings=split).lower(images, 3).compile()
assert "all-gather" not in text.as_text() and "all-reduce" not in text.as_text()
"""


def test_eight_devices_give_what_one_gives_without_exchanging_images():
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", ON_DEVICES], check=True, cwd=root)


# Normalisation


def test_normalize_is_the_formula():
    images = random_images(8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    found = augment.normalize(images, mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    half = augment.normalize(images, mean, std, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        double = augment.normalize(images, mean, std, jnp.float64)
    assert double.dtype == np.float64
    np.testing.assert_allclose(double, expected, rtol=0, atol=1e-14)


# Cutout


def covered(images: np.ndarray, size: int, count: int) -> np.ndarray:
    """Where cutout changed black images that it drew no black pixel on, bool [count, H, W]."""
    key = augment.cutout_key(0, 0)
    changed = np.asarray(augment.cutout(key, jnp.asarray(images), size))
    assert changed.dtype == np.uint8
    return (changed != images).any(-1)


def test_cutout_puts_one_square_over_each_image_partly_beside_it():
    count, side, size = 4000, 16, 5
    images = np.zeros((count, side, side, 16), np.uint8)  # 16 channels: never black throughout
    inside = covered(images, size, count)
    places = set()
    for mask in inside:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns) > 0
        assert np.ptp(rows) == len(rows) - 1
        assert np.ptp(columns) == len(columns) - 1
        assert max(len(rows), len(columns)) <= size
        for found in (rows, columns):
            assert len(found) == size or found[0] == 0 or found[-1] == side - 1
        places.add((rows[0], rows[-1], columns[0], columns[-1]))
    # 20 x 20 places, each as likely: a pixel in the middle is covered by 25 of the 400.
    assert len(places) == 400
    share = inside.mean(0)
    assert abs(share[8, 8] - 25 / 400) < 5 * np.sqrt(25 / 400 / count)
    assert abs(share[0, 0] - 25 / 400) < 5 * np.sqrt(25 / 400 / count)


def test_cutout_draws_every_value_and_its_own_for_each_pixel():
    images = jnp.full((64, 32, 32, 3), 77, jnp.uint8)
    filled = np.asarray(augment.cutout(augment.cutout_key(0, 1), images, 100))
    assert (filled != 77).mean() > 0.2
    drawn = filled[filled != 77]
    counts = np.bincount(drawn, minlength=256)
    assert (np.delete(counts, 77) > 0).all()
    assert abs(drawn.mean() - 127.5) < 1
    assert len({image.tobytes() for image in filled}) == 64


def test_cutout_of_nothing_changes_nothing_and_the_key_follows_the_step():
    images = jnp.asarray(random_images(4))
    assert augment.cutout(augment.cutout_key(0, 0), images, 0) is images
    first, again, later = (augment.cutout(augment.cutout_key(0, s), images, 18) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(later)).any()
