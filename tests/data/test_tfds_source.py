"""ImageNet as TFDS prepares it: a small directory of its features, written by TFDS's own code."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as stock

from shiftnet.data.tfds_source import TfdsSource
from shiftnet.errors import UserError
from tests.data import image_files
from tests.data.image_files import wnid

CLASSES = 1000
COUNTS = {"train": 30, "validation": 7, "test": 4}


def label_of(split, index):
    """Includes the first and the last class; the challenge's test images have none."""
    if split == "test":
        return -1
    return (index * 37 + (split == "validation")) % CLASSES if index else CLASSES - 1


def contents(split):
    """{file name: (bytes, label)}, in the order in which they go in."""
    rng = np.random.default_rng(len(split))
    return {
        f"{wnid(label_of(split, index))}_{index}.JPEG": (
            image_files.encoded(image_files.pixels(rng, 20, 24)),
            label_of(split, index),
        )
        for index in range(COUNTS[split])
    }


class Imagenet2012(stock.Builder, skip_registration=True):
    """`tfds.builder("imagenet2012")`, with the step that needs TensorFlow replaced."""

    name = "imagenet2012"
    pkg_dir_path = Path(stock.__file__).parent  # where it finds its description
    MANUAL_DOWNLOAD_INSTRUCTIONS = None
    splits = tuple(COUNTS)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split):
        for name, (data, label) in contents(split).items():
            path = self.files / name
            path.write_bytes(data)
            yield name, {"file_name": name, "image": path, "label": label}


def prepare(root, splits=tuple(COUNTS)):
    files = root / "archive"
    files.mkdir(exist_ok=True)
    builder = Imagenet2012(data_dir=root / "tfds")
    builder.files, builder.splits = files, splits
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format="array_record")
    return root / "tfds"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("imagenet"))


@pytest.mark.parametrize(("split", "stored"), [("train", "train"), ("test", "validation")])
def test_every_file_comes_back_as_it_went_in(root, split, stored):
    source = TfdsSource(root, "imagenet2012", split)
    found = {
        name: (data, label) for data, label, name, _ in (source[i] for i in range(len(source)))
    }
    assert found == contents(stored)
    assert len(source) == COUNTS[stored]


def test_the_order_is_the_one_on_disk(root):
    source = TfdsSource(str(root), "imagenet2012", "train")
    stored = tfds.builder_from_directory(root / "imagenet2012" / "5.1.0").as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    names = [source[i].name for i in range(len(source))]
    assert names == [example["file_name"].decode() for example in stored]
    assert names != list(contents("train"))  # TFDS has shuffled them, which is left as it is


def test_class_names_are_the_wordnet_ids_in_order(root):
    names = TfdsSource(root, "imagenet2012", "test").class_names
    assert names == tuple(sorted(names))
    assert (len(names), names[0], names[-1]) == (1000, "n01440764", "n15075141")


def test_a_source_that_was_pickled_reads_the_same(root):
    source = TfdsSource(root, "imagenet2012", "train")
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert pickle.loads(sent)[3] == source[3]


def test_there_is_no_image_beyond_the_last(root):
    with pytest.raises(IndexError):
        TfdsSource(root, "imagenet2012", "test")[7]


def test_the_newest_version_of_the_format_is_read(root, tmp_path):
    folder = tmp_path / "imagenet2012"
    for version in ("4.0.0", "5.9.0", "5.x.0", "6.0.0", "5.10.0.incompleteABC"):
        (folder / version).mkdir(parents=True)
    shutil.copytree(root / "imagenet2012" / "5.1.0", folder / "5.10.0")
    assert len(TfdsSource(tmp_path, "imagenet2012", "test")) == 7


def test_a_missing_split_is_refused(tmp_path):
    root = prepare(tmp_path, ("train",))
    assert len(TfdsSource(root, "imagenet2012", "train")) == 30
    with pytest.raises(UserError, match=r"5\.1\.0 has no split test or validation"):
        TfdsSource(root, "imagenet2012", "test")


def test_images_without_labels_are_refused(tmp_path):
    root = prepare(tmp_path, ("train", "test"))
    with pytest.raises(UserError, match=r"5\.1\.0 has no labels in test"):
        TfdsSource(root, "imagenet2012", "test")


def test_a_directory_without_imagenet_is_refused_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"imagenet2012 holds no 5\.\*\.\*; .*tfds build imagenet"):
        TfdsSource(tmp_path, "imagenet2012", "train")


def test_a_form_that_needs_tensorflow_is_refused(root, tmp_path):
    folder = tmp_path / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    for file in (root / "imagenet2012" / "5.1.0").iterdir():
        text = file.read_bytes()
        if file.suffix == ".json":
            text = text.replace(b"array_record", b"tfrecord")
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(text)
    with pytest.raises(UserError, match="prepared as tfrecord, which only TensorFlow reads"):
        TfdsSource(tmp_path, "imagenet2012", "train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_directory_with_a_file_missing_is_refused(root, tmp_path, name):
    folder = tmp_path / "imagenet2012" / "5.1.0"
    shutil.copytree(root / "imagenet2012" / "5.1.0", folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"is not a complete TFDS data set .*; prepare it again"):
        TfdsSource(tmp_path, "imagenet2012", "train")


def test_a_record_that_cannot_be_read_is_refused(root, tmp_path):
    folder = tmp_path / "imagenet2012" / "5.1.0"
    shutil.copytree(root / "imagenet2012" / "5.1.0", folder)
    (path,) = folder.glob("*train*array_record*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a complete TFDS data set"):
        TfdsSource(tmp_path, "imagenet2012", "train")[0]
