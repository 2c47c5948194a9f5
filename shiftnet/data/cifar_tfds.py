"""Writes and reads the TFDS directory of a CIFAR, with the steps that need TensorFlow replaced.

TFDS's own builders unpack the archive, read it and encode its images through TensorFlow. The
builders here inherit their features, so the directory is the same, and take records that were
read elsewhere; images go in as Pillow images, which TFDS encodes with Pillow.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar as stock

from shiftnet.data.cifar_archive import ARCHIVES, SIDE, VERSION, Splits, check_class_names
from shiftnet.errors import UserError


class Cifar10(stock.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """`tfds.builder("cifar10")` without TensorFlow.

    Attributes:
      records: of each split, uint8 [N, labels + 3072].
      label_names: the class names of each label byte, in the order of the bytes.
    """

    name = "cifar10"
    VERSION = tfds.core.Version(VERSION)
    records: dict[str, np.ndarray]
    label_names: dict[str, list[str]]

    def _split_generators(self, dl_manager: object) -> dict[str, Any]:
        del dl_manager  # the archive is here already
        for label, names in self.label_names.items():
            self.info.features[label].names = names
        return {split: self._generate_examples(split, r) for split, r in self.records.items()}

    def _generate_examples(
        self, split: str, records: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        labels = len(self.label_names)
        for index, record in enumerate(records):
            pixels = record[labels:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
            yield (
                index,
                {
                    "id": f"{split}_{index:05d}",
                    "image": Image.fromarray(np.ascontiguousarray(pixels)),
                    **dict(zip(self.label_names, record[:labels].tolist(), strict=True)),
                },
            )


class Cifar100(Cifar10, stock.Cifar100, skip_registration=True):  # type: ignore[call-arg]
    """`tfds.builder("cifar100")` without TensorFlow; the features are those of `stock.Cifar100`."""

    name = "cifar100"


def write(
    name: str, root: Path, records: dict[str, np.ndarray], label_names: dict[str, list[str]]
) -> None:
    """Writes `root/name/3.0.2` as array_record files, all of it or nothing.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      root: the TFDS directory.
      records: of each split, uint8 [N, labels + 3072].
      label_names: the class names of each label byte, in the order of the bytes.

    Raises:
      OSError: when the directory cannot be written.
    """
    builder = {"cifar10": Cifar10, "cifar100": Cifar100}[name](data_dir=root)
    builder.records, builder.label_names = records, label_names
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints two lines of its own
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format="array_record",
        )


def read(name: str, folder: Path) -> Splits:
    """Reads and decodes the prepared files.

    TFDS shuffles the examples; here they come back into the order of the archive.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      folder: for example `DATA_DIR/cifar100/3.0.2`.

    Returns:
      `{"train": (images, labels), "test": (images, labels)}`, uint8 [N, 32, 32, 3] and int32 [N].

    Raises:
      UserError: when the directory is damaged, or was prepared in a form that needs TensorFlow.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        check_class_names(name, folder, builder.info.features["label"].names)
        sources = builder.as_data_source(
            {split: split for split in ARCHIVES[name].files},
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        return {split: _decode_split(source) for split, source in sources.items()}
    except UserError:
        raise
    except NotImplementedError as error:
        raise UserError(
            f"{folder} is prepared as {builder.info.file_format.value}, which only TensorFlow "
            f"reads; set data.dir to another directory, to have it prepared there as array_record"
        ) from error
    except Exception as error:  # TFDS, protobuf, array_record and Pillow each have their own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder} is not a complete TFDS data set ({type(error).__name__}: {reason}); remove "
            f"it to have it prepared again"
        ) from error


def _decode_split(examples: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(examples), SIDE, SIDE, 3), np.uint8)
    labels = np.full(len(examples), -1, np.int32)
    for example in examples:
        index = int(example["id"].rpartition(b"_")[2])  # b"train_00042"
        with Image.open(io.BytesIO(example["image"])) as image:
            images[index] = np.asarray(image)
        labels[index] = example["label"]
    if labels.min() < 0:
        raise ValueError("an example is there twice, and another is not")
    return images, labels
