"""The images that a report shows of an evaluation."""

import base64
import io

import numpy as np
from PIL import Image

from shiftnet.data import Split
from shiftnet.data.folder import FolderSource
from shiftnet.training import pictures
from shiftnet.training.evaluation import Evaluation


def evaluation(labels, predictions, confidences, indices) -> Evaluation:
    return Evaluation(
        loss=1.0,
        top1=0.5,
        top5=1.0,
        predictions=np.array(predictions, np.int32),
        labels=np.array(labels, np.int32),
        confidences=np.array(confidences, np.float32),
        indices=np.array(indices),
    )


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_most_confident_mistakes_come_first_with_their_own_pixels():
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), np.uint8)
    part = Split(images, np.array([0, 1, 0, 1, 0, 1], np.int32))
    # Image 0 could not be decoded, so that places and images differ by one.
    found = pictures.describe(
        evaluation([1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0.6, 0.9, 0.8, np.nan, 0.7], range(1, 6)),
        part,
        ["cat", "dog"],
    )
    assert [one["image"] for one in found["wrong"]] == ["3", "5", "1", "4"]
    first = found["wrong"][0]
    assert (first["class"], first["prediction"], first["confidence"]) == ("dog", "cat", 0.8)
    assert np.array_equal(np.asarray(opened(first["data"])), images[3])
    assert sorted(one["image"] for one in found["sample"]) == ["1", "2", "3", "4", "5"]


def test_files_that_vanished_since_are_left_out(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (200, 300), "red").save(tmp_path / name / "a.png")
    part = FolderSource(tmp_path)
    (tmp_path / "cat" / "a.png").unlink()
    found = pictures.describe(evaluation([0, 1], [1, 0], [0.9, 0.8], [0, 1]), part, ["cat", "dog"])
    (one,) = found["wrong"]
    assert one["image"] == str(tmp_path / "dog" / "a.png")
    assert opened(one["data"]).size == (96, 96)
