"""The images that a report shows of an evaluation, which a run leaves in `images.json`."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from shiftnet.data import Source, Split
from shiftnet.data.images import CorruptImage, for_evaluation
from shiftnet.training.evaluation import Evaluation

FILE = "images.json"
SHOWN = 18  # images of each kind
SIDE = 96  # pixels of those that are read from files; their middle is shown
LOSSLESS = 64  # pixels; images that are larger are stored as JPEG


def describe(
    evaluation: Evaluation, part: Split | Source, class_names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Returns the images that a network mistakes most confidently, and a sample of all.

    The sample is of the same images in every evaluation on the same ones.

    Args:
      evaluation: of the images.
      part: the images, of which only those that are returned are read.
      class_names: by label.

    Returns:
      `wrong` and `sample`: lists of `image` (its number or its file), `class`, `prediction`,
      `confidence` (a fraction) and `data` (a PNG or JPEG as a data URL).
    """
    confidences = np.nan_to_num(evaluation.confidences)
    wrong = np.flatnonzero(evaluation.predictions != evaluation.labels)
    worst = wrong[np.argsort(-confidences[wrong], kind="stable")]
    shuffled = np.random.default_rng(0).permutation(len(evaluation.labels))

    def described(places: Iterable[int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for place in places:
            if len(found) == SHOWN:
                break
            index = int(evaluation.indices[place])
            try:
                pixels = _pixels(part, index)
            except CorruptImage:  # since it was evaluated
                continue
            found.append(
                {
                    "image": str(index) if isinstance(part, Split) else part.name(index),
                    "class": class_names[evaluation.labels[place]],
                    "prediction": class_names[evaluation.predictions[place]],
                    "confidence": round(float(confidences[place]), 4),
                    "data": _data_url(pixels),
                }
            )
        return found

    return {"wrong": described(worst), "sample": described(shuffled)}


def _pixels(part: Split | Source, index: int) -> np.ndarray:
    if isinstance(part, Split):
        return part.images[index]
    encoded = part[index]
    resize = round(SIDE * 8 / 7)
    return for_evaluation(
        encoded.data, size=SIDE, resize=resize, name=encoded.name, exif=encoded.exif
    )


def _data_url(pixels: np.ndarray) -> str:
    kind = "png" if max(pixels.shape) <= LOSSLESS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
