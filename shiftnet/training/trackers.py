"""Where a run's numbers can be watched: TensorBoard, Weights & Biases, trackio."""

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shiftnet.config import Config
from shiftnet.errors import UserError


class Tracker(Protocol):
    """Shows a run's numbers."""

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Adds numbers by name, nested where they belong together, after so many steps."""
        ...

    def close(self) -> None: ...


def make_trackers(
    config: Config, workdir: Path, *, step: int, environment: Mapping[str, Any]
) -> list[Tracker]:
    """Makes the trackers that a recipe names.

    Args:
      config: the recipe, which hosted ones show beside the run.
      workdir: the run's; it names the run.
      step: where the run continues from.
      environment: from `environment.describe`, shown likewise.

    Raises:
      UserError: where a package is missing.
    """
    trackers: list[Tracker] = [TensorBoard(workdir, step)] if config.log.tensorboard else []
    if config.log.tracker != "none":
        trackers.append(Hosted(config, workdir, environment))
    return trackers


class TensorBoard:
    """Writes TensorBoard events to `workdir/tensorboard`; the shares of levels become histograms.

    Args:
      workdir: the run's.
      step: where the run continues from; what was written of later steps is hidden.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        for name, value in flat(numbers):
            if isinstance(value, Mapping):
                self._writer.add_histogram_raw(name, **_histogram(value), global_step=step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Hosted:
    """Weights & Biases or trackio, which have the same calls.

    A run is known there by its working directory, and continued when it is continued here.

    Raises:
      UserError: where the package is missing or cannot be used.
    """

    def __init__(self, config: Config, workdir: Path, environment: Mapping[str, Any]):
        name = config.log.tracker
        try:
            self._module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"log.tracker={name} needs the package {name}: pip install {name}"
            ) from error
        digest = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]
        own = {"id": digest, "dir": str(workdir)} if name == "wandb" else {}
        self._name, self._works = name, True
        try:
            self._module.init(
                project=config.log.project,
                name=f"{workdir.name}-{digest}",
                config={**config.to_dict(), "environment": dict(environment)},
                resume="allow",
                **own,
            )
        except Exception as error:  # each has its own, and those of its HTTP library
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"log.tracker={name} cannot be used: {reason}") from error

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        scalars = {n: value for n, value in flat(numbers) if not isinstance(value, Mapping)}
        self._told(lambda: self._module.log(scalars, step=step))

    def close(self) -> None:
        self._told(self._module.finish)

    def _told(self, call: Callable[[], Any]) -> None:
        """Calls the tracker; after an error it is left alone, and the run goes on."""
        if not self._works:
            return
        try:
            call()
        except Exception as error:
            self._works = False
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{self._name} is told nothing from here on: {reason}", file=sys.stderr)


def flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested numbers by names with `/` between their parts, so that charts are grouped.

    `train_loss` becomes `train/loss`. Shares of levels, named `levels`, stay together.
    """
    for key, value in numbers.items():
        name = f"{prefix}{key}"
        if not prefix:
            name = re.sub(r"^((?:raw_)?(?:train|validation|test))_", r"\1/", name)
        if isinstance(value, Mapping) and key != "levels":
            yield from flat(value, f"{name}/")
        elif name != "step":
            yield name, value


def _histogram(shares: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of `add_histogram_raw` for the shares of whole levels; one bucket a level."""
    levels, counts = np.array(list(map(int, shares))), np.array(list(shares.values()))
    return {
        "min": levels.min(),
        "max": levels.max(),
        "num": counts.sum(),
        "sum": (levels * counts).sum(),
        "sum_squares": (levels**2 * counts).sum(),
        "bucket_limits": (levels + 0.5).tolist(),
        "bucket_counts": counts.tolist(),
    }
