"""The door of the data package: names, normalisation and held-out images."""

import numpy as np
import pytest

from shiftnet import data
from shiftnet.config import DataConfig
from shiftnet.errors import UserError


def test_an_unknown_data_set_names_the_nearest():
    for function in data.load, data.class_names, data.normalization:
        with pytest.raises(UserError, match="unknown dataset 'cifar1000'; did you mean 'cifar100'"):
            function("cifar1000")


@pytest.mark.parametrize("name", data.IN_MEMORY)
def test_names_and_normalisation_need_no_data(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    names = data.class_names(name)
    assert len(names) == len(set(names)) == {"cifar100": 100}.get(name, 10)
    mean, std = data.normalization(name)
    assert len(mean) == len(std) == 3


def test_both_cifars_are_normalised_as_the_original_recipe_does():
    expected = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    assert data.normalization("cifar10") == data.normalization("cifar100") == expected


def test_the_normalisation_can_be_chosen():
    own_mean, own_std = data.normalization("digits")
    assert data.normalization("digits", mean=(0.1, 0.2, 0.3)) == ((0.1, 0.2, 0.3), own_std)
    assert data.normalization("digits", std=[1, 2, 3]) == (own_mean, (1.0, 2.0, 3.0))
    assert data.load("digits", mean=(0, 0, 0), std=(1, 1, 1)).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("field", "values"),
    [("mean", (0.5,)), ("mean", (0.5, np.nan, 0.5)), ("std", (1, 1, 0)), ("std", (1, 1, 1, 1))],
)
def test_a_wrong_normalisation_is_a_sentence(field, values):
    with pytest.raises(UserError, match=rf"data\.{field} is .*; expected three"):
        data.normalization("cifar10", **{field: values})


def rows(split):
    pairs = zip(split.images, split.labels.tolist(), strict=True)
    return {(image.tobytes(), label) for image, label in pairs}


def test_held_out_images_are_no_longer_trained_on_and_none_is_lost():
    whole = data.load("digits")
    held = data.load("digits", validation=200)
    assert len(held.validation) == 200
    assert len(held.train) == len(whole.train) - 200
    assert rows(held.train) | rows(held.validation) == rows(whole.train)
    assert not rows(held.train) & rows(held.validation)
    np.testing.assert_array_equal(held.test.images, whole.test.images)


def test_the_same_images_are_held_out_every_time():
    # The choice is part of every result that was selected on it: it must never change.
    held = data.load("digits", validation=8)
    train = data.load("digits").train.images
    positions = [
        int(np.flatnonzero((train == image).all((1, 2, 3)))[0]) for image in held.validation.images
    ]
    assert positions == [52, 159, 364, 432, 590, 893, 1240, 1432]


@pytest.mark.parametrize("count", [-1, 1442, 5000])
def test_holding_out_too_many_is_a_sentence(count):
    with pytest.raises(UserError, match=f"data.validation is {count}; expected 0 to 1441"):
        data.load("digits", validation=count)


@pytest.mark.parametrize("field", ["crop_scale", "crop_ratio"])
def test_crops_of_files_are_refused_for_images_in_memory(field):
    settings = DataConfig(source="folder", dir="x", **{field: (0.9, 1.0)})
    data.fit(settings, 224)
    settings.size = 0
    with pytest.raises(UserError, match=f"data.{field} would be ignored: images of 32 pixels"):
        data.fit(settings, 32)


def test_a_folder_of_photos_with_a_class_named_downloads_is_one_of_photos(tmp_path):
    recipe = DataConfig(name="cifar100")
    (tmp_path / "downloads").mkdir()
    assert data.source_of(tmp_path, recipe) == "tfds"
    (tmp_path / "cats").mkdir()
    assert data.source_of(tmp_path, recipe) == "folder"
