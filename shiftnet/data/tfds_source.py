"""ImageNet, and any other set of labelled images, from a TensorFlow Datasets directory.

They are read without TensorFlow. Preparing them needs it, once, on any machine:

    tfds build oxford_flowers102 --file_format=array_record --data_dir=DIRECTORY

For ImageNet the two archives of the challenge must lie in one folder ARCHIVES as they are
downloaded from https://image-net.org/download-images:

    pip install tensorflow tensorflow-datasets array_record
    tfds build imagenet2012 --file_format=array_record --manual_dir=ARCHIVES --data_dir=DIRECTORY

ARCHIVES holds `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`; 150 GB are written to
`DIRECTORY/imagenet2012/5.1.0`. The examples stay in the order in which TFDS shuffled them.
"""

import os
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from shiftnet.data.images import Encoded
from shiftnet.errors import UserError

IMAGENET = "imagenet2012"
# What the installed TFDS prepares; 3.0.0 was the last with other images.
MAJOR_VERSION = {IMAGENET: "5"}
# The names of a split in TFDS, the first of which that a data set has with labels is read: some
# have published test images without, which TFDS gives the label -1 (ImageNet's among them).
SPLITS = {"train": ("train",), "test": ("test", "validation")}


class TfdsSource:
    """The images of a split of a prepared data set, read when asked for.

    Pickled, it is its arguments; a worker process opens the files for itself.

    Args:
      directory: TFDS's, which holds for example `imagenet2012/5.1.0`.
      name: of the data set; of its versions the newest is read.
      split: `"train"` or `"test"`; ImageNet's test images are those that it calls validation.

    Attributes:
      class_names: the names in the prepared directory, indexed by label (of ImageNet WordNet ids
        such as n01440764).

    Raises:
      UserError: when there is no such directory, or it is damaged, has no such split, has no
        labelled images, or is in a form that needs TensorFlow.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str, split: str) -> None:
        self._arguments = (os.fspath(directory), name, split)
        self._folder = _newest(Path(directory).expanduser() / name, name)
        try:
            builder = tfds.builder_from_directory(self._folder)
            there = [one for one in SPLITS[split] if one in builder.info.splits]
            if not there:
                raise UserError(f"{self._folder} has no split {' or '.join(SPLITS[split])}")
            features = dict(builder.info.features.items())
            if not hasattr(features.get("label"), "names") or "image" not in features:
                raise UserError(
                    f"{self._folder} has {', '.join(features)}; expected an image and a label"
                )
            self.class_names = tuple(features["label"].names)
            for one in there:
                self._examples: Any = builder.as_data_source(
                    one, decoders={"image": tfds.decode.SkipDecoding()}
                )
                self._length = len(self._examples)
                if not self._length or self._examples[0]["label"] >= 0:
                    break
            else:
                raise UserError(f"{self._folder} has no labels in {' or '.join(there)}")
        except UserError:
            raise
        except NotImplementedError as error:
            raise UserError(
                f"{self._folder} is prepared as {builder.info.file_format.value}, which only "
                f"TensorFlow reads; expected array_record, as {_command(name)!r} prepares it"
            ) from error
        except Exception as error:  # TFDS, protobuf and array_record each have their own
            raise _damaged(self._folder, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Returns what an example is called: its number; to read its file name is to read it."""
        return str(index)

    def __getitem__(self, index: int) -> Encoded:
        """Reads an example.

        Raises:
          IndexError: when there is no such example.
          UserError: when it cannot be read, or has no label.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            example = self._examples[index]
            name = example["file_name"].decode() if "file_name" in example else f"image {index}"
            image, label = example["image"], int(example["label"])
        except Exception as error:
            raise _damaged(self._folder, error) from error
        if label < 0:
            raise UserError(f"{self._folder} has images without a label, such as {name}")
        return Encoded(image, label, name)


def _command(name: str) -> str:
    archives = "--manual_dir=ARCHIVES " if name == IMAGENET else ""
    return f"tfds build {name} --file_format=array_record {archives}--data_dir=DIRECTORY"


def _newest(folder: Path, name: str) -> Path:
    """Returns the directory of the newest version in `folder`."""
    versions = {}
    major = MAJOR_VERSION.get(name, "*")
    for path in folder.glob(f"{major}.*.*"):
        if tfds.core.Version.is_valid(path.name) and path.is_dir():
            versions[tfds.core.Version(path.name)] = path
    if not versions:
        raise UserError(f"{folder} holds no {major}.*.*; expected what {_command(name)!r} prepares")
    return versions[max(versions)]


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{folder} is not a complete TFDS data set ({type(error).__name__}: {reason}); prepare it "
        f"again"
    )
