"""CIFAR-10 and CIFAR-100 from a TensorFlow Datasets directory, without TensorFlow.

A data set lives where TFDS keeps it, in `DATA_DIR/cifar100/3.0.2`, as array_record files; one
that TFDS itself prepared in that form is used as it is. When there is none, the official archive
is downloaded to `DATA_DIR/downloads`, held to its SHA-256 and prepared by TFDS (`cifar_tfds`);
but where torchvision has unpacked the archive's "python version", that is read (`cifar_python`).
TFDS's own download manager is not used: without a network it retries for minutes.

TFDS stores every image as a PNG. They are decoded once, into `DATA_DIR/cifar100/3.0.2-decoded.npz`
beside the prepared files, which is read as long as those files stay as they were. Where it cannot
be written, every run decodes.
"""

import contextlib
import io
import json
import os
import posixpath
import sys
import zipfile
from pathlib import Path

import numpy as np

from shiftnet.data import cifar_archive, cifar_python
from shiftnet.data.cifar_archive import ARCHIVES, CLASS_NAMES, NAMES, SIDE, VERSION, Splits
from shiftnet.errors import UserError
from shiftnet.files import path_of, sha256_of, write_atomically

__all__ = [
    "ARCHIVES",
    "CLASS_NAMES",
    "NAMES",
    "NORMALIZATION",
    "SIDE",
    "VERSION",
    "WRN_NORMALIZATION",
    "load",
    "prepare",
    "root",
]

# The recipe of the shift networks uses these for both sets (Wu et al., arXiv:1711.08141, and its
# published code).
NORMALIZATION = dict.fromkeys(NAMES, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))

# The recipe of the 1-bit wide ResNets uses these for both (the PyTorch code of arXiv:1802.08530).
WRN_NORMALIZATION = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))


def load(name: str, data_dir: str = "", *, url: str = "", sha256: str = "") -> Splits:
    """Reads a CIFAR, and downloads and prepares it before that if it is not there.

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
        if (unpacked := directory / cifar_python.FOLDERS[name]).is_dir():
            return cifar_python.read(name, unpacked)
        official = ARCHIVES[name]
        _check_place(name, directory)
        prepare(name, directory, url or official.url, (sha256 or official.sha256).lower())
    cache = folder.with_name(f"{VERSION}-decoded.npz")
    source = _fingerprint(folder)
    splits = _read_cache(cache, source)
    if splits is None:
        _say(f"{name}: decoding {folder}")
        from shiftnet.data import cifar_tfds  # the only module that needs TFDS and Pillow

        splits = cifar_tfds.read(name, folder)
        with contextlib.suppress(UserError):  # a read-only directory, or a full disk
            _write_cache(cache, source, splits)
    return splits


def root(data_dir: str) -> Path:
    """Returns the TFDS directory that `data_dir` stands for; see `load`.

    Raises:
      UserError: if it is not a local one, or there is no home directory.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR")
    if chosen:
        return path_of(chosen, "data.dir" if data_dir else "$TFDS_DATA_DIR")
    try:
        return Path("~/tensorflow_datasets").expanduser()
    except RuntimeError as error:  # a container's user without a name
        raise UserError(
            "there is no home directory to look for data sets in; set data.dir or $TFDS_DATA_DIR"
        ) from error


def _check_place(name: str, root: Path) -> None:
    """Refuses to prepare a data set in a directory that was not meant for it.

    That is one inside of a data set, one of other files, and one whose path is wrong.

    Raises:
      UserError: names the directory that is meant, or says what is wrong.
    """
    for inside, meant in ((root / VERSION, root.parent), (root, root.parent.parent)):
        if (inside / "dataset_info.json").is_file():
            raise UserError(
                f"data.dir is {root}, which is inside of a data set; expected {meant}, the "
                f"directory that holds {name}/{VERSION}"
            )
    if not root.parent.is_dir():
        raise UserError(f"data.dir is {root}, and {root.parent} does not exist; is it mistyped?")
    if not holds_datasets(root):
        raise UserError(
            f"{root} holds other files and no {name}/{VERSION}; expected a directory of prepared "
            f"data sets, or an empty one, to download {name} to"
        )


def holds_datasets(directory: Path) -> bool:
    """Tells whether prepared data sets are in a directory, or can be without mixing with others."""
    if not directory.is_dir():
        return True
    visible = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    if visible <= {"downloads", *NAMES}:
        return True
    return any((directory / name).is_dir() for name in cifar_python.FOLDERS.values()) or any(
        any(directory.glob(f"{above}/*.*.*/dataset_info.json")) for above in ("*", "*/*")
    )


def _lies_there(name: str, root: Path) -> str:
    """Says which other forms of a data set there are, which are not read; empty if there are none.

    TFDS had other versions of it.
    """
    others = list(root.glob(f"{name}/*.*.*/"))
    return f"; {', '.join(map(str, others))}: not read, another form or version" if others else ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Preparation


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
        _say(f"{name}: downloading {url} to {path}{_lies_there(name, root)}")
        cifar_archive.download(name, folder, path, url, sha256)
    elif (found := sha256_of(path)) != sha256:
        raise UserError(
            f"{path} has SHA-256 {found}, expected {sha256}; remove it to have it downloaded again"
        )
    records, label_names = cifar_archive.read(name, path)
    _say(f"{name}: preparing {folder}")
    from shiftnet.data import cifar_tfds

    try:
        cifar_tfds.write(name, root, records, label_names)
    except OSError as error:
        if not folder.exists():  # or else another process has prepared it in the meantime
            raise UserError(f"{folder} cannot be written ({error})") from error


# The decoded copy


def _fingerprint(folder: Path) -> str:
    """Changes with any change of the files in `folder`."""
    try:
        stats = {file.name: file.stat() for file in sorted(folder.iterdir())}
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error})") from error
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()])


def _write_cache(path: Path, source: str, splits: Splits) -> None:
    file = io.BytesIO()
    np.savez(
        file,
        source=np.array(source),
        train_images=splits["train"][0],
        train_labels=splits["train"][1],
        test_images=splits["test"][0],
        test_labels=splits["test"][1],
    )
    write_atomically(path, file.getvalue())


def _read_cache(path: Path, source: str) -> Splits | None:
    """Returns the splits in the cache; None if there is none of `source`, or it is damaged."""
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
