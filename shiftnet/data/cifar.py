"""CIFAR-10 and CIFAR-100 from a TensorFlow Datasets directory, without TensorFlow.

A data set lives where TFDS keeps it, in `DATA_DIR/cifar100/3.0.2`, as array_record files; one
that TFDS itself prepared in that form is used as it is. When there is none, the official archive
is downloaded to `DATA_DIR/downloads`, held to its SHA-256 and prepared by TFDS (`cifar_tfds`).
TFDS's own download manager is not used: without a network it retries for minutes.

TFDS stores every image as a PNG. They are decoded once, into `DATA_DIR/cifar100/3.0.2-decoded.npz`
beside the prepared files, which is read as long as those files stay as they were. Where it cannot
be written, every run decodes.
"""

import contextlib
import hashlib
import http.client
import json
import os
import posixpath
import shutil
import ssl
import sys
import tarfile
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from shiftnet.errors import UserError

NAMES = ("cifar10", "cifar100")
VERSION = "3.0.2"  # of the TFDS data sets; the directory is named after it
SIDE = 32  # pixels

# The recipe of the shift networks uses these for both sets (Wu et al., arXiv:1711.08141, and its
# published code).
NORMALIZATION = dict.fromkeys(NAMES, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))

# The recipe of the 1-bit wide ResNets uses these for both (the PyTorch code of arXiv:1802.08530).
WRN_NORMALIZATION = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))

# In the order of the archives' own label files.
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASS_NAMES = {"cifar10": tuple(_CIFAR10.split()), "cifar100": tuple(_CIFAR100.split())}


class Archive(NamedTuple):
    """Where the "binary version" of a data set is, and how it is laid out.

    A record is one byte a label, then the pixels, channel by channel and row by row.

    Attributes:
      url, sha256: the official ones, as TFDS's own list of checksums has them.
      folder: what the names of the archive's members begin with.
      files: the members that hold each split's records, in order.
      label_files: for each label byte of a record, the member that lists its classes.
    """

    url: str
    sha256: str
    folder: str
    files: dict[str, tuple[str, ...]]
    label_files: dict[str, str]


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin",
        {
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        {"label": "batches.meta.txt"},
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
    ),
}

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def load(name: str, data_dir: str = "", *, url: str = "", sha256: str = "") -> Splits:
    """Reads a CIFAR, and downloads and prepares it before that when it is not there.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      data_dir: the TFDS directory; empty stands for `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
      url, sha256: where to download the archive from and the digest to hold it to; empty stands
        for the official ones.

    Returns:
      `{"train": (images, labels), "test": (images, labels)}`, uint8 [N, 32, 32, 3] and int32 [N],
      in the order of the official archive. CIFAR-100 has its 100 fine labels.

    Raises:
      UserError: when the data is not there and cannot be fetched, has a wrong digest, is damaged,
        or was prepared in a form that needs TensorFlow.
    """
    directory = root(data_dir)
    folder = directory / name / VERSION
    if not folder.exists():
        official = ARCHIVES[name]
        prepare(name, directory, url or official.url, (sha256 or official.sha256).lower())
    cache = folder.with_name(f"{VERSION}-decoded.npz")
    source = _fingerprint(folder)
    splits = _read_cache(cache, source)
    if splits is None:
        _say(f"{name}: decoding {folder}")
        from shiftnet.data import cifar_tfds  # the only module that needs TFDS and Pillow

        splits = cifar_tfds.read(name, folder)
        with contextlib.suppress(OSError):  # a read-only directory, or a full disk
            _write_cache(cache, source, splits)
    return splits


def root(data_dir: str) -> Path:
    """The TFDS directory that `data_dir` stands for; see `load`.

    Raises:
      UserError: when it is not a local one.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in chosen:
        raise UserError(f"data.dir is {chosen!r}; expected a local directory")
    return Path(chosen).expanduser()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` if the block ends well, and is gone if it does not."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# Download and preparation


def prepare(name: str, root: Path, url: str, sha256: str) -> None:
    """Makes `root/name/3.0.2` from the archive at `url`.

    An archive that is in `root/downloads` already is used in place of a download, so a machine
    without a network can be given one. Nothing is left in `root/name` on failure.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      root: the TFDS directory; made when it is not there.
      url: of the archive.
      sha256: what the archive must hash to, in lower-case hexadecimal.

    Raises:
      UserError: when the archive cannot be fetched, has another digest or is not laid out as
        CIFAR is, or when `root` cannot be written.
    """
    folder = root / name / VERSION
    path = root / "downloads" / posixpath.basename(ARCHIVES[name].url)
    if not path.exists():
        _download(name, folder, path, url, sha256)
    elif (found := _sha256(path)) != sha256:
        raise UserError(
            f"{path} has SHA-256 {found}, expected {sha256}; remove it to have it downloaded again"
        )
    records, label_names = _read_archive(name, path)
    _say(f"{name}: preparing {folder}")
    from shiftnet.data import cifar_tfds

    try:
        cifar_tfds.write(name, root, records, label_names)
    except OSError as error:
        if not folder.exists():  # or else another process has prepared it in the meantime
            raise UserError(f"{folder} cannot be written ({error})") from error


def _download(name: str, folder: Path, path: Path, url: str, sha256: str) -> None:
    _say(f"{name}: downloading {url} to {path}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(path) as file:
                shutil.copyfileobj(response, file, 1 << 20)
                file.flush()
                if (found := _sha256(Path(file.name))) != sha256:
                    raise UserError(
                        f"{url} has SHA-256 {found}, expected {sha256}; nothing was kept"
                    )
    except UserError:
        raise
    # No such server, no such file there, cut off, or (ValueError) not a URL.
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ssl.SSLError,
        ValueError,
    ) as error:
        raise UserError(
            f"{name} is not prepared in {folder} and {url} cannot be downloaded ({error}); connect "
            f"to the network, or set data.dir or $TFDS_DATA_DIR to a directory that holds "
            f"{name}/{VERSION}, or put the archive in place as {path}"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_archive(name: str, path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Reads an archive of the official layout in memory; nothing is extracted to disk.

    Returns:
      The records of each split, uint8 [N, labels + 3072], and the class names of each label.

    Raises:
      UserError: when the archive is damaged or is not laid out as expected.
    """
    archive = ARCHIVES[name]
    wanted = {file for files in archive.files.values() for file in files}
    wanted.update(archive.label_files.values())
    contents = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                if folder == archive.folder and file in wanted and member.isfile():
                    stream = tar.extractfile(member)
                    assert stream is not None  # it is a regular file
                    contents[file] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error
    if missing := wanted - contents.keys():
        raise UserError(f"{path} has no {archive.folder}/{min(missing)}; is it the binary version?")

    label_names = {
        label: contents[file].decode().split() for label, file in archive.label_files.items()
    }
    check_class_names(name, path, label_names["label"])
    width = len(label_names) + 3 * SIDE * SIDE
    records = {}
    for split, files in archive.files.items():
        content = b"".join(contents[file] for file in files)
        if not content or len(content) % width:
            raise UserError(
                f"{path} is damaged: its {split} split has {len(content)} bytes, expected a "
                f"multiple of {width}"
            )
        records[split] = np.frombuffer(content, np.uint8).reshape(-1, width)
        for column, names in enumerate(label_names.values()):
            if (largest := records[split][:, column].max()) >= len(names):
                raise UserError(
                    f"{path} is damaged: its {split} split has the label {largest}, expected less "
                    f"than {len(names)}"
                )
    return records, label_names


def check_class_names(name: str, path: Path, found: Sequence[str]) -> None:
    """Refuses a source whose labels would stand for other classes than those of `CLASS_NAMES`.

    Raises:
      UserError: when the class names found in `path` are others, or in another order.
    """
    if tuple(found) != CLASS_NAMES[name]:
        raise UserError(f"{path} does not list the classes of {name} in the official order")


# The decoded copy


def _fingerprint(folder: Path) -> str:
    """Changes with any change of the files in `folder`."""
    try:
        stats = {file.name: file.stat() for file in sorted(folder.iterdir())}
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error})") from error
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()])


def _write_cache(path: Path, source: str, splits: Splits) -> None:
    with _replacing(path) as file:
        np.savez(
            file,
            source=np.array(source),
            train_images=splits["train"][0],
            train_labels=splits["train"][1],
            test_images=splits["test"][0],
            test_labels=splits["test"][1],
        )


def _read_cache(path: Path, source: str) -> Splits | None:
    """The splits in the cache, or None when there is no cache of `source` or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["source"] != source:
                return None
            return {  # reading an array checks its CRC-32
                split: (arrays[f"{split}_images"], arrays[f"{split}_labels"])
                for split in ("train", "test")
            }
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
