"""Our side of the input benchmark: `TrainStream` over `FolderSource`."""

import platform
import time
from importlib.metadata import version
from typing import Any

from benchmarks.protocol import Measurement, serve
from shiftnet.data.folder import FolderSource
from shiftnet.data.stream import TrainStream

SIDE = 224


class Loading(Measurement):
    """Our side: loads batches without doing anything with them."""

    def __init__(self, *, folder: str, batch_size: int, workers: int):
        self._source = FolderSource(f"{folder}/train")
        self._batch_size = batch_size
        self._workers = workers

    def check(self, steps: int) -> list[float]:
        """The number of images and of classes."""
        del steps
        return [len(self._source), len(self._source.class_names)]

    def run(self, steps: int) -> float:
        """Starts the workers, and returns the seconds a batch once each has made two."""
        before = 2 * self._workers
        stream = TrainStream(
            self._source,
            size=SIDE,
            batch_size=self._batch_size,
            steps_per_epoch=len(self._source) // self._batch_size,
            total_steps=before + steps,
            seed=0,
            flip=True,
            on_corrupt="error",
            workers=self._workers,
        )
        start = end = 0.0
        for number, batch in enumerate(stream, 1):
            assert batch.images.shape[1:] == (SIDE, SIDE, 3)
            end = time.perf_counter()
            if number == before:
                start = end
        return (end - start) / steps


def describe() -> dict[str, Any]:
    """Versions, for the report."""
    packages = ("grain", "simplejpeg", "cykooz-resizer", "numpy")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        }
    }


if __name__ == "__main__":
    serve(Loading, describe=describe)
