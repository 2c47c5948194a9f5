"""Our side of `benchmarks.integers`: a compiled C program, called on one image at a time."""

import ctypes

import numpy as np

from benchmarks.protocol import ProcessorTime, serve


class Measurement(ProcessorTime):
    """A program as a shared library.

    Args:
      library: its path.
      data: path of an .npz with uint8 `test` images.
      classes: length of the logits.
    """

    def __init__(self, library: str, data: str, classes: int):
        super().__init__()
        self.images = np.ascontiguousarray(np.load(data)["test"][:100])
        self.program = ctypes.CDLL(library).net_run
        self.logits = np.zeros(classes, np.int32)
        # Addresses as ctypes objects, made once.
        self.places = [ctypes.c_void_p(image.ctypes.data) for image in self.images]
        self.out = ctypes.c_void_p(self.logits.ctypes.data)

    def check(self, steps: int) -> list:
        """The classes of the first `steps` test images."""
        found = []
        for place in self.places[:steps]:
            self.program(place, self.out)
            found.append(int(self.logits.argmax()))
        return found

    def take(self, steps: int) -> None:
        program, out, places = self.program, self.out, self.places
        for i in range(steps):
            program(places[i % 100], out)


if __name__ == "__main__":
    serve(Measurement)
