"""Images resized once, in array_record files: `shiftnet prepare` writes them, training reads them.

A prepared folder holds `prepared.json`, and for each part ("train", "test", or "all" for images
that are not divided) `PART.npz`, the labels and names, and `PART-00000.array_record` and so on. A
record is a JPEG file, or the pixels behind their height and width. Order, class names, labels and
names are those of the images that it was made of, so that the same are held out, and shuffled
alike.
"""

import contextlib
import io
import json
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from shiftnet.data import images
from shiftnet.data.images import CorruptImage, Encoded
from shiftnet.data.parts import Source
from shiftnet.data.workers import allowed_cores
from shiftnet.errors import UserError

MANIFEST = "prepared.json"
FORMAT = "shiftnet images 1"
FORMS = ("raw", "jpeg")
QUALITY = 90  # of JPEG
JPEG_SIDE = 65500  # the longest side in pixels that libjpeg writes (JPEG_MAX_DIMENSION)
FILE_BYTES = 1 << 30  # a file is closed when it has as many
# Random access needs one record per group. Pixels and JPEGs hardly shrink, and inflating would
# take longer than reading them.
OPTIONS = "group_size:1,uncompressed"
_SHAPE = np.dtype("<u4")  # of the height and the width before pixels

Form = Literal["raw", "jpeg"]


class PreparedSource:
    """The images of one part of a prepared folder, read when asked for.

    Args:
      folder: the prepared folder.
      part: "train", "test" or "all".
      present: whether classes without images here are left out of `class_names`.

    Attributes:
      folder: as given, with the part.
      class_names: indexed by label.
      labels: int32 [N], of each image.
      missing: the members of `class_names` without images.
      left_out: what was not read when it was prepared, in words.
      exif: whether the images were turned as their EXIF orientation says.
      side: the images' shorter sides were resized to this, in pixels, where they were longer.
      form: "raw" or "jpeg".

    Raises:
      UserError: if the folder has no such part, or is damaged.
    """

    def __init__(self, folder: Path, part: str, *, present: bool = False) -> None:
        manifest = _manifest(folder)
        try:
            found = manifest["parts"][part]
            self.folder = folder / part
            self._within = part == "train"
            self.form: Form = manifest["form"]
            self.side: int = manifest["side"]
            self.exif: bool = manifest["exif"]
            self.left_out: str = found["left_out"]
            names = tuple(manifest["class_names"])
            for file, size in found["files"].items():
                if Path(file).name != file or (folder / file).stat().st_size != size:
                    raise ValueError(f"{file} is not of the size that was written")
            with np.load(folder / f"{part}.npz", allow_pickle=False) as arrays:
                labels, self._ends = arrays["labels"], arrays["ends"]
                self._names = arrays["names"].tobytes()
            self._records = ArrayRecordDataSource([str(folder / file) for file in found["files"]])
            if not len(labels) == len(self._ends) == len(self._records) == found["images"] > 0:
                raise ValueError(f"{part} does not have the {found['images']} images it had")
            images_of = np.bincount(labels, minlength=len(names))
            if self.form not in FORMS or len(images_of) != len(names):
                raise ValueError(f"{MANIFEST} does not fit its files")
        except Exception as error:  # JSON, NumPy and array_record each have their own
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder} is damaged ({type(error).__name__}: {reason}); prepare it again"
            ) from error
        if present:
            labels = (np.cumsum(images_of > 0) - 1)[labels]
            names = tuple(name for name, count in zip(names, images_of, strict=True) if count)
        self.labels = labels.astype(np.int32)
        self.class_names = names
        used = set(self.labels.tolist())
        self.missing = tuple(name for label, name in enumerate(names) if label not in used)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the path that an image was read from, in the folder that was prepared.

        Raises:
          IndexError: if there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]])

    def own_name(self, index: int) -> str:
        """Returns the path that an image was read from, in the split's folder."""
        name = self.name(index)
        return name.partition("/")[2] if self._within else name

    def __getitem__(self, index: int) -> Encoded:
        """Reads an image.

        Raises:
          IndexError: if there is no such image.
          CorruptImage: if it cannot be read.
        """
        name = self.name(index)
        try:
            data: bytes | np.ndarray = self._records[index]
            if self.form == "raw":
                assert isinstance(data, bytes)
                height, width = np.frombuffer(data, _SHAPE, 2)
                data = np.frombuffer(data, np.uint8, offset=8).reshape(height, width, 3)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CorruptImage(f"{self.folder}: {name}", f"cannot be read ({reason})") from error
        return Encoded(data, int(self.labels[index]), name)

    @property
    def how(self) -> str:
        """How the images were prepared, in words."""
        kind = "raw" if self.form == "raw" else f"JPEG {QUALITY}"
        return f"prepared with shorter sides of at most {self.side} pixels, {kind}"


def is_prepared(folder: Path) -> bool:
    """Tells whether a folder was written by `write`."""
    return (folder / MANIFEST).is_file()


def parts_of(folder: Path, *, exif: bool) -> Mapping[str, Any]:
    """Returns the names of a prepared folder's parts.

    Raises:
      UserError: if it is damaged, or its images were turned as their EXIF orientation says and
        `exif` is false.
    """
    manifest = _manifest(folder)
    if manifest.get("exif") and not exif:
        raise UserError(
            f"{folder} was prepared with images turned as their EXIF orientation says; without "
            f"(data.exif=false, and for imagenet2012) it must be prepared by --no-exif"
        )
    parts = manifest.get("parts")
    return parts if isinstance(parts, dict) else {}


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder / MANIFEST} is of the format {found!r}; expected {FORMAT!r}")
    return manifest


class Written(NamedTuple):
    """What `write` wrote.

    Attributes:
      images: how many of each part.
      skipped: the names of corrupt files, which were left out.
      size: of all files, in bytes.
    """

    images: dict[str, int]
    skipped: list[str]
    size: int


def write(
    out: Path,
    sources: Mapping[str, Source],
    class_names: tuple[str, ...],
    *,
    side: int,
    form: Form,
    exif: bool,
    root: Path,
    on_corrupt: str,
    report: Callable[[str], None] = lambda text: None,
) -> Written:
    """Writes a prepared folder, whole or not at all.

    All goes into a hidden folder beside `out`, which takes its name at the end and is removed where
    anything fails. Images are resized as for evaluation, so that an evaluation whose `data.resize`
    is `side` sees the same bits in the form "raw" as in the originals. None is enlarged. Threads
    decode, one per core; Pillow lets go of Python's lock meanwhile.

    Args:
      out: the folder to write, which must not exist yet.
      sources: the images of each part; with `left_out` what is said of that part.
      class_names: indexed by the sources' labels.
      side: what the shorter side is resized to where it is longer, in pixels.
      form: "raw" or "jpeg".
      exif: whether the sources turn images as their EXIF orientation says.
      root: what the names of images are shortened by.
      on_corrupt: "error", or "skip" to leave out what cannot be decoded.
      report: is told how far it is, now and then.

    Raises:
      UserError: if there is something at `out`, it cannot be written, or an image cannot be
        decoded.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; remove it, or name another folder")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is not a directory; expected one to write {out.name} into")
    start = os.path.join(root, "")
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        parts, skipped = {}, []
        for part, source in sources.items():
            writer = _Writer(temporary, part)
            said = time.monotonic()
            with writer:
                for index, result in enumerate(_resized(source, side, form)):
                    if isinstance(result, CorruptImage):
                        if on_corrupt == "error":
                            raise UserError(str(result)) from result
                        skipped.append(result.name)
                    else:
                        writer.add(result.record, result.label, result.name.removeprefix(start))
                    if time.monotonic() - said > 10:
                        said = time.monotonic()
                        report(f"{part}: {index + 1} of {len(source)} images")
            if not writer.labels:
                raise UserError(f"none of the {len(source)} images of {part} can be decoded")
            parts[part] = writer.described(getattr(source, "left_out", ""))
        manifest = {
            "format": FORMAT,
            "side": min(side, *(getattr(source, "side", side) for source in sources.values())),
            "form": form,
            "exif": exif,
            "class_names": list(class_names),
            "parts": parts,
        }
        _write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        size = sum(file.stat().st_size for file in temporary.iterdir())
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Written({part: described["images"] for part, described in parts.items()}, skipped, size)


class _Resized(NamedTuple):
    record: bytes
    label: int
    name: str


def _resized(source: Source, side: int, form: Form) -> Iterator[_Resized | CorruptImage]:
    """Yields the images of a source in order, decoded and resized by threads."""

    def one(index: int) -> _Resized | CorruptImage:
        try:
            encoded = source[index]
            pixels = images.decode(encoded.data, name=encoded.name, exif=encoded.exif)
        except CorruptImage as error:
            return error
        image = Image.fromarray(pixels)
        if min(image.size) > side:
            image = images.with_shorter_side(image, side)
        if form == "raw":
            shape = np.array([image.height, image.width], _SHAPE)
            return _Resized(shape.tobytes() + image.tobytes(), encoded.label, encoded.name)
        file = io.BytesIO()
        if max(image.size) > JPEG_SIDE:
            size = f"{image.width}x{image.height}"
            return CorruptImage(encoded.name, f"would be {size} pixels, too long for a JPEG")
        image.save(file, "JPEG", quality=QUALITY)
        return _Resized(file.getvalue(), encoded.label, encoded.name)

    count = allowed_cores()
    pool = ThreadPoolExecutor(count)
    waiting: deque[Future[_Resized | CorruptImage]] = deque()
    try:
        for index in range(len(source)):
            waiting.append(pool.submit(one, index))
            if len(waiting) > 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Writer:
    """Writes one part; use it as a context manager."""

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        self.labels: list[int] = []
        self._names: list[bytes] = []
        self._files: list[Path] = []
        self._open: Any = None
        self._bytes = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._close()
        except OSError:
            if kind is None:  # what failed first is to be said
                raise
        if kind is None:
            content = io.BytesIO()
            np.savez(
                content,
                labels=np.array(self.labels, np.int32),
                names=np.frombuffer(b"".join(self._names), np.uint8),
                ends=np.cumsum([len(name) for name in self._names], dtype=np.int64),
            )
            _write_synced(self._folder / f"{self._part}.npz", content.getvalue())

    def add(self, record: bytes, label: int, name: str) -> None:
        if self._open is None:
            file = self._folder / f"{self._part}-{len(self._files):05}.array_record"
            self._files.append(file)
            with _writing(file):
                self._open = ArrayRecordWriter(str(file), OPTIONS)
        with _writing(self._files[-1]):
            self._open.write(record)
        self.labels.append(label)
        self._names.append(os.fsencode(name))
        self._bytes += len(record)
        if self._bytes >= FILE_BYTES:
            self._close()

    def described(self, left_out: str) -> dict[str, Any]:
        """Returns what the manifest says of this part."""
        files = {file.name: file.stat().st_size for file in self._files}
        return {"images": len(self.labels), "left_out": left_out, "files": files}

    def _close(self) -> None:
        writer, self._open, self._bytes = self._open, None, 0
        if writer is not None:
            with _writing(self._files[-1]):
                writer.close()
            with self._files[-1].open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Raises errors of array_record as an OSError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise OSError(f"{file.name}: {' '.join(str(error).split())}") from error


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
