"""Our side of the input benchmark: `TrainStream` over `FolderSource`."""

import platform
import resource
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


def processor(*, folder: str, batch_size: int, workers: int, batches: int) -> dict[str, float]:
    """Counts the processor time of all processes, of short and of long streams over the same files.

    Args:
      folder, batch_size, workers: as of `Loading`.
      batches: of the short one; the long one has four times as many.

    Returns:
      `seconds_an_image`: what an image costs; `start_seconds`: what starting and ending the workers
      costs besides; `first_batch_after`: wall-clock seconds until the first batch, with the
      first one made.
    """
    source = FolderSource(f"{folder}/train")
    used, first = [], []
    for count in (batches, 4 * batches):
        start, before = time.perf_counter(), _processor_seconds()
        stream = TrainStream(
            source,
            size=SIDE,
            batch_size=batch_size,
            steps_per_epoch=len(source) // batch_size,
            total_steps=count,
            seed=0,
            flip=True,
            on_corrupt="error",
            workers=workers,
        )
        next(stream)
        first.append(time.perf_counter() - start)
        for _ in stream:
            pass
        stream.close()
        used.append(_processor_seconds() - before)
    image = (used[1] - used[0]) / (3 * batches * batch_size)
    return {
        "seconds_an_image": image,
        "start_seconds": used[0] - image * batches * batch_size,
        "first_batch_after": min(first),
    }


def _processor_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    own, ended = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, ended))


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
    serve(Loading, describe=describe, processor=processor)
