"""Folders of images as PyTorch users have them."""

import pickle

import numpy as np
import pytest

from shiftnet.data.folder import FolderSource, check_same_classes
from shiftnet.errors import UserError
from tests.data import image_files
from tests.data.image_files import wnid


@pytest.fixture
def root(tmp_path):
    return image_files.write_folder(tmp_path / "imagenet")


def test_labels_are_places_among_the_sorted_folders(root):
    source = FolderSource(root, "train")
    assert source.class_names == (wnid(0), wnid(1), wnid(2))
    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert len(source) == 9
    assert len(FolderSource(str(root), "val")) == 4


def test_an_image_comes_with_its_label_and_path(root):
    data, label, name = FolderSource(root, "train")[4]
    path = root / "train" / wnid(1) / f"{wnid(1)}_1.JPEG"
    assert (data, label, name) == (path.read_bytes(), 1, str(path))


def test_a_thousand_classes_keep_their_order(tmp_path):
    (tmp_path / "val").mkdir()
    names = [wnid(label) for label in np.random.default_rng(0).permutation(1000)]
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "ümlaut 1.jpg").write_bytes(name.encode())
    source = FolderSource(tmp_path, "train")
    assert source.class_names == tuple(sorted(names))
    for label in (0, 1, 500, 999):
        assert source[label][:2] == (sorted(names)[label].encode(), label)


def test_only_image_files_count_whatever_the_case_of_their_extension(root):
    folder = root / "val" / wnid(0)
    for name in ("b.JPG", "c.png", "d.WebP", "e.bmp", "notes.txt", ".hidden.jpg", "jpeg"):
        (folder / name).write_bytes(b"")
    (root / "val" / ".cache").mkdir()
    names = [FolderSource(root, "val")[i].name for i in range(5)]
    assert [name.rpartition(".")[2] for name in names] == ["JPG", "png", "WebP", "bmp", "JPEG"]


def test_a_source_that_was_pickled_reads_the_same(root):
    source = FolderSource(root, "train")
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(9)] == [source[i] for i in range(9)]
    assert again.class_names == source.class_names


def test_there_is_no_image_beyond_the_last(root):
    with pytest.raises(IndexError):
        FolderSource(root, "val")[4]


def test_a_file_that_went_away_is_named(root):
    source = FolderSource(root, "val")
    path = root / "val" / wnid(2) / f"{wnid(2)}_0.JPEG"
    path.unlink()
    with pytest.raises(UserError, match=rf"{path} cannot be read \(No such file"):
        source[3]


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory; expected one that holds"):
        FolderSource(tmp_path / "nowhere", "train")


def test_a_directory_without_both_splits_is_refused(root):
    (root / "val").rename(root / "validation")
    with pytest.raises(UserError, match=f"{root} has no folder val; expected train/<class>"):
        FolderSource(root, "train")


def test_images_outside_class_folders_are_pointed_out(root):
    for folder in list((root / "val").iterdir()):
        for file in folder.iterdir():
            file.rename(root / "val" / file.name)
        folder.rmdir()
    with pytest.raises(UserError, match="val has no class folders; move its 4 images into"):
        FolderSource(root, "val")


def test_an_empty_split_is_refused(root):
    (root / "val").rename(root / "other")
    (root / "val").mkdir()
    with pytest.raises(UserError, match=r"val has no class folders$"):
        FolderSource(root, "val")


def test_a_class_without_images_is_refused(root):
    (root / "train" / "n99999999").mkdir()
    with pytest.raises(UserError, match="n99999999 has no images; expected files that end in"):
        FolderSource(root, "train")


def test_splits_of_the_same_classes_pass(root):
    check_same_classes(FolderSource(root, "train"), FolderSource(root, "val"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits_of_different_classes_are_refused(root, split):
    (root / split / wnid(1)).rename(root / "gone")
    other = {"train": "val", "val": "train"}[split]
    with pytest.raises(
        UserError,
        match=f"{split} has no folder {wnid(1)}, which .*{other} has .1 such classes of 3",
    ):
        check_same_classes(FolderSource(root, "train"), FolderSource(root, "val"))
