"""Small image files of every kind that ImageNet has, and of those that go wrong."""

import io
import struct

import numpy as np
from PIL import Image


def pixels(rng, height, width):
    """Smooth colours with edges and some noise; uint8 [height, width, 3]."""
    coarse = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = np.asarray(smooth).astype(int) + rng.integers(-20, 21, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] += 60
    return image.clip(0, 255).astype(np.uint8)


def encoded(image, kind="JPEG", mode="RGB", **options):
    """A file's bytes, from uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        options = {"quality": 90, **options}
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def odd_files(rng):
    """{what it is: its bytes}, all of them readable; the sizes differ."""
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees to show it
    jpeg = encoded(pixels(rng, 61, 47))
    return {
        "rgb": jpeg,
        "wide": encoded(pixels(rng, 40, 130), subsampling=0),
        "tall": encoded(pixels(rng, 111, 33), subsampling=1),
        "tiny": encoded(pixels(rng, 5, 7)),
        "progressive": encoded(pixels(rng, 70, 50), progressive=True),
        "restarts": encoded(pixels(rng, 71, 64), restart_marker_blocks=3),
        "grey": encoded(pixels(rng, 52, 60), mode="L"),
        "cmyk": encoded(pixels(rng, 49, 58), mode="CMYK"),
        "rotated": encoded(pixels(rng, 44, 66), exif=rotated.tobytes()),
        "damaged EXIF": damaged_exif(jpeg),
        "PNG": encoded(pixels(rng, 45, 39), "PNG"),
        "PNG with alpha": encoded(pixels(rng, 45, 40), "PNG", mode="RGBA"),
        "PNG of a palette": encoded(pixels(rng, 46, 41), "PNG", mode="P"),
        "WebP": encoded(pixels(rng, 47, 42), "WEBP"),
        "BMP": encoded(pixels(rng, 48, 43), "BMP"),
    }


def corrupt_files(rng):
    """{what it is: its bytes}, none of them readable."""
    jpeg = encoded(pixels(rng, 80, 60))
    return {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "cut in the header": jpeg[:30],
        "cut in the middle": jpeg[: len(jpeg) // 2],
        "cut at the end": jpeg[:-2],
        "PNG cut in the middle": encoded(pixels(rng, 45, 39), "PNG")[:600],
    }


def damaged_exif(jpeg):
    """The JPEG with an EXIF directory that promises more than there is, in place of its JFIF."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x1a\0\x05\0\0\0\x01\0\0\xff\0"
    assert jpeg[2:4] == b"\xff\xe0"
    rest = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[rest:]


def wnid(label):
    return f"n{label * 7919 + 1440764:08d}"


def write_folder(root, train=(3, 2, 4), val=(1, 2, 1)):
    """Writes `root/train` and `root/val`; so many images of each class, named as ImageNet's."""
    rng = np.random.default_rng(0)
    for split, counts in ("train", train), ("val", val):
        for label, count in enumerate(counts):
            folder = root / split / wnid(label)
            folder.mkdir(parents=True)
            for number in range(count):
                content = encoded(pixels(rng, *rng.integers(30, 70, 2)))
                (folder / f"{folder.name}_{number}.JPEG").write_bytes(content)
    return root
