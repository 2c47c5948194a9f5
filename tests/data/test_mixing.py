"""Mixup, CutMix and random erasing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.data.mixing import erase, mix

IMAGES = np.random.default_rng(0).normal(1.0, 0.1, (6, 8, 10, 3)).astype(np.float32)
TARGETS = np.eye(6, dtype=np.float32)


def mixed(seed, **alphas):
    images, targets = mix(jax.random.key(seed), jnp.asarray(IMAGES), jnp.asarray(TARGETS), **alphas)
    return np.asarray(images), np.asarray(targets)


def test_mixup_averages_an_image_with_its_neighbour_by_its_targets_share():
    shares = set()
    for seed in range(4):
        images, targets = mixed(seed, mixup=0.4, cutmix=0.0)
        share = targets[0, 0]
        shares.add(float(share))
        expected = share * IMAGES + (1 - share) * np.roll(IMAGES, 1, 0)
        np.testing.assert_allclose(images, expected, rtol=1e-5)
        np.testing.assert_allclose(targets, share * TARGETS + (1 - share) * np.roll(TARGETS, 1, 0))
    assert len(shares) == 4
    assert all(0 <= share <= 1 for share in shares)


def test_cutmix_shows_the_neighbour_in_a_rectangle_of_its_targets_share():
    some = 0
    for seed in range(6):
        images, targets = mixed(seed, mixup=0.0, cutmix=1.0)
        other = np.roll(IMAGES, 1, 0)
        inside = (images == other).all(-1)
        assert ((images == IMAGES).all(-1) | inside).all()
        assert (inside == inside[0]).all()
        rows, columns = np.nonzero(inside[0])
        if len(rows):
            some += 1
            box = inside[0][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all(), "the pixels do not form a rectangle"
        np.testing.assert_allclose(targets[0, 0], 1 - inside[0].mean(), rtol=1e-6)
    assert some


def test_both_take_turns_at_random():
    kinds = set()
    for seed in range(12):
        images, _ = mixed(seed, mixup=1.0, cutmix=1.0)
        kinds.add(bool((images == IMAGES).any() or (images == np.roll(IMAGES, 1, 0)).all()))
    assert kinds == {True, False}


def test_nothing_is_mixed_without_either():
    images, targets = mixed(0, mixup=0.0, cutmix=0.0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(targets, TARGETS)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_erasing_sets_a_rectangle_of_an_images_share_to_the_mean(probability):
    count = 400
    images = jnp.ones((count, 12, 9, 3))
    erased = np.asarray(erase(jax.random.key(1), images, probability)) == 0
    assert (erased.all(-1) == erased.any(-1)).all()
    shares = erased[..., 0].mean((1, 2))
    assert abs((shares > 0).mean() - probability) < 0.1
    for mask in erased[..., 0][shares > 0][:50]:
        rows, columns = np.nonzero(mask)
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    if probability:
        assert shares[shares > 0].min() > 0.005
        assert shares.max() < 0.4
