"""One encoded image: decoding, and the geometry of training and evaluation.

The numbers are those of torchvision's Pillow path (`Image.open(...).convert("RGB")`, `Resize`,
`CenterCrop`, `RandomResizedCrop`), which the published ImageNet results were made with. Like there,
the file's name says nothing about its kind, and damage that the JPEG library goes over is ignored
(it fills in grey); a file that ends early is an error. Unlike there, grey levels of more than 8
bits are scaled to 8, where Pillow's `convert` clips them at 255, and images of more pixels than
Pillow opens (178,956,970) are refused in training too.

EXIF orientation is applied where `exif` says so: people's own photos need it, and the published
ImageNet results were made without.

Training decodes ordinary JPEGs by simplejpeg, which is libjpeg-turbo as in Pillow and gives the
same pixels, and only down to the last row of the crop. For files of 500x375 pixels and 105 kB that
takes 1.0 ms on average, where Pillow takes 1.15 ms, and 1.24 ms for all rows (one core of a Xeon;
0.9 ms are entropy decoding). It resizes the crop by cykooz_resizer, Pillow's filter with vector
instructions: 0.21 ms in place of 0.65 ms (Pillow's where that is not installed). Everything else is
Pillow's.
"""

import functools
import io
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin

try:
    import cykooz_resizer as resizer
except ImportError:  # it has no wheel for Linux on ARM
    resizer = None

# Pillow opens these, but runs another program for them (EPS) or cannot decode them by itself.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

# torchvision's `RandomResizedCrop`: parts of the area, ratios of width to height, and tries.
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10

# Start of frame of the JPEGs that Pillow reads: baseline, extended, progressive.
_FRAMES = (0xC0, 0xC1, 0xC2)
_START_OF_IMAGE = b"\xff\xd8"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_METADATA = b"\xff\xe1"  # what EXIF and XMP begin with

_ORIENTATION = 0x0112  # the EXIF tag
# Orientation -> whether rows and columns change places, and whether rows and then columns are
# reversed after that (EXIF 2.3, 4.6.4).
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_TRANSPOSED = [orientation for orientation, (transposed, _, _) in _TURNS.items() if transposed]


class Encoded(NamedTuple):
    """An image as it is stored.

    Attributes:
      data: the file's bytes, or the pixels of an image that is stored decoded, uint8 [H, W, 3].
      label: of its class, counted from 0.
      name: what errors call it: a path, or the name that the data set gives it.
      exif: whether it is shown turned as its EXIF orientation says.
    """

    data: bytes | np.ndarray
    label: int
    name: str
    exif: bool = False


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns the kinds of image files that are read, by Pillow's names, such as `JPEG`."""
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in NOT_DECODED)


@functools.cache
def extensions() -> frozenset[str]:
    """Returns the endings of the image files that are read, in lower case, such as `.jpg`."""
    known = formats()
    return frozenset(
        ending for ending, kind in Image.registered_extensions().items() if kind in known
    )


class CorruptImage(ValueError):
    """An image that cannot be read. The message is one sentence: which file, and why.

    Attributes:
      name: of the file.
      reason: the rest of the sentence.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # what is pickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def decode(data: bytes | np.ndarray, *, name: str, exif: bool = False) -> np.ndarray:
    """Decodes an image in full.

    Args:
      data: the file's bytes: JPEG (grey, RGB, CMYK or YCCK), PNG or another of `formats()`; or
        pixels, as in `Encoded`.
      name: what an error calls it.
      exif: whether it is turned as its EXIF orientation says.

    Returns:
      uint8 [H, W, 3], red, green, blue.

    Raises:
      CorruptImage: if it cannot be decoded.
    """
    try:
        return np.asarray(_read(data, exif))
    except Exception as error:  # Pillow's readers each have their own
        raise _corrupt(name, data, error) from error


def for_evaluation(
    data: bytes | np.ndarray, *, size: int, resize: int, name: str, exif: bool = False
) -> np.ndarray:
    """Decodes an image and takes its middle: torchvision's `Resize(resize)`, `CenterCrop(size)`.

    The shorter side becomes `resize` and the other one `int(resize * longer / shorter)`, by
    Pillow's bilinear filter with antialiasing. The result is torchvision's, bit for bit.

    Args:
      data: as in `Encoded`.
      size: side of the result, in pixels; at most `resize`.
      resize: the shorter side before the crop, in pixels.
      name: what an error calls it.
      exif: whether it is turned as its EXIF orientation says.

    Returns:
      uint8 [size, size, 3].

    Raises:
      CorruptImage: if it cannot be decoded.
      ValueError: if `size` is more than `resize`.
    """
    if size > resize:
        raise ValueError(f"size is {size}, more than the {resize} that images are resized to")
    try:
        return middle(_open(data), size=size, resize=resize, exif=exif)
    except Exception as error:
        raise _corrupt(name, data, error) from error


def middle(image: Image.Image, *, size: int, resize: int, exif: bool = False) -> np.ndarray:
    """Takes the middle of an image that Pillow opened; see `for_evaluation`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      Exception: whatever Pillow raises if it cannot be decoded.
    """
    image = with_shorter_side(_upright(image, exif), resize)
    width, height = image.size
    # `round` is Python's, to even.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def with_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """Resizes an image as torchvision's `Resize(side)` does; see `for_evaluation`.

    Raises:
      ValueError: for an image without pixels.
    """
    shorter, longer = sorted(image.size)
    if not shorter:
        raise ValueError(f"the image has {image.width}x{image.height} pixels")
    other = int(side * longer / shorter)
    size = (side, other) if image.width <= image.height else (other, side)
    return image.resize(size, Image.Resampling.BILINEAR)


def for_training(
    data: bytes | np.ndarray,
    *,
    size: int,
    flip: bool,
    rng: np.random.Generator,
    name: str,
    exif: bool = False,
    scale: Sequence[float] = SCALE,
    ratio: Sequence[float] = RATIO,
) -> np.ndarray:
    """Decodes a random part of an image: torchvision's `RandomResizedCrop(size)`, then a flip.

    The crop (`crop_box`) is resized by Pillow's bilinear filter with antialiasing. A JPEG is not
    decoded below the crop. The result is torchvision's for the same choices but for rounding (200
    crops of files of 500x375 pixels: 19 % of the values differ, by 2 grey levels at most), as long
    as a side of the crop is less than twice `size`. Where both sides are at least 2, 4 or 8 times
    `size`, a JPEG is decoded to 1/2, 1/4 or 1/8 of its size (twice that where its colours are
    coarser in one direction), so that nothing is enlarged, and the result is near. Measured with
    Pillow's filter over 287 crops of noise with the spectrum of photographs, 1,000 to 3,000 pixels
    a side: the pixels differ from full decoding by 1.2 grey levels on average (3.9 in the worst
    crop) and by 25 at most.

    Args:
      data: as in `Encoded`.
      size: side of the result, in pixels.
      flip: whether the image is mirrored left to right with probability 1/2.
      rng: makes the random choices; the same state gives the same result.
      name: what an error calls it.
      exif: whether it is turned as its EXIF orientation says.
      scale, ratio: as of `crop_box`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      CorruptImage: if it cannot be decoded.
    """
    try:
        encoded = b"" if isinstance(data, np.ndarray) else data
        jpeg, less, orientation = _jpeg(encoded), 1, 1
        if jpeg:
            orientation = _jpeg_orientation(encoded, jpeg) if exif else 1
            shape = jpeg.shape[::-1] if orientation in _TRANSPOSED else jpeg.shape
        else:
            pixels = data if isinstance(data, np.ndarray) else np.asarray(_read(data, exif))
            shape = pixels.shape[0], pixels.shape[1]
        box = crop_box(rng, *shape, scale, ratio)
        top, left, height, width = _stored_box(box, shape, orientation)
        right, bottom = left + width, top + height
        if jpeg:
            while less < 8 and min(height, width) >= 2 * less * size:
                less *= 2
            if not jpeg.even and less > 1:
                less //= 2  # libjpeg would leave the colours at half of that size in one direction
            try:
                pixels = _upper_rows(encoded, jpeg, bottom, less)
            except ValueError:  # sampling factors that TurboJPEG does not know, or a damaged file
                pixels, less = np.asarray(_read(data, exif=False)), 1
        # The whole pixels of what is decoded that the crop touches, and the crop within them.
        x, y = left // less, top // less
        part = pixels[y : -(-bottom // less), x : -(-right // less)]
        corners = (left / less - x, top / less - y, right / less - x, bottom / less - y)
        image = _turned(_resized(part, corners, size), orientation)
        return image[:, ::-1] if flip and rng.random() < 0.5 else image
    except Exception as error:
        raise _corrupt(name, data, error) from error


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: Sequence[float] = SCALE,
    ratio: Sequence[float] = RATIO,
) -> tuple[int, int, int, int]:
    """Draws the part of an image that a training step sees.

    Its part of the area is uniform, and so is the logarithm of its ratio of width to height. When
    ten draws do not fit into the image, it is the middle: all of it, or as much as the nearest
    allowed ratio leaves.

    Args:
      rng: makes the random choices.
      height, width: of the image, in pixels.
      scale: the smallest and the largest part of the area.
      ratio: the smallest and the largest ratio of width to height.

    Returns:
      top, left, height and width of the part, in pixels.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(TRIES):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            return top, int(rng.integers(0, width - w, endpoint=True)), h, w
    w, h = width, height
    if width < ratio[0] * height:
        h = round(width / ratio[0])
    elif width > ratio[1] * height:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _open(data: bytes | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    with warnings.catch_warnings():
        # About metadata that nothing here uses; some files of ImageNet have damaged EXIF.
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=formats())


def _read(data: bytes | np.ndarray, exif: bool) -> Image.Image:
    """Decodes an image in full, in mode RGB."""
    return _upright(_open(data), exif)


def _upright(image: Image.Image, exif: bool) -> Image.Image:
    """Returns an image in mode RGB, turned as its EXIF orientation says if `exif`."""
    image.load()  # a TIFF's reader turns the image, and then no longer knows of an orientation
    orientation = _orientation(image) if exif else 1
    image = _rgb(image)
    if orientation == 1:
        return image
    return Image.fromarray(_turned(np.asarray(image), orientation))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Pillow's reader of PGM scales integers to 16 bits.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise ValueError(
            f"its pixels are {kind}, whose range the file does not state; expected 8 or 16 bits"
        )
    if image.mode[0] == "I":
        bits, inverted = 16, False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
            inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        grey = (np.asarray(image).astype(np.int32) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(~grey if inverted else grey)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing; each of Pillow's readers has its own errors
        return 1
    return orientation if orientation in _TURNS else 1


def _jpeg_orientation(data: bytes, jpeg: "_Jpeg") -> int:
    """Returns a JPEG's orientation; opens it only where there is metadata."""
    return _orientation(_open(data)) if _METADATA in data else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns [H, W, 3] as stored into what is to be seen."""
    transposed, up, left = _TURNS[orientation]
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if up else 1, :: -1 if left else 1]


def _stored_box(
    box: tuple[int, int, int, int], shape: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Returns where a part of the image that is seen lies in the image that is stored.

    Args:
      box: top, left, height and width, in pixels.
      shape: height and width of what is seen.
      orientation: of the EXIF.
    """
    top, left, height, width = box
    transposed, up, mirrored = _TURNS[orientation]
    if up:
        top = shape[0] - top - height
    if mirrored:
        left = shape[1] - left - width
    return (left, top, width, height) if transposed else (top, left, height, width)


def _resized(pixels: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Resizes the part from (left, top) to (right, bottom) to `size` squared, bilinearly.

    Args:
      pixels: uint8 [H, W, 3].
      box: left, top, right and bottom.
      size: side of the result.

    Returns:
      uint8 [size, size, 3].
    """
    if resizer is None:
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    left, top, right, bottom = box
    options = resizer.ResizeOptions(
        resizer.ResizeAlg.convolution(resizer.FilterType.bilinear),
        crop_box=resizer.CropBox(left, top, right - left, bottom - top),
    )
    height, width, _ = pixels.shape
    source = resizer.ImageData(width, height, resizer.PixelType.U8x3, pixels.tobytes())
    result = resizer.ImageData(size, size, resizer.PixelType.U8x3)
    resizer.Resizer().resize(source, result, options)  # one a call: threads must not share it
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(size, size, 3)


def _corrupt(name: str, data: bytes | np.ndarray, error: Exception) -> CorruptImage:
    if not len(data):
        reason = "it is empty"
    elif isinstance(error, Image.UnidentifiedImageError):
        reason = "it is no image of a known kind"  # Pillow's sentence gives a memory address
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return CorruptImage(name, f"cannot be decoded ({reason})")


class _Jpeg(NamedTuple):
    """The header of an ordinary JPEG.

    Attributes:
      shape: height and width in pixels.
      height_at: where the two bytes of the height are.
      block_row: how many rows are coded together.
      even: whether colours are as coarse vertically as horizontally.
    """

    shape: tuple[int, int]
    height_at: int
    block_row: int
    even: bool


def _jpeg(data: bytes) -> _Jpeg | None:
    """Reads the header of a JPEG; None for one that Pillow must decode, and for all other files.

    That is a JPEG which is not grey or of three colours, or which has no end: simplejpeg would fill
    in the missing part, or never see it, and that a file is cut off must not depend on the crop.
    """
    at = 2 if data.startswith(_START_OF_IMAGE) else len(data)
    while data[at : at + 1] == b"\xff" and at + 10 <= len(data):
        marker = data[at + 1]
        if marker in _FRAMES:
            # length (2 bytes), precision (1), height (2), width (2), components (1), and then for
            # each component its id, sampling factors (horizontal << 4 | vertical), and table
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            components = data[at + 9]
            factors = data[at + 11 : at + 10 + 3 * components : 3]
            across, down = [factor >> 4 for factor in factors], [factor & 15 for factor in factors]
            block_row = 8 * max(down, default=0)
            complete = data.rfind(_END_OF_IMAGE, at) > 0
            if not (complete and components in (1, 3) and height and width and block_row):
                return None
            if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
                return None  # Pillow says that it is too large
            even = max(across) * min(down) == max(down) * min(across)
            return _Jpeg((height, width), at + 5, block_row, even)
        if marker == _START_OF_SCAN:
            return None
        # A filler byte, or a segment, which begins with its length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _upper_rows(data: bytes, jpeg: _Jpeg, rows: int, scale: int) -> np.ndarray:
    """Decodes a JPEG from the top to `rows` or a little below.

    It is given a smaller height in its header. The pixels of the rows above do not change by a bit:
    decoding goes from top to bottom. Only for the last row of a block row does the interpolation of
    colours look at the next one, which is kept as well when that row is needed.

    Args:
      data: the file's bytes.
      jpeg: its header.
      rows: how many rows, counted from the top, are needed.
      scale: 1, 2, 4 or 8; what the size is divided by, rounding up.

    Returns:
      uint8 [at least rows / scale, width / scale, 3].

    Raises:
      ValueError: when TurboJPEG cannot decode it.
    """
    height, width = jpeg.shape
    at, enough = jpeg.height_at, (rows // jpeg.block_row + 1) * jpeg.block_row
    if enough < height:
        data, height = data[:at] + enough.to_bytes(2, "big") + data[at + 2 :], enough
    return simplejpeg.decode_jpeg(
        data,
        min_height=-(-height // scale),
        min_width=-(-width // scale),
        min_factor=scale,
        strict=False,  # the data that is left over is no error
    )
