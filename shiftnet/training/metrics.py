"""The numbers a run leaves behind: `metrics.jsonl`, TensorBoard events and `confusion.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shiftnet.errors import RunFailed

FILE = "metrics.jsonl"
CONFUSION = "confusion.json"


class MetricsLog:
    """One line an epoch, numbers by name; nested where they belong together.

    Args:
      workdir: the run's working directory.
      step: where the run continues from; lines after it, which a run that was cut off left behind,
        are dropped.
      tensorboard: write TensorBoard events to `workdir/tensorboard` too.
      on: False writes nothing: in a job of several processes only the first one writes.
    """

    def __init__(self, workdir: Path, *, step: int, tensorboard: bool, on: bool = True):
        self._on = on
        self._writer = None
        if not on:
            return
        self._path = workdir / FILE
        kept = [line for line in read(workdir) if line["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Appends a line; `metrics` has `"step"` among its names.

        In TensorBoard, names inside names are joined by `/`, and the shares of levels that
        `low_bit` gives become a histogram.

        Raises:
          RunFailed: where it cannot be written, as on a full disk.
        """
        if not self._on:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(dict(metrics)) + "\n")
        except OSError as error:
            raise RunFailed(f"cannot write {self._path}: {error.strerror}") from error
        if self._writer:
            self._draw("", metrics, metrics["step"])
            self._writer.flush()

    def write_confusion(
        self, step: int, epoch: int, class_names: Sequence[str], confusion: Sequence[Sequence[int]]
    ) -> None:
        """Replaces `confusion.json`, what the last evaluation took each class for.

        Args:
          step: of the evaluation.
          epoch: likewise.
          class_names: by label.
          confusion: from `Evaluation.confusion`.

        Raises:
          RunFailed: where it cannot be written.
        """
        if not self._on:
            return
        path = self._path.with_name(CONFUSION)
        temporary = path.with_suffix(".tmp")
        content = {
            "step": step,
            "epoch": epoch,
            "class_names": list(class_names),
            "confusion": confusion,
        }
        try:
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(path)
        except OSError as error:
            raise RunFailed(f"cannot write {path}: {error.strerror}") from error

    def _draw(self, prefix: str, metrics: Mapping[str, Any], step: int) -> None:
        assert self._writer is not None
        for key, value in metrics.items():
            name = f"{prefix}{key}"
            if key == "levels":
                self._writer.add_histogram_raw(name, **_histogram(value), global_step=step)
            elif isinstance(value, Mapping):
                self._draw(f"{name}/", value, step)
            elif name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._writer:
            self._writer.close()


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


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut off is left out."""
    path = workdir / FILE
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


class Tally:
    """Loss and accuracy over an epoch, summed on the host one call behind the device.

    Args:
      batch_size: images a step.
      sums: from `sums()` of the run this one continues.

    Attributes:
      bad_step: the first step whose loss was not finite, None where there was none.
      bad_loss: that loss.
    """

    def __init__(self, batch_size: int, sums: Mapping[str, float] | None = None):
        self._batch_size = batch_size
        self._sums = dict(sums) if sums else {"loss": 0.0, "correct": 0, "steps": 0}
        self._pending: tuple[int, jax.Array, jax.Array] | None = None
        self.bad_step: int | None = None
        self.bad_loss = math.nan

    def push(self, step: int, losses: jax.Array, corrects: jax.Array) -> None:
        """Takes the results of the steps up to `step`, and counts those pushed before."""
        self.settle()
        self._pending = (step, losses, corrects)

    def settle(self) -> None:
        """Waits for what was pushed last and counts it."""
        if self._pending is None:
            return
        step, losses, corrects = self._pending
        self._pending = None
        losses, corrects = jax.device_get((losses, corrects))
        first = step - len(losses) + 1
        for number, loss in enumerate(losses.tolist(), first):
            if not math.isfinite(loss) and self.bad_step is None:
                self.bad_step, self.bad_loss = number, loss
            self._sums["loss"] += loss
        self._sums["correct"] += int(np.sum(corrects))
        self._sums["steps"] += len(losses)

    def sums(self) -> dict[str, float]:
        """What has been counted, to be continued by another tally."""
        return dict(self._sums)

    @property
    def loss(self) -> float:
        """Mean over the steps counted; NaN before the first."""
        return self._sums["loss"] / self._sums["steps"] if self._sums["steps"] else math.nan

    @property
    def accuracy(self) -> float:
        """Fraction of the images counted; NaN before the first."""
        images = self._sums["steps"] * self._batch_size
        return self._sums["correct"] / images if images else math.nan
