"""torchvision's CIFAR folders: pickles, written here as Python 2 and NumPy 1 wrote them."""

import pickle

import numpy as np
import pytest

from shiftnet import data
from shiftnet.data import cifar
from shiftnet.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 3072), np.uint8)
LABELS = [3, 0, 9, 9, 1, 2]


def write(path, **entries):
    content = pickle.dumps(entries, protocol=2)
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    write(folder / "batches.meta", label_names=list(cifar.CLASS_NAMES["cifar10"]))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        write(folder / name, data=PIXELS, labels=LABELS, batch_label=name)
    return tmp_path


def test_the_folder_that_torchvision_unpacks_is_read(root):
    dataset = data.load("cifar10", data_dir=str(root))
    assert dataset.images == {"train": 30, "validation": 0, "test": 6}
    assert dataset.test.labels.tolist() == LABELS
    # Red, green and blue planes one after the other, each by rows.
    assert dataset.test.images[4, 2, 5].tolist() == PIXELS[4].reshape(3, 32, 32)[:, 2, 5].tolist()
    np.testing.assert_array_equal(dataset.train.images[24:], dataset.test.images)


class Runs:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"data": Runs(), "labels": LABELS}, "it asks for __builtin__.print"),
        ({"data": PIXELS.astype(np.float64), "labels": LABELS}, "numbers of the kind 'f8'"),
        ({"data": PIXELS, "labels": [1, 2, 3, 4, 5, 10]}, "a label is out of range"),
        ({"data": PIXELS[:5], "labels": LABELS}, "cannot reshape"),
        ({"labels": LABELS}, "KeyError"),
    ],
)
def test_a_damaged_or_hostile_file_is_one_sentence_and_runs_nothing(root, entries, reason, capfd):
    write(root / "cifar-10-batches-py" / "test_batch", **entries)
    with pytest.raises(UserError, match=reason) as caught:
        cifar.load("cifar10", str(root))
    assert "\n" not in str(caught.value)
    assert "printed" not in capfd.readouterr().out


def test_other_classes_are_refused(root):
    write(root / "cifar-10-batches-py" / "batches.meta", label_names=["a"] * 10)
    with pytest.raises(UserError, match="does not list the classes of cifar10"):
        cifar.load("cifar10", str(root))
