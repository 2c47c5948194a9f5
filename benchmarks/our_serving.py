"""Our side of the serving benchmark: `predict` of what `shiftnet.load` returns."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

import shiftnet
from benchmarks.ours import describe
from benchmarks.protocol import Measurement, serve


class Serving(Measurement):
    """Our side: classifies the same images again and again, from NumPy to NumPy."""

    def __init__(self, *, network: str, size: int, **_: Any):
        self._model = shiftnet.load(network)
        self._images = images(size, self._model.preprocess.size)

    def check(self, steps: int) -> list[float]:
        """The probabilities of the images in a row."""
        del steps
        return self._model.predict(self._images).probabilities.ravel().tolist()

    def run(self, steps: int) -> float:
        """Classifies the images `steps` times, one call after the other; seconds of each."""
        start = time.perf_counter()
        for _ in range(steps):
            self._model.predict(self._images)
        return (time.perf_counter() - start) / steps


def images(count: int, side: int) -> np.ndarray:
    """Random ones, uint8 [count, side, side, 3]."""
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)


def memory(*, network: str, requests: int, largest: int) -> list[int]:
    """The resident bytes of this process before and after mixed requests.

    Args:
      network: its name or path.
      requests: how many, after a tenth as many that do not count; they have 1 to `largest` images.
      largest: see there.
    """
    model = shiftnet.load(network)
    given = images(largest, model.preprocess.size)
    sizes = np.random.default_rng(0).integers(1, largest + 1, requests + requests // 10)
    found = []
    for number, size in enumerate(sizes):
        if number == requests // 10:
            found.append(_resident())
        model.predict(given[:size])
    return [*found, _resident()]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    serve(Serving, describe=describe, memory=memory)
