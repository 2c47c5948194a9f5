"""Images resized once by `shiftnet prepare`, against the files that they were made of."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from shiftnet import data
from shiftnet.__main__ import main
from shiftnet.data import images
from shiftnet.data.folder import FolderSource
from shiftnet.data.prepared import PreparedSource
from shiftnet.data.stream import TrainStream
from shiftnet.errors import UserError
from tests.data import image_files
from tests.data.image_files import wnid

SIDE = 40  # the files have sides of 30 to 69 pixels


@pytest.fixture
def root(tmp_path):
    return image_files.write_folder(tmp_path / "photos")


def prepare(root, *options):
    out = root.parent / "prepared"
    assert main(["prepare", str(root), str(out), f"--side={SIDE}", *options]) == 0
    return out


def loaded(folder, **settings):
    return data.load("", source="folder", data_dir=str(folder), **settings)


def names(part, root=None):
    found = [part.name(index) for index in range(len(part))]
    return found if root is None else [name.removeprefix(f"{root}/") for name in found]


def evaluated(part, size=32, resize=SIDE):
    """What evaluation sees of each image."""
    return np.stack(
        [
            images.for_evaluation(one.data, size=size, resize=resize, name="", exif=one.exif)
            for one in (part[index] for index in range(len(part)))
        ]
    )


def test_evaluation_on_raw_images_sees_the_same_bits_as_on_the_files(root):
    before, after = loaded(root), loaded(prepare(root))
    for part in ("train", "test"):
        originals = evaluated(getattr(before, part))
        np.testing.assert_array_equal(evaluated(getattr(after, part)), originals)
    sides = [min(after.train[index].data.shape[:2]) for index in range(len(after.train))]
    assert min(sides) < SIDE == max(sides)  # what was smaller is stored as it was


def test_jpegs_are_near_the_files_and_smaller_than_raw_images(root):
    out = prepare(root, "--format=jpeg")
    before, after = evaluated(loaded(root).train), evaluated(loaded(out).train)
    assert np.abs(after.astype(int) - before).mean() < 8  # of noise of ±20 grey levels
    assert after.std() > 0.9 * before.std()
    file = loaded(out).train[0].data
    assert file.startswith(b"\xff\xd8")
    assert len(file) < SIDE * SIDE * 3


def test_classes_counts_names_and_held_out_images_stay_the_same(root):
    (root / "val" / wnid(1)).rename(root / "elsewhere")  # a class without test images
    before, after = loaded(root, validation=0.34), loaded(prepare(root), validation=0.34)
    assert after.images == before.images == {"train": 6, "validation": 3, "test": 2}
    assert after.class_names == before.class_names
    for part in ("train", "validation", "test"):
        one, other = getattr(before, part), getattr(after, part)
        assert names(other) == names(one, root)
        np.testing.assert_array_equal(other.labels, one.labels)
    assert f"no images of {wnid(1)}" in after.found
    assert "prepared with shorter sides of at most 40 pixels, raw" in after.found
    # As of the folder itself, the classes of an evaluation are those that have images there.
    test = data.load_test("", source="folder", data_dir=str(root.parent / "prepared"))
    assert test.class_names == (wnid(0), wnid(2))
    assert test.part.labels.tolist() == [0, 1]


def test_of_undivided_images_the_same_are_held_out_for_the_test(root):
    out = prepare(root / "train")
    before, after = loaded(root / "train"), loaded(out)
    assert names(after.test) == names(before.test, root / "train")
    again = data.load_test("", source="folder", data_dir=str(out), trained_on=True)
    assert names(again.part) == names(after.test)
    assert len(data.load_test("", source="folder", data_dir=str(out)).part) == 9


def test_images_are_the_same_wherever_they_lie(root):
    shutil.rmtree(root / "val")
    folders = (root, root / "train", prepare(root), prepare(root / "train"))
    assert len({loaded(folder).undivided for folder in folders}) == 1


def test_a_folder_with_test_images_alone_is_evaluated_on_and_not_trained_on(root):
    shutil.rmtree(root / "train")
    out = prepare(root)
    assert len(data.load_test("", source="folder", data_dir=str(out)).part) == 4
    with pytest.raises(UserError, match=f"{out} was prepared without training images"):
        loaded(out)


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_training_batches_are_those_of_the_images_as_they_are_stored(root, form):
    source = loaded(prepare(root, f"--format={form}")).train
    stream = TrainStream(
        pickle.loads(pickle.dumps(source)),  # as a worker process gets it
        size=24,  # of 40 pixels, so that JPEGs are decoded in full
        batch_size=4,
        steps_per_epoch=2,
        total_steps=1,
        seed=3,
        flip=False,
        scale=(1, 1),
        ratio=(0.1, 10),
        on_corrupt="error",
        workers=0,
    )
    batch = next(stream)
    whole = [Image.fromarray(images.decode(source[i].data, name="")) for i in range(len(source))]
    small = np.stack([np.asarray(i.resize((24, 24), Image.Resampling.BILINEAR)) for i in whole])
    for image, label in zip(batch.images, batch.labels, strict=True):
        nearest = np.abs(small.astype(int) - image).max((1, 2, 3))
        assert nearest.min() <= 2
        assert label == source.labels[nearest.argmin()]


def test_images_are_turned_once_and_not_for_imagenet(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = image_files.pixels(np.random.default_rng(0), 40, 60)
    file = root / "train" / wnid(0) / "0.png"
    file.write_bytes(image_files.encoded(pixels, "PNG", exif=exif.tobytes()))
    out = prepare(root)
    turned = loaded(out).train[0]
    np.testing.assert_array_equal(turned.data, np.rot90(pixels, -1))
    assert not turned.exif
    with pytest.raises(UserError, match=f"{out} was prepared with images turned"):
        data.load("imagenet2012", source="folder", data_dir=str(out))
    shutil.rmtree(out)
    prepare(root, "--no-exif")
    as_stored = data.load("imagenet2012", source="folder", data_dir=str(out)).train[0]
    np.testing.assert_array_equal(as_stored.data, pixels)
    again = root.parent / "again"
    assert main(["prepare", str(out), str(again)]) == 0
    data.load("imagenet2012", source="folder", data_dir=str(again))  # not turned either


def test_an_image_that_is_too_long_for_a_jpeg_is_named(root, capsys):
    panorama = root / "train" / wnid(1) / "panorama.png"
    Image.new("RGB", (70000, 30)).save(panorama)
    out = root.parent / "prepared"
    assert main(["prepare", str(root), str(out), "--format=jpeg"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {panorama} would be 70000x30 pixels, too long for a JPEG\n"
    prepare(root, "--format=jpeg", "--on-corrupt=skip")
    assert f"left out 1 corrupt files: {panorama}" in capsys.readouterr().out


def test_a_corrupt_file_stops_it_and_leaves_nothing_behind(root, capsys):
    damaged = root / "train" / wnid(1) / f"{wnid(1)}_0.JPEG"
    damaged.write_bytes(b"")
    out = root.parent / "prepared"
    assert main(["prepare", str(root), str(out)]) == 2
    assert capsys.readouterr().err == f"error: {damaged} cannot be decoded (it is empty)\n"
    assert [path.name for path in root.parent.iterdir()] == ["photos"]
    prepare(root, "--on-corrupt=skip")
    assert f"left out 1 corrupt files: {damaged}" in capsys.readouterr().out
    assert loaded(out).images["train"] == 8
    assert loaded(out).class_names == loaded(root).class_names


def test_an_interruption_leaves_nothing_behind(root, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "with_shorter_side", interrupted)
    assert main(["prepare", str(root), str(root.parent / "prepared"), f"--side={SIDE}"]) == 130
    assert [path.name for path in root.parent.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda out: (out / "train-00000.array_record").unlink(), "No such file"),
        (lambda out: (out / "train-00000.array_record").write_bytes(b"x"), "not of the size"),
        (lambda out: (out / "train.npz").write_bytes(b"x"), "ValueError"),
        (lambda out: (out / "prepared.json").write_text("{"), "cannot be read"),
        (lambda out: (out / "prepared.json").write_text('{"format": 7}'), "of the format 7; exp"),
    ],
)
def test_a_damaged_folder_is_refused(root, damage, reason):
    out = prepare(root)
    damage(out)
    with pytest.raises(UserError, match=reason):
        loaded(out)


def test_the_manifest_names_no_file_outside_of_the_folder(root):
    out = prepare(root)
    manifest = json.loads((out / "prepared.json").read_text())
    shutil.copy(out / "train-00000.array_record", root.parent / "other")
    files = manifest["parts"]["train"]["files"]
    files["../other"] = files.pop("train-00000.array_record")
    (out / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{out} is damaged"):
        loaded(out)


def test_a_record_that_is_damaged_on_disk_is_a_corrupt_image(root):
    out = prepare(root)
    file = out / "train-00000.array_record"
    content = bytearray(file.read_bytes())
    content[10_000:10_100] = bytes(100)
    file.write_bytes(content)
    source = PreparedSource(out, "train")
    outcomes = []
    for index in range(len(source)):
        try:
            outcomes.append(source[index].label)
        except images.CorruptImage as error:
            outcomes.append(error.name)
    assert sum(isinstance(outcome, str) for outcome in outcomes) in (1, 2)
    assert len(FolderSource(root / "train")) == len(outcomes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("photos", "photos"), "OUT is .*photos, within DIR"),
        (("photos", "taken"), "taken exists already; remove it, or name another folder"),
        (("photos", "no/where"), "no is not a directory"),
        (("nothing", "prepared"), "nothing is not a directory"),
        (("photos", "prepared", "--side=0"), "--side must be at least 1 pixel, found 0"),
        (("photos", "prepared", "--dataset=cifar100"), "cifar100 is held in memory as it is"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_one_sentence(
    root, monkeypatch, capsys, options, sentence
):
    monkeypatch.chdir(root.parent)
    (root.parent / "taken").mkdir()
    assert main(["prepare", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(sentence, error)
    assert sorted(path.name for path in root.parent.iterdir()) == ["photos", "taken"]


def test_a_size_beyond_the_prepared_one_is_refused(root):
    out = prepare(root)
    with pytest.raises(UserError, match=r"data.size is 64, more than the 40 pixels"):
        loaded(out, size=64)
    dataset = loaded(out, size=32, resize=SIDE, workers=0)
    np.testing.assert_array_equal(dataset.test.images, evaluated(loaded(root).test))
