"""Folders of images as people have them."""

import os
import pickle
import shutil

import numpy as np
import pytest

from shiftnet import data
from shiftnet.data import images
from shiftnet.data.folder import FolderSource, ListedSource
from shiftnet.data.images import CorruptImage
from shiftnet.errors import UserError
from tests.data import image_files
from tests.data.image_files import wnid


@pytest.fixture
def root(tmp_path):
    return image_files.write_folder(tmp_path / "imagenet")


def loaded(root):
    return data.load("", source="folder", data_dir=str(root))


def test_labels_are_places_among_the_sorted_folders(root):
    source = FolderSource(root / "train")
    assert source.class_names == (wnid(0), wnid(1), wnid(2))
    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert len(source) == 9
    assert len(FolderSource(str(root / "val"))) == 4


def test_an_image_comes_with_its_label_and_path(root):
    encoded = FolderSource(root / "train", exif=True)[4]
    path = root / "train" / wnid(1) / f"{wnid(1)}_1.JPEG"
    assert encoded == (path.read_bytes(), 1, str(path), True)


def test_a_thousand_classes_keep_their_order(tmp_path):
    names = [wnid(label) for label in np.random.default_rng(0).permutation(1000)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "ümlaut 1.jpg").write_bytes(name.encode())
    source = FolderSource(tmp_path)
    assert source.class_names == tuple(sorted(names))
    for label in (0, 1, 500, 999):
        assert source[label][:2] == (sorted(names)[label].encode(), label)


def test_every_kind_of_image_file_counts_whatever_the_case_of_its_ending(root):
    inside = root / "val" / wnid(0)
    kinds = ["JPG", "png", "WebP", "bmp", "tif", "TIFF", "gif", "jfif", "ppm", "jp2"]
    for kind in kinds:
        (inside / f"b.{kind}").write_bytes(b"")
    source = FolderSource(root / "val")
    names = {source[i].name.rpartition(".")[2] for i in range(len(source))}
    assert names == {*kinds, "JPEG"}
    assert source.left_out == ""


def test_files_that_need_another_program_are_no_images(root):
    (root / "val" / wnid(0) / "drawing.eps").write_bytes(b"%!PS")
    assert FolderSource(root / "val").left_out == "1 file ending in .eps"


def test_what_is_left_out_is_counted_with_its_reason(root):
    train = root / "train"
    for name in ("a.txt", "b.txt", "c.xml", "jpeg", ".hidden.jpg"):
        (train / wnid(0) / name).write_bytes(b"")
    for name in (".ipynb_checkpoints", "@eaDir", "empty"):
        (train / name).mkdir()
    (train / "@eaDir" / "thumbnail.jpg").write_bytes(b"")
    (train / "loose.png").write_bytes(b"")
    os.mkfifo(train / wnid(1) / "pipe.png")
    dataset = loaded(root)
    assert dataset.images == {"train": 9, "validation": 0, "test": 4}
    assert dataset.found == (
        f"9 images of 3 classes in {train} and 4 images of 3 classes in {root}/val; left out of "
        f"{train}: 2 files ending in .txt, 1 file without an ending, 1 file ending in .xml, "
        "hidden files or folders: 3, neither files nor folders: 1, 1 image outside the class "
        "folders, class folders without images: empty; "
        "turned as their EXIF orientation says (data.exif)"
    )


def test_images_in_deeper_folders_belong_to_the_class(root):
    inside = root / "val" / wnid(1)
    (inside / "images" / "more").mkdir(parents=True)
    shutil.copy(inside / f"{wnid(1)}_0.JPEG", inside / "images" / "more" / "x.jpg")
    source = FolderSource(root / "val")
    assert source.labels.tolist() == [0, 1, 1, 1, 2]
    path = inside / "images" / "more" / "x.jpg"
    assert source[3] == (path.read_bytes(), 1, str(path), False)


def test_links_are_followed_and_those_in_a_circle_end(root):
    os.symlink(root / "train" / wnid(0), root / "train" / "linked")
    os.symlink(root / "train", root / "train" / wnid(1) / "loop")
    os.symlink("self", root / "train" / wnid(1) / "self")
    source = FolderSource(root / "train")
    assert source.class_names == ("linked", wnid(0), wnid(1), wnid(2))
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert "links to a folder that holds them: 1" in source.left_out


def test_a_source_that_was_pickled_reads_the_same(root):
    source = FolderSource(root / "train")
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(9)] == [source[i] for i in range(9)]
    assert again.class_names == source.class_names


def test_there_is_no_image_beyond_the_last(root):
    with pytest.raises(IndexError):
        FolderSource(root / "val")[4]


def test_a_file_that_went_away_is_named(root):
    source = FolderSource(root / "val")
    path = root / "val" / wnid(2) / f"{wnid(2)}_0.JPEG"
    path.unlink()
    with pytest.raises(CorruptImage, match=rf"{path} cannot be read \(No such file"):
        source[3]


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(root):
    os.symlink("/nonexistent.jpg", root / "val" / wnid(0) / "a.jpg")
    source = FolderSource(root / "val")
    assert len(source) == 5
    with pytest.raises(CorruptImage, match="No such file"):
        source[0]


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory; expected a folder of im"):
        loaded(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val"])
def test_the_held_out_images_may_have_any_of_the_usual_names(root, name):
    (root / "val").rename(root / name)
    (root / "train").rename(root / "Train")
    dataset = loaded(root)
    assert dataset.images == {"train": 9, "validation": 0, "test": 4}
    assert dataset.test.folder == root / name


def test_of_two_held_out_folders_val_is_used(root):
    shutil.copytree(root / "val" / wnid(0), root / "test" / wnid(0))
    assert loaded(root).test.folder == root / "val"


def test_a_test_folder_without_training_images_is_refused(root):
    (root / "train").rename(root / "training")
    with pytest.raises(UserError, match=f"{root} has a folder val and no folder train; expected"):
        loaded(root)


def names(part):
    return {part.name(index) for index in range(len(part))}


@pytest.mark.parametrize("place", ["train", "."])
def test_without_a_test_folder_some_images_are_held_out_and_that_is_said(root, place):
    shutil.rmtree(root / "val")
    folder = root / "train"
    if place == ".":
        folder = folder.rename(root.parent / "photos")
    dataset = loaded(folder if place == "." else root)
    assert dataset.images == {"train": 8, "validation": 0, "test": 1}
    everything = {str(path) for path in folder.rglob("*.JPEG")}
    assert names(dataset.train) | names(dataset.test) == everything
    assert "no folder val: 1 of them are held out for the test" in dataset.found
    # Evaluating the network on its own folder later takes the same image, and no other.
    again = data.load_test("", source="folder", data_dir=dataset.name, trained_on=True)
    assert names(again.part) == names(dataset.test)
    assert again.class_names == dataset.class_names


def test_a_share_of_the_training_images_is_held_out_for_validation(root):
    dataset = data.load("", source="folder", data_dir=str(root), validation=0.34)
    assert dataset.images == {"train": 6, "validation": 3, "test": 4}
    assert names(dataset.train) | names(dataset.validation) == names(FolderSource(root / "train"))
    with pytest.raises(UserError, match=r"data.validation is 9; expected 0 to 8"):
        data.load("", source="folder", data_dir=str(root), validation=9)


def test_small_images_are_read_once_and_normalised_like_a_cifar(root):
    damaged = root / "train" / wnid(1) / f"{wnid(1)}_0.JPEG"
    damaged.write_bytes(b"")
    settings = {"source": "folder", "data_dir": str(root), "workers": 0, "exif": False}
    dataset = data.load("", size=16, on_corrupt="skip", **settings)
    assert dataset.images == {"train": 8, "validation": 0, "test": 4}
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    source = FolderSource(root / "train")
    for index, place in ((0, 0), (3, 4)):
        encoded = source[place]
        expected = images.for_evaluation(encoded.data, size=16, resize=16, name="x")
        np.testing.assert_array_equal(dataset.train.images[index], expected)
    assert (dataset.mean, dataset.std) == data.normalization("cifar10")
    assert f"left out 1 corrupt train files: {damaged}" in dataset.found
    with pytest.raises(UserError, match=f"{damaged} cannot be decoded"):
        data.load("", size=16, **settings)


def listing(root, lines):
    path = root / "labels.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("heading", [["id,breed"], []])
def test_a_csv_file_may_name_the_classes_of_a_flat_folder(tmp_path, heading):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    source = ListedSource(listing(tmp_path, [*heading, "c.jpg,dog", "", "a,cat,ignored"]), tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [1, 0]
    assert [source[index].data for index in range(2)] == [b"c", b"a"]
    assert source.name(1) == str(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "lists no images"),
        (["a.jpg,dog", "b.jpg,dog"], "'a.jpg' is not a file in"),
        (["a.jpgg,cat", "b.jpg,dog"], "'a.jpgg' is not a file in"),
        (["file"], "'file' names no class"),
    ],
)
def test_a_bad_list_is_one_sentence(root, lines, sentence):
    with pytest.raises(UserError, match=rf"labels.csv.* {sentence}|labels.csv:? {sentence}"):
        ListedSource(listing(root, lines), root / "val")


def test_images_outside_class_folders_are_pointed_out(root):
    for inside in list((root / "val").iterdir()):
        for file in inside.iterdir():
            file.rename(root / "val" / file.name)
        inside.rmdir()
    with pytest.raises(UserError, match="val has no class folders with images; move its 4 images"):
        loaded(root)


def test_folders_beside_train_that_are_not_read_are_named(root):
    (root / "test").mkdir()  # val is used
    (root / "more").mkdir()
    (root / ".cache").mkdir()
    assert f"left out of {root}/train: folders beside it: more, test" in loaded(root).found


def test_a_class_may_be_named_train(root):
    shutil.rmtree(root / "val")
    (root / "train").rename(root / "bus")
    shutil.copytree(root / "bus" / wnid(0), root / "train")
    assert loaded(root).class_names == ("bus", "train")
    # A hidden folder is no class beside it.
    (root / "bus").rename(root / ".bus")
    with pytest.raises(UserError, match=r"train has no class folders with images; move its"):
        loaded(root)


def test_an_empty_split_is_refused(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    with pytest.raises(UserError, match=r"val has no class folders with images$"):
        loaded(root)


def test_a_class_may_lack_images_to_evaluate_on_and_that_is_said(root):
    shutil.rmtree(root / "val" / wnid(1))
    dataset = loaded(root)
    assert dataset.class_names == (wnid(0), wnid(1), wnid(2))
    assert [dataset.test[i].label for i in range(2)] == [0, 2]
    assert f"no images of {wnid(1)} in {root}/val" in dataset.found


def test_a_class_without_training_images_is_refused(root):
    (root / "train" / wnid(1)).rename(root / "gone")
    with pytest.raises(
        UserError, match=f"val has 1 of 3 classes without training images: {wnid(1)}$"
    ):
        loaded(root)


def test_evaluation_needs_no_training_images(root):
    shutil.rmtree(root / "train")
    for directory in (root, root / "val"):
        test = data.load_test("", source="folder", data_dir=str(directory))
        assert (len(test.part), test.class_names) == (4, (wnid(0), wnid(1), wnid(2)))


def test_training_images_are_not_evaluated_on_by_mistake(root):
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=f"to evaluate on the training images, name {root}/train"):
        data.load_test("", source="folder", data_dir=str(root))


def test_photos_are_turned_but_those_of_imagenet_are_not(root):
    for name, exif, expected in (
        ("", True, True),
        ("", False, False),
        ("imagenet2012", True, False),
    ):
        dataset = data.load(name, source="folder", data_dir=str(root), exif=exif)
        assert dataset.train[0].exif == dataset.test[0].exif == expected
        assert ("EXIF" in dataset.found) == expected
