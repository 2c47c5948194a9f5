"""The peer of the input benchmark: PyTorch's `DataLoader` over torchvision's `ImageFolder`.

A form is a name of `FORMS` and a number of workers. What all have in common is Pillow's decoding,
RandomResizedCrop(224), RandomHorizontalFlip, batches in shared memory. They differ in what a batch
holds, and in which generation of torchvision's transforms makes it.

Only torchvision's Python code is used. Where its compiled operators do not load, as with a
CUDA build beside a CPU build of PyTorch, their names are declared without code, which is all that
importing it needs.
"""

import importlib.util
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.protocol import Measurement, serve


def _import_torchvision() -> None:
    try:
        import torchvision
    except RuntimeError:
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parents[1] / "torchvision"
        source = (folder / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        for pattern in (r'register_meta\("(\w+)"', r'register_fake\("torchvision::(\w+)"'):
            for name in sorted(set(re.findall(pattern, source))):
                library.define(f"{name}(Tensor x) -> Tensor")
        globals()["_library"] = library  # the names last as long as this object
        import torchvision  # noqa: F401


_import_torchvision()

import torchvision  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
v1 = torchvision.transforms

# What the batch holds: "float32" is normalised, as PyTorch's ImageNet example has it; "uint8" is
# what our side makes, and leaves the rest to the device.
FORMS: dict[str, list[Any]] = {
    "float32/v1": [
        v1.RandomResizedCrop(SIDE),
        v1.RandomHorizontalFlip(),
        v1.ToTensor(),
        v1.Normalize(MEAN, STD),
    ],
    "float32/v2": [
        v2.RandomResizedCrop(SIDE),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ],
    "uint8/v1": [
        v1.RandomResizedCrop(SIDE),
        v1.RandomHorizontalFlip(),
        v1.PILToTensor(),
    ],
    "uint8/v2": [v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()],
}


class Loading(Measurement):
    """Loads batches without doing anything with them."""

    def __init__(self, *, folder: str, batch_size: int, form: str, workers: int):
        self._dataset = ImageFolder(f"{folder}/train", v1.Compose(FORMS[form]))
        self._batch_size = batch_size
        self._workers = workers

    def check(self, steps: int) -> list[float]:
        """The number of images and of classes."""
        del steps
        return [len(self._dataset), len(self._dataset.classes)]

    def run(self, steps: int) -> float:
        """Starts the workers, and returns the seconds a batch once each has made two."""
        before = 2 * self._workers
        count = (before + steps) * self._batch_size
        repeats = -(-count // len(self._dataset))
        order = torch.cat([torch.randperm(len(self._dataset)) for _ in range(repeats)])[:count]
        loader = DataLoader(
            self._dataset,
            self._batch_size,
            sampler=order.tolist(),
            num_workers=self._workers,
        )
        start = end = 0.0
        for number, (images, _) in enumerate(loader, 1):
            assert images.shape[2:] == (SIDE, SIDE)
            end = time.perf_counter()
            if number == before:
                start = end
        return (end - start) / steps


def describe() -> dict[str, Any]:
    """Versions and forms, for the report."""
    import PIL

    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "forms": list(FORMS),
    }


if __name__ == "__main__":
    serve(Loading, describe=describe)
