"""Decoding and geometry, against torchvision's algorithms restated by plain Pillow calls."""

import io
import math
import pickle
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from shiftnet.data import images
from tests.data import image_files

RNG = np.random.default_rng(0)
ODD = image_files.odd_files(RNG)
CORRUPT = image_files.corrupt_files(RNG)
odd = pytest.mark.parametrize("data", ODD.values(), ids=ODD)


def opened(data):
    """What torchvision's `default_loader` returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data)).convert("RGB")


def resize_and_center_crop(image, resize, size):
    """torchvision 0.28's `Resize(resize)` and `CenterCrop(size)` of a Pillow image."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = resize, int(resize * long / short)
    width, height = (new_short, new_long) if width <= height else (new_long, new_short)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def cut(image, box, size, mirrored):
    """torchvision's `resized_crop` and `hflip` of a Pillow image."""
    top, left, height, width = box
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def assert_near(found, image):
    """Within the two grey levels that `for_training` states for the rounding of its filter."""
    expected = np.asarray(image).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - expected).mean() < 0.3


def torchvision_box(rng, height, width):
    """torchvision 0.28's `RandomResizedCrop.get_params`, on a generator of another kind."""
    area = height * width
    log_ratio = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        target_area = area * rng.uniform(0.08, 1.0)
        aspect_ratio = math.exp(rng.uniform(*log_ratio))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h + 1), rng.randint(0, width - w + 1), h, w
    in_ratio = float(width) / float(height)
    if in_ratio < 3 / 4:
        w = width
        h = round(w / (3 / 4))
    elif in_ratio > 4 / 3:
        h = height
        w = round(h * (4 / 3))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def in_training(data, seed, size, flip=True):
    """`for_training`, and the choices that it made."""
    rng = np.random.default_rng(seed)
    height, width = opened(data).size[::-1]
    box = images.crop_box(rng, height, width)
    mirrored = flip and rng.random() < 0.5
    rng = np.random.default_rng(seed)
    return images.for_training(data, size=size, flip=flip, rng=rng, name="x"), box, mirrored


@odd
def test_every_kind_of_file_decodes_as_in_torchvision(data):
    found = images.decode(data, name="x.JPEG")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(opened(data)))


def test_an_image_is_not_turned_by_its_exif_unless_asked_for():
    assert images.decode(ODD["rotated"], name="x").shape == (44, 66, 3)
    assert images.decode(ODD["rotated"], name="x", exif=True).shape == (66, 44, 3)


def oriented(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image_files.pixels(np.random.default_rng(orientation), 44, 66)
    return image_files.encoded(image, kind, exif=exif)


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photos_are_turned_as_pillow_turns_them(kind, orientation):
    data = oriented(kind, orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(images.decode(data, name="x", exif=True), np.asarray(expected))
    found = images.for_evaluation(data, size=24, resize=30, name="x", exif=True)
    np.testing.assert_array_equal(found, np.asarray(resize_and_center_crop(expected, 30, 24)))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        box = images.crop_box(rng, *expected.size[::-1])
        mirrored = rng.random() < 0.5
        rng = np.random.default_rng(seed)
        found = images.for_training(data, size=64, flip=True, rng=rng, name="x", exif=True)
        assert_near(found, cut(expected, box, 64, mirrored))


def test_damaged_exif_turns_nothing():
    data = ODD["damaged EXIF"]
    np.testing.assert_array_equal(
        images.decode(data, name="x", exif=True), images.decode(data, name="x")
    )


def test_no_other_program_is_run_for_a_file_whatever_its_name():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")  # Pillow would run Ghostscript
    with pytest.raises(images.CorruptImage, match="no image of a known kind"):
        images.decode(buffer.getvalue(), name="a.jpg")
    assert {".jpg", ".png", ".tif", ".gif", ".jfif", ".ppm"} <= images.extensions()
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5", ".pdf"} & images.extensions()


GREY = np.arange(0, 65536, 37, np.uint16)[:1764].reshape(42, 42)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"big_endian": True}), ("PPM", {}), ("JPEG2000", {})],
    ids=str,
)
def test_grey_levels_of_16_bits_are_scaled_and_not_white(kind, options):
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, kind, **options)
    found = images.decode(buffer.getvalue(), name="x")
    np.testing.assert_array_equal(found, np.repeat(GREY[..., None] >> 8, 3, axis=-1))
    shown = images.for_evaluation(buffer.getvalue(), size=42, resize=42, name="x")
    np.testing.assert_array_equal(shown, found)


@pytest.mark.parametrize("kind", ["PPM", "TIFF"])
def test_floating_point_numbers_are_refused(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(buffer, kind)
    with pytest.raises(images.CorruptImage, match="its pixels are floating-point numbers"):
        images.decode(buffer.getvalue(), name="x")


def tiff(samples, bits, *, white_is_zero=False):
    """A TIFF of one strip, written by hand; `samples` are its bytes, for 4 rows of 4 pixels."""
    tags = [
        (256, 4), (257, 4), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 200),
        (277, 1), (278, 4), (279, len(samples)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return header.ljust(200, b"\0") + samples


def test_the_depth_is_the_one_that_the_file_declares():
    levels = np.arange(16, dtype=np.uint16) * 273  # 0 to 4095
    pairs = levels.reshape(-1, 2).astype(int)
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    found = images.decode(tiff(packed, 12), name="x")
    np.testing.assert_array_equal(found[..., 0], (levels >> 4).reshape(4, 4))


def test_a_tiff_in_which_white_is_zero_is_inverted():
    levels = np.arange(16, dtype="<u2") * 4369  # 0 to 65535
    found = images.decode(tiff(levels.tobytes(), 16, white_is_zero=True), name="x")
    np.testing.assert_array_equal(found[..., 0], 255 - (levels >> 8).reshape(4, 4))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused_and_not_black(dtype):
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), dtype)).save(buffer, "TIFF")
    with pytest.raises(images.CorruptImage, match="range the file does not state; expected 8 or"):
        images.decode(buffer.getvalue(), name="x")


def test_an_image_too_large_to_evaluate_is_too_large_to_train_on(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 40 - 1)
    small, large = (image_files.encoded(image_files.pixels(RNG, side, 80)) for side in (29, 30))
    for read in readers(small, "small.jpg"):
        read()
    for read in readers(large, "large.jpg"):
        with pytest.raises(images.CorruptImage, match=r"large.jpg cannot be decoded .Image size"):
            read()


@odd
@pytest.mark.parametrize(("resize", "size"), [(36, 32), (37, 24), (64, 64)])
def test_evaluation_sees_what_torchvision_shows(data, resize, size):
    found = images.for_evaluation(data, size=size, resize=resize, name="x")
    assert found.shape == (size, size, 3)
    expected = np.asarray(resize_and_center_crop(opened(data), resize, size))
    np.testing.assert_array_equal(found, expected)


def test_evaluation_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="size is 33, more than the 32"):
        images.for_evaluation(ODD["rgb"], size=33, resize=32, name="x")


@odd
def test_training_sees_what_torchvision_cuts(data):
    """At a size at which no crop is decoded to a fraction; rows below the crop are left out."""
    mirrors = set()
    for seed in range(12):
        found, box, mirrored = in_training(data, seed, size=64)
        assert_near(found, cut(opened(data), box, 64, mirrored))
        mirrors.add(mirrored)
    assert mirrors == {True, False}


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"mode": "L"},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_leaving_out_lower_rows_changes_no_bit_of_the_upper(options):
    data = image_files.encoded(image_files.pixels(RNG, 150, 40), **options)
    full, jpeg, heights = np.asarray(opened(data)), images._jpeg(data), set()
    for rows in range(1, 151):
        upper = images._upper_rows(data, jpeg, rows, 1)
        np.testing.assert_array_equal(upper[:rows], full[:rows])
        heights.add(len(upper))
    assert min(heights) < 50  # it does leave out
    assert max(heights) == 150


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("shape", [(160, 80), (161, 87)])
def test_a_fraction_is_the_one_that_pillow_decodes(shape, scale):
    data = image_files.encoded(image_files.pixels(RNG, *shape))
    found = images._upper_rows(data, images._jpeg(data), shape[0], scale)
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // scale, image.height // scale))
    assert found.shape == (-(-shape[0] // scale), -(-shape[1] // scale), 3)
    np.testing.assert_allclose(found, np.asarray(image), atol=1, rtol=0)


def test_a_jpeg_that_turbojpeg_refuses_is_left_to_pillow(monkeypatch):
    def refuse(*args, **options):
        raise ValueError("could not determine subsampling type")

    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    found, box, mirrored = in_training(ODD["rgb"], 0, size=8)
    assert_near(found, cut(opened(ODD["rgb"]), box, 8, mirrored))


def test_unflipped_training_never_mirrors():
    for seed in range(12):
        found, box, _ = in_training(ODD["rgb"], seed, size=48, flip=False)
        assert_near(found, cut(opened(ODD["rgb"]), box, 48, False))


def test_decoding_to_a_fraction_stays_near_full_decoding():
    """`for_training` states 1.2, 3.9 and 25 grey levels for finer-grained, larger images."""
    rng = np.random.default_rng(1)
    data = image_files.encoded(image_files.pixels(rng, 700, 900))
    image, drafts, deviations = opened(data), set(), []
    for size in (30, 60, 120):
        for seed in range(8):
            found, box, mirrored = in_training(data, seed, size)
            drafts.add(min(8, 2 ** int(math.log2(max(1, min(box[2:]) / size)))))
            expected = np.asarray(cut(image, box, size, mirrored)).astype(int)
            deviations.append(np.abs(found - expected))
    assert {2, 4, 8} <= drafts
    means = [deviation.mean() for deviation in deviations]
    assert 0 < np.mean(means) < 1.2
    assert max(means) < 3.9
    assert max(deviation.max() for deviation in deviations) <= 25


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_colours_that_are_coarse_in_one_direction_stay_near_full_decoding(subsampling):
    """Colours that change every 17 pixels, at an eighth."""
    at = np.arange(640)
    x, y = np.meshgrid(at, at)
    pixels = 128 + 100 * np.stack([np.sin(x / 17), np.sin((x + y) / 17), np.cos(x / 17)], -1)
    data = image_files.encoded(pixels.astype(np.uint8), subsampling=subsampling)
    image = opened(data)
    for seed in range(4):
        found, box, mirrored = in_training(data, seed, 24)
        expected = np.asarray(cut(image, box, 24, mirrored)).astype(int)
        assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_fraction_is_decoded_only_where_nothing_is_enlarged(scale, monkeypatch):
    used = []

    def decode(data, jpeg, rows, scale):
        used.append(scale)
        return upper_rows(data, jpeg, rows, scale)

    upper_rows = images._upper_rows
    monkeypatch.setattr(images, "_upper_rows", decode)
    data = image_files.encoded(image_files.pixels(RNG, 320, 320))
    for height in (40 * scale, 40 * scale - 1):
        monkeypatch.setattr(images, "crop_box", lambda *_, h=height: (320 - h, 0, h, 320))
        rng = np.random.default_rng(0)
        images.for_training(data, size=40, flip=False, rng=rng, name="x")
    assert used == [scale, scale // 2]


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (100, 800), (640, 64)])
def test_crops_are_distributed_as_torchvisions(shape):
    """Means within four standard errors of a difference, at fixed seeds."""
    count = 4000
    rng, peer = np.random.default_rng(2), np.random.RandomState(3)
    ours, theirs = (
        np.array([draw(generator, *shape) for _ in range(count)], float)
        for draw, generator in ((images.crop_box, rng), (torchvision_box, peer))
    )

    def features(boxes):
        top, left, height, width = boxes.T
        places = [place / np.maximum(1, room) for place, room in (
            (top, shape[0] - height), (left, shape[1] - width)
        )]  # fmt: skip
        area, ratio = height * width / (shape[0] * shape[1]), np.log(width / height)
        whole = (height == shape[0]) | (width == shape[1])
        columns = [area, area**2, ratio, ratio**2, *places, *(p**2 for p in places), whole]
        return np.stack(columns, axis=1).astype(float)

    ours, theirs = features(ours), features(theirs)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * error + 1e-12).all()
    assert ours[:, 0].min() >= 0 < theirs[:, 0].min()


def test_crops_keep_to_the_parts_and_ratios_asked_for():
    rng = np.random.default_rng(0)
    boxes = [images.crop_box(rng, 300, 400, (0.25, 0.5), (1.0, 1.2)) for _ in range(200)]
    _, _, height, width = np.array(boxes).T
    area, ratio = height * width / (300 * 400), width / height
    assert 0.24 < area.min() < 0.27
    assert 0.47 < area.max() < 0.51
    assert 0.99 < ratio.min() < 1.02
    assert 1.18 < ratio.max() < 1.22


@pytest.mark.parametrize(
    ("shape", "box"), [((1000, 10), (493, 0, 13, 10)), ((9, 1000), (0, 494, 9, 12))]
)
def test_an_image_too_narrow_for_a_crop_gives_its_middle(shape, box):
    assert images.crop_box(np.random.default_rng(0), *shape) == box
    assert torchvision_box(np.random.RandomState(0), *shape) == box


def readers(data, name):
    rng = np.random.default_rng(0)
    yield lambda: images.decode(data, name=name)
    yield lambda: images.for_evaluation(data, size=32, resize=36, name=name)
    yield lambda: images.for_training(data, size=32, flip=True, rng=rng, name=name)


@pytest.mark.parametrize("data", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_named_in_one_sentence(data):
    for read in readers(data, "train/n01440764/a.JPEG"):
        with pytest.raises(images.CorruptImage) as caught:
            read()
        message = str(caught.value)
        assert message.startswith("train/n01440764/a.JPEG cannot be decoded (")
        assert "\n" not in message
        assert "0x" not in message
        assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_whether_a_file_is_corrupt_does_not_depend_on_the_crop(monkeypatch):
    monkeypatch.setattr(images, "crop_box", lambda *_: (0, 0, 8, 8))
    rng = np.random.default_rng(0)
    with pytest.raises(images.CorruptImage, match="truncated"):
        images.for_training(
            CORRUPT["cut at the end"], size=8, flip=False, rng=rng, name="x"
        )  # fmt: skip


def test_metadata_behind_a_jpegs_size_turns_it_in_training_too():
    jpeg = ODD["rotated"]
    start = jpeg.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
    before, scan = jpeg[:start] + jpeg[end:], jpeg.index(b"\xff\xda") - (end - start)
    moved = before[:scan] + jpeg[start:end] + before[scan:]
    options = {"size": 16, "flip": False, "scale": (0.5, 0.5), "ratio": (1.0, 1.0)}
    found = [
        images.for_training(one, name="x", exif=True, rng=np.random.default_rng(0), **options)
        for one in (jpeg, moved)
    ]
    np.testing.assert_array_equal(*found)
