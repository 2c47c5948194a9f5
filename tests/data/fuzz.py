"""Reads many damaged image files and odd folders: none may crash, hang or end in a traceback.

    make fuzz

The seeds are small images of every kind and mode that Pillow writes and this project reads. Each
damaged file follows from its number alone; it is decoded in full, for evaluation and for training,
with and without its EXIF orientation. It passes if each gives pixels of the right shape or a
`CorruptImage` of one line that begins with the file's name. (Not all need agree: training decodes a
JPEG by another library, and only the rows it needs.)

An odd folder is a random tree of splits, classes, deeper folders, links, pipes, hidden and other
files. It passes if it is refused by a `UserError` of one line, or if the images that are found are
those that a second, plainer count finds, and reading them all under `on_corrupt="skip"` gives or
names each one.

Exits with 1 if any file or folder failed.
"""

import argparse
import collections
import concurrent.futures
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from shiftnet import data
from shiftnet.data import images
from shiftnet.data.stream import EvalStream
from shiftnet.errors import UserError
from tests.data import image_files
from tests.limit import limit

HANG = 10.0  # seconds of CPU
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
VALUES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)


def seeds() -> dict[str, bytes]:
    """A small file of every kind and mode that can be written, by name."""
    image = Image.fromarray(image_files.pixels(np.random.default_rng(0), 21, 26))
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, dict] = {
        "": {},
        "exif": {"exif": exif},
        "frames": {"save_all": True, "append_images": [image.rotate(9)]},
        "progressive": {"progressive": True},
        "lossless": {"lossless": True},
        "lzw": {"compression": "tiff_lzw"},
        "deflate": {"compression": "tiff_adobe_deflate"},
        "jpeg": {"compression": "jpeg"},
        "packbits": {"compression": "packbits"},
    }
    found: dict[str, bytes] = {}
    for kind in images.formats():
        if kind not in Image.SAVE:
            continue
        for mode in MODES:
            for extra, chosen in options.items():
                if extra and (kind not in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "MPO")):
                    continue
                buffer = io.BytesIO()
                try:
                    turned = image.convert("L").convert(mode) if mode[0] == "I" else image
                    turned.convert(mode).save(buffer, kind, **chosen)
                    images.decode(buffer.getvalue(), name=kind)
                except Exception:  # a mode or an option that this kind has not
                    continue
                if buffer.getvalue() not in found.values():
                    found[f"{kind} {mode} {extra}".strip()] = buffer.getvalue()
    return found


def damaged(number: int, found: dict[str, bytes]) -> tuple[str, bytes]:
    """The `number`-th damaged file, and what was done to which seed."""
    draw = random.Random(number)
    name = draw.choice(sorted(found))
    content = bytearray(found[name])
    kinds = ["cut", "flip", "value", "insert", "remove", "repeat", "splice", "early"]
    done = draw.choices(kinds, k=draw.choice((1, 1, 1, 2, 4)))
    for kind in done:
        at = draw.randrange(len(content) + 1) if content else 0
        early = draw.randrange(min(len(content), 64) + 1)
        length = draw.choice((1, 2, 4, 16, 200))
        if kind == "cut":
            del content[at:]
        elif kind in ("flip", "early") and content:
            for _ in range(draw.choice((1, 1, 3, 20))):
                place = draw.randrange(min(len(content), 64 if kind == "early" else 10**9))
                content[place] ^= 1 << draw.randrange(8)
        elif kind == "value":
            size = draw.choice((1, 2, 4))
            value = draw.choice(VALUES) % 256**size
            place = draw.choice((at, early))
            content[place : place + size] = value.to_bytes(size, draw.choice(("big", "little")))
        elif kind == "insert":
            content[at:at] = draw.randbytes(length)
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = content[at : at + length] * draw.choice((1, 2, 50))
        elif kind == "splice":
            other = found[draw.choice(sorted(found))]
            content[at:] = other[draw.randrange(len(other)) :]
    return f"{' '.join(done)} of {name}", bytes(content)


def read_file(content: bytes) -> str:
    """Reads a file in every way, and returns the outcome; an AssertionError says what is wrong."""
    name, size = "a b.jpg", 16
    outcomes = set()
    for exif in (False, True):
        given = {"name": name, "exif": exif}
        rng = np.random.default_rng(0)
        for read in (
            lambda given=given: images.decode(content, **given),
            lambda given=given: images.for_evaluation(content, size=size, resize=18, **given),
            lambda given=given, rng=rng: images.for_training(
                content, size=size, flip=True, rng=rng, **given
            ),
        ):
            try:
                pixels = read()
            except images.CorruptImage as error:
                message = str(error)
            else:
                assert (pixels.dtype, pixels.ndim) == (np.uint8, 3)
                assert pixels.shape[2] == 3, pixels.shape
                outcomes.add("decoded")
                continue
            assert message.startswith(f"{name} cannot be decoded ("), message
            assert "\n" not in message, message
            outcomes.add(re.sub(r"\d+", "N", message.partition("(")[2])[:60])
    return outcomes.pop() if len(outcomes) == 1 else "decoded in one way and not in another"


SPLITS = ("train", "Train", "val", "valid", "validation", "test", "Val", "other", "TRAIN")
CLASSES = ("cat", "dog", "ü猫", "a b", "x.jpg", "0", "@eaDir", ".git", "-", "__MACOSX", "é" * 90)
ENDINGS = (".jpg", ".JPG", ".png", ".tif", ".gif", ".txt", "", ".eps", ".jpg.part", ".webp")


def build(root: Path, draw: random.Random, contents: list[bytes]) -> None:
    """Fills a folder at random."""

    def fill(folder: Path, depth: int) -> None:
        for number in range(draw.choice((0, 1, 2, 3))):
            name = draw.choice(("im", ".im", "._im", "i m", "ü", "\udcff", "a\nb")) + str(number)
            path = folder / (name + draw.choice(ENDINGS))
            kind = draw.choice(("file",) * 8 + ("link", "broken", "pipe", "circle", "self", "bare"))
            try:
                if kind == "file":
                    path.write_bytes(draw.choice(contents))
                elif kind == "link":
                    os.symlink(root / "loose.jpg", path)
                elif kind == "broken":
                    os.symlink("/nonexistent/a.jpg", path)
                elif kind == "pipe":
                    os.mkfifo(path)
                elif kind == "circle":
                    os.symlink(draw.choice((folder, folder.parent, root)), path)
                elif kind == "self":
                    os.symlink(path.name, path)
                else:
                    path.mkdir()
            except FileExistsError:
                pass
        if depth:
            for name in draw.sample(CLASSES, draw.choice((0, 1, 2))):
                (folder / name).mkdir(exist_ok=True)
                fill(folder / name, depth - 1)

    (root / "loose.jpg").write_bytes(contents[0])
    kinds = draw.choice(CLASSES[:4]), draw.choice(CLASSES)
    splits = draw.choice((("train", "val"), ("train", "val"), tuple(draw.choices(SPLITS, k=2))))
    for split in splits:
        (root / split).mkdir(exist_ok=True)
        for name in {*kinds, *draw.sample(CLASSES, draw.choice((0, 0, 1)))}:
            (root / split / name).mkdir(exist_ok=True)
            (root / split / name / "sure.jpg").write_bytes(contents[0])
            fill(root / split / name, draw.choice((0, 1, 2)))
        fill(root / split, 0)


def count(folder: str, above: tuple[str, ...] = (), depth: int = 0) -> int:
    """The images of a split, counted by other means than `FolderSource`'s."""
    if os.path.realpath(folder) in above:
        return 0
    total = 0
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(".") or name in ("@eaDir", "__MACOSX"):
            continue
        if os.path.isdir(path):
            total += count(path, (*above, os.path.realpath(folder)), depth + 1)
        elif depth and os.path.splitext(name)[1].lower() in images.extensions():
            total += os.path.isfile(path) or os.path.islink(path)
    return total


def read_folder(root: Path) -> str:
    """Reads a folder's images, and returns the outcome."""
    try:
        dataset = data.load("", source="folder", data_dir=str(root))
    except UserError as error:
        message = str(error)
    else:
        return read_images(dataset)
    assert "\n" not in message.replace("a\nb", ""), message  # a folder's name may hold one
    return (
        "refused: " + re.sub(r":.*|/\S*|\d+", "…", message.replace(str(root), ""), flags=re.S)[:60]
    )


def read_images(dataset: data.Dataset) -> str:
    """Reads the images that were found, and compares their number with a second count."""
    outcome = "read"
    parts = (dataset.train, dataset.test)
    if isinstance(dataset.test, data.Subset):  # both are of one folder
        source = dataset.test.source
        assert len(dataset.train) + len(dataset.test) == len(source)
        parts = (source,)
    for part in parts:
        expected = count(str(part.folder))
        assert len(part) == expected, f"found {len(part)} images, expected {expected}"
        stream = EvalStream(part, size=8, resize=9, batch_size=8, on_corrupt="skip", workers=0)
        batches = list(stream)
        labels = np.concatenate([batch.labels for batch in batches])
        skipped = [name for batch in batches for name in batch.skipped]
        assert (labels >= 0).sum() + len(skipped) == expected, (labels, skipped)
        assert all(name.startswith(str(part.folder)) for name in skipped), skipped
        if skipped:
            outcome = "read, some skipped by name"
    return outcome


def work(first: int, stop: int, step: int, kind: str, journal: str) -> dict:
    """Reads every `step`-th file or folder, and returns what was seen."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff reports damage there by itself
    found = seeds()
    contents = [next(iter(found.values())), b"", *(damaged(n, found)[1] for n in range(20))]
    outcomes: collections.Counter[str] = collections.Counter()
    failures, slowest = [], (0.0, "")
    for number in range(first, stop, step):
        Path(journal).write_text(f"{kind} {number}")  # for one that ends the process
        begun = time.process_time()
        label = f"{kind} {number}"
        try:
            with limit(HANG):
                if kind == "file":
                    what, content = damaged(number, found)
                    label += f" ({what})"
                    outcome = read_file(content)
                else:
                    root = Path(tempfile.mkdtemp(prefix="shiftnet-fuzz-"))
                    try:
                        build(root, random.Random(number), contents)
                        outcome = read_folder(root)
                    finally:
                        shutil.rmtree(root)
        except BaseException as error:
            outcome = f"failed: {type(error).__name__}"
            failures.append(f"{label}: {type(error).__name__} {error}")
        outcomes[outcome] += 1
        slowest = max(slowest, (time.process_time() - begun, label))
    return {"outcomes": outcomes, "failures": failures, "slowest": slowest}


def run(kind: str, start: int, total: int, workers: int) -> bool:
    """Reads `total` files or folders, and prints what was seen; returns whether all passed."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    context = multiprocessing.get_context("spawn")
    outcomes: collections.Counter[str] = collections.Counter()
    failures, slowest = [], (0.0, "")
    with (
        tempfile.TemporaryDirectory() as here,
        concurrent.futures.ProcessPoolExecutor(workers, context) as pool,
    ):
        journals = [f"{here}/{first}" for first in range(workers)]
        parts = [
            pool.submit(work, first, start + total, workers, kind, journal)
            for first, journal in enumerate(journals, start)
        ]
        for part in parts:
            try:
                result = part.result()
            except concurrent.futures.process.BrokenProcessPool:
                last = [Path(journal).read_text() for journal in journals if Path(journal).exists()]
                failures.append(f"a process died while it read one of: {', '.join(last)}")
                break
            outcomes += result["outcomes"]
            failures += result["failures"]
            slowest = max(slowest, result["slowest"])
    took, done = time.perf_counter() - begun, sum(outcomes.values())
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    print(f"{kind}s: {done} in {took:.0f} s and {cpu:.0f} s of CPU,", end=" ")
    print(f"{1000 * took / max(done, 1):.0f} and {1000 * cpu / max(done, 1):.0f} s per 1,000")
    print(f"slowest          {slowest[0]:.2f} s: {slowest[1]}")
    for outcome, number in outcomes.most_common(20):
        print(f"{number:8d}  {outcome}")
    rest = outcomes.most_common()[20:]
    print(f"{sum(number for _, number in rest):8d}  {len(rest)} other outcomes")
    print(f"failures         {len(failures)}")
    for failure in failures[:20]:
        print(f"  {failure}")
    return not failures and done == total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, help="how many damaged files")
    parser.add_argument("--folders", type=int, default=500, help="how many odd folders")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="where to begin")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    passed = [
        run("file", options.first, options.files, options.workers),
        run("folder", options.first, options.folders, options.workers),
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
