"""Hugging Face data sets, written here by `datasets` itself."""

import pickle
import sys

import numpy as np
import pytest

from shiftnet import config, data
from shiftnet.data import hf_source
from shiftnet.data.images import decode
from shiftnet.errors import UserError
from tests.data import image_files

NAMES = ("cat", "dog", "eel")
RNG = np.random.default_rng(0)
PIXELS = [image_files.pixels(RNG, 40, 48) for _ in range(23)]
LABELS = [index * 2 % 3 for index in range(23)]


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs datasets, the extra of that name")


def table(datasets, part, label="label", names=NAMES, labels=LABELS):
    columns = {
        "note": ["a"] * len(PIXELS[part]),
        "picture": [{"bytes": image_files.encoded(one), "path": None} for one in PIXELS[part]],
        label: labels[part],
    }
    features = {"note": datasets.Value("string"), "picture": datasets.Image()}
    features[label] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def saved(datasets, tmp_path):
    splits = {"train": slice(0, 20), "validation": slice(20, 23)}
    whole = datasets.DatasetDict({key: table(datasets, part) for key, part in splits.items()})
    whole.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set_gives_its_files_labels_and_names(saved):
    train, test = hf_source.open_splits("", str(saved), exif=True)
    assert train.class_names == test.class_names == NAMES
    assert train.labels.tolist() == LABELS[:20]
    assert (len(train), len(test)) == (20, 3)
    for source in (test, pickle.loads(pickle.dumps(test))):  # worker processes get a pickled one
        content, label, name, exif = source[2]
        assert (content, label) == (image_files.encoded(PIXELS[22]), LABELS[22])
        assert (name, exif) == (f"{saved}/validation[2]", True)
    with pytest.raises(IndexError):
        test[3]


def test_it_is_loaded_resized_and_held_out_like_a_folder(saved):
    loaded = data.load("", source="hf", data_dir=str(saved), size=32, validation=4, workers=0)
    assert loaded.images == {"train": 16, "validation": 4, "test": 3}
    assert loaded.train.images.shape == (16, 32, 32, 3)
    assert loaded.mean == data.normalization("cifar10")[0]
    assert "20 training images of 3 classes and 3 test images" in loaded.found


def test_without_a_test_split_a_tenth_is_held_out(datasets, tmp_path):
    table(datasets, slice(0, 20), label="kind").save_to_disk(tmp_path / "one")
    loaded = data.load("", source="hf", data_dir=str(tmp_path / "one"))
    assert loaded.images == {"train": 18, "validation": 0, "test": 2}
    assert "no test split: 2 of them are held out" in loaded.found
    test = data.load_test("", source="hf", data_dir=loaded.name, exif=False, trained_on=True)
    assert (test.held_out, test.undivided) == (True, loaded.undivided)
    assert not test.part[0].exif
    # A network that never saw it is evaluated on all of it.
    unseen = data.load_test("cifar100", source="hf", data_dir=loaded.name)
    assert (len(unseen.part), unseen.held_out, unseen.name) == (20, False, loaded.name)
    table(datasets, slice(1, 21), label="kind").save_to_disk(tmp_path / "two")
    other = data.load("", source="hf", data_dir=str(tmp_path / "two"))
    assert other.images == loaded.images
    assert other.undivided != loaded.undivided
    pixels = decode(loaded.test[0].data, name="")
    assert any(np.array_equal(pixels, decode(image_files.encoded(one), name="")) for one in PIXELS)


def test_a_folder_of_images_is_read_by_load_dataset(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = image_files.write_folder(tmp_path / "images")
    train, _ = hf_source.open_splits("", str(root), exif=False)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    wnid = image_files.wnid(0)
    assert train[0].data == (root / "train" / wnid / f"{wnid}_0.JPEG").read_bytes()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [-1] * 23}, "has images without a class, such as number 0"),
        ({"names": ("cat", "dog", "fox")}, "test has other classes than train"),
    ],
)
def test_what_cannot_be_learned_from_is_one_sentence(datasets, tmp_path, change, sentence):
    whole = {"train": table(datasets, slice(0, 9)), "test": table(datasets, slice(9, 12), **change)}
    datasets.DatasetDict(whole).save_to_disk(tmp_path / "bad")
    with pytest.raises(UserError, match=sentence) as caught:
        hf_source.open_splits("", str(tmp_path / "bad"), exif=True)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_folder_is_one_sentence(saved, tmp_path):
    (file,) = (saved / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as a Hugging Face data set") as caught:
        hf_source.open_splits("", str(saved), exif=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not a directory"):
        hf_source.open_splits("", str(tmp_path / "none"), exif=True)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install"):
        data.load("AI-Lab-Makerere/beans", source="hf")


def test_a_recipe_takes_it_with_the_size_of_its_network(saved):
    recipe = config.default_config()
    recipe.data.source, recipe.data.dir, recipe.data.workers = "hf", str(saved), 0
    data.fit(recipe.data, 32)
    assert data.of_recipe(recipe.data).test.images.shape == (3, 32, 32, 3)
