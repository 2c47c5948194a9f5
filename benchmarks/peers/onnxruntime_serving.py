"""The peer's side of the serving benchmark: ONNX Runtime, on a CPU."""

import platform
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.protocol import Measurement, serve

FORMS = {"default threads": 0, "1 thread": 1}


class Serving(Measurement):
    """Runs one session on the same images again and again, from NumPy to NumPy."""

    def __init__(self, *, program: str, size: int, form: str, **_: Any):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = FORMS[form]
        self._session = onnxruntime.InferenceSession(
            program, options, providers=["CPUExecutionProvider"]
        )
        side = self._session.get_inputs()[0].shape[1]
        rng = np.random.default_rng(size)  # the images of `benchmarks.our_serving`
        self._images = rng.integers(0, 256, (size, side, side, 3), np.uint8)

    def _logits(self) -> np.ndarray:
        return self._session.run(None, {"images": self._images})[0]

    def check(self, steps: int) -> list[float]:
        """The probabilities of the images in a row."""
        del steps
        logits = self._logits().astype(np.float64)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return (powers / powers.sum(-1, keepdims=True)).ravel().tolist()

    def run(self, steps: int) -> float:
        """Runs the session `steps` times, one call after the other; returns the seconds of each."""
        start = time.perf_counter()
        for _ in range(steps):
            self._logits()
        return (time.perf_counter() - start) / steps


def describe() -> dict[str, Any]:
    """Versions and forms, for the report."""
    packages = ("onnxruntime", "numpy")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "forms": list(FORMS),
    }


def export(*, network: str, path: str) -> None:
    """Writes our network as ONNX; needs jax2onnx, and this project's own packages."""
    from shiftnet.cli.export import main

    if main([network, path]):
        raise RuntimeError(f"shiftnet export {network} {path} failed")


if __name__ == "__main__":
    serve(Serving, describe=describe, export=export)
