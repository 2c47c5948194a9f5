"""The official archives of CIFAR-10 and CIFAR-100: where they are, and what is in them."""

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import shiftnet.files
from shiftnet.errors import UserError

NAMES = ("cifar10", "cifar100")
VERSION = "3.0.2"  # of the TFDS data sets; the directory is named after it
SIDE = 32  # pixels

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


def download(name: str, folder: Path, path: Path, url: str, sha256: str) -> None:
    """Downloads the archive of a data set.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      folder: where it is to be prepared; for the error.
      path: where the archive goes.
      url: of the archive.
      sha256: what it must hash to, in lower-case hexadecimal.

    Raises:
      UserError: if it cannot be fetched or written, or has another digest; then nothing is kept.
    """
    try:
        content = shiftnet.files.download(url, sha256)
    except shiftnet.files.NotDownloaded as error:
        raise UserError(
            f"{name} is not prepared in {folder} and {error}; connect "
            f"to the network, or set data.dir or $TFDS_DATA_DIR to a directory that holds "
            f"{name}/{VERSION}, or put the archive in place as {path}"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error})") from error
    shiftnet.files.write_atomically(path, content)


def read(name: str, path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
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
