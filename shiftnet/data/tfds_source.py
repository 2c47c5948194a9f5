"""ImageNet from a TensorFlow Datasets directory, read without TensorFlow.

Preparing it needs TensorFlow, once, on any machine, and the two archives of the challenge as they
are downloaded from https://image-net.org/download-images, in one folder ARCHIVES:

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

NAME = "imagenet2012"
MAJOR_VERSION = 5  # what the installed TFDS prepares; 3.0.0 was the last with other images
SPLITS = {"train": "train", "val": "validation"}  # ours -> TFDS's
COMMAND = f"tfds build {NAME} --file_format=array_record --manual_dir=ARCHIVES --data_dir=DIRECTORY"


class TfdsSource:
    """The images of a split of a prepared `imagenet2012`, read when asked for.

    Pickled, it is its two arguments; a worker process opens the files for itself.

    Args:
      directory: TFDS's, which holds `imagenet2012/5.*.*`; the newest of these is read.
      split: `"train"` or `"val"`.

    Attributes:
      class_names: the names in the prepared directory, indexed by label (WordNet ids such as
        n01440764).

    Raises:
      UserError: when there is no such directory, or it is damaged, has no such split, or is in a
        form that needs TensorFlow.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str) -> None:
        self._arguments = (os.fspath(directory), split)
        self._folder = _newest(Path(directory).expanduser() / NAME)
        try:
            builder = tfds.builder_from_directory(self._folder)
            if SPLITS[split] not in builder.info.splits:
                raise UserError(f"{self._folder} has no split {SPLITS[split]}")
            self.class_names = tuple(builder.info.features["label"].names)
            self._examples: Any = builder.as_data_source(
                SPLITS[split], decoders={"image": tfds.decode.SkipDecoding()}
            )
            self._length = len(self._examples)
        except UserError:
            raise
        except NotImplementedError as error:
            raise UserError(
                f"{self._folder} is prepared as {builder.info.file_format.value}, which only "
                f"TensorFlow reads; expected array_record, as {COMMAND!r} prepares it"
            ) from error
        except Exception as error:  # TFDS, protobuf and array_record each have their own
            raise _damaged(self._folder, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Encoded:
        """Reads an example.

        Raises:
          IndexError: when there is no such example.
          UserError: when it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            example = self._examples[index]
            name = example["file_name"].decode()
            return Encoded(example["image"], int(example["label"]), name)
        except Exception as error:
            raise _damaged(self._folder, error) from error


def _newest(folder: Path) -> Path:
    """Returns the directory of the newest version in `folder`."""
    versions = {}
    for path in folder.glob(f"{MAJOR_VERSION}.*.*"):
        if tfds.core.Version.is_valid(path.name) and path.is_dir():
            versions[tfds.core.Version(path.name)] = path
    if not versions:
        raise UserError(
            f"{folder} holds no {MAJOR_VERSION}.*.*; expected what {COMMAND!r} prepares"
        )
    return versions[max(versions)]


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{folder} is not a complete TFDS data set ({type(error).__name__}: {reason}); prepare it "
        f"again"
    )
