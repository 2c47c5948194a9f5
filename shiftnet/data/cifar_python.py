"""CIFAR-10 and CIFAR-100 from the "python version" of their archives, which torchvision unpacks."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from shiftnet.data.cifar_archive import SIDE, Splits, check_class_names
from shiftnet.errors import UserError

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_FILES = {
    "cifar10": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    "cifar100": {"train": ["train"], "test": ["test"]},
}
# The file with the class names, its entry for them, and the files' entry for labels.
_META = {
    "cifar10": ("batches.meta", "label_names", "labels"),
    "cifar100": ("meta", "fine_label_names", "fine_labels"),
}


class _Unpickler(pickle.Unpickler):
    """Reads lists, texts and arrays of bytes; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _new_array
        if (module, name) == ("numpy", "dtype"):
            return _new_dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _encode
        if (module, name) == ("numpy", "ndarray"):
            return None  # only an argument of `_reconstruct`, which needs none
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _new_array(*arguments: Any) -> np.ndarray:
    del arguments
    return np.empty(0, np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    del encoding
    return text.encode("latin1")


def _new_dtype(name: str, *arguments: Any) -> np.dtype:
    del arguments
    if name != "u1":
        raise pickle.UnpicklingError(f"it holds numbers of the kind {name!r}, not bytes")
    return np.dtype("u1", False, True)  # a copy, whose state the pickle sets


def read(name: str, folder: Path) -> Splits:
    """Reads the files of a data set; nothing in them is run.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      folder: `cifar-10-batches-py` or `cifar-100-python`.

    Returns:
      As `shiftnet.data.cifar.load`.

    Raises:
      UserError: where a file is missing or damaged, or lists other classes.
    """
    file, key, labels_key = _META[name]
    check_class_names(name, folder / file, _entry(folder / file, key))
    classes = len(_entry(folder / file, key))
    splits = {}
    for split, files in _FILES[name].items():
        data = [_entry(folder / file, "data") for file in files]
        listed = [_entry(folder / file, labels_key) for file in files]
        try:
            images = np.concatenate([np.asarray(one, np.uint8) for one in data])
            labels = np.concatenate([np.asarray(one, np.int32) for one in listed])
            images = images.reshape(len(labels), 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            if not len(labels) or labels.min() < 0 or labels.max() >= classes:
                raise ValueError("a label is out of range")
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{folder} is damaged ({error}); unpack its archive again") from error
        splits[split] = np.ascontiguousarray(images), labels
    return splits


def _entry(path: Path, key: str) -> Any:
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        return found[key]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever damaged bytes make a pickle do
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {reason}); unpack its archive again"
        ) from error
