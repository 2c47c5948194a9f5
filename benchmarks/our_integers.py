"""Our side of `benchmarks.integers`: a compiled C program, called on one image at a time."""

import ctypes
import time

import numpy as np

from benchmarks.protocol import serve


class Measurement:
    """A program as a shared library.

    Args:
      library: its path.
      data: path of an .npz with uint8 `test` images.
      classes: length of the logits.
    """

    def __init__(self, library: str, data: str, classes: int):
        self.images = np.ascontiguousarray(np.load(data)["test"][:100])
        self.program = ctypes.CDLL(library).net_run
        self.logits = np.zeros(classes, np.int32)
        # Addresses as ctypes objects, made once.
        self.places = [ctypes.c_void_p(image.ctypes.data) for image in self.images]
        self.out = ctypes.c_void_p(self.logits.ctypes.data)
        self.processor, self.steps = 0.0, 0

    def check(self, steps: int) -> list:
        """The classes of the first `steps` test images."""
        found = []
        for place in self.places[:steps]:
            self.program(place, self.out)
            found.append(int(self.logits.argmax()))
        return found

    def run(self, steps: int) -> float:
        program, out, places = self.program, self.out, self.places
        start, before = time.perf_counter(), time.process_time()
        for i in range(steps):
            program(places[i % 100], out)
        seconds = time.perf_counter() - start
        self.processor += time.process_time() - before
        self.steps += steps
        return seconds / steps

    def processor_seconds(self) -> float:
        """Processor time of a step, over all runs so far."""
        return self.processor / self.steps


if __name__ == "__main__":
    serve(Measurement)
