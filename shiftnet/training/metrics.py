"""What a run leaves behind: `metrics.jsonl`, `steps.jsonl`, `confusion.json`, `images.json`."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shiftnet.errors import RunFailed, UserError
from shiftnet.files import write_atomically
from shiftnet.training import pictures
from shiftnet.training.trackers import Tracker

FILE = "metrics.jsonl"
STEPS = "steps.jsonl"
CONFUSION = "confusion.json"


class MetricsLog:
    """One line per epoch, numbers by name; nested where they belong together.

    Args:
      workdir: the run's working directory.
      step: where the run continues from; lines after it, which a run that was cut off left behind,
        are dropped.
      trackers: show the numbers too; they are closed with this.
      on: False writes nothing: in a job of several processes only the first one writes.

    Attributes:
      damage: a message on the damaged end that was cut off, None where there was none.
    """

    def __init__(
        self, workdir: Path, *, step: int, trackers: Sequence[Tracker] = (), on: bool = True
    ):
        self._on = on
        self._trackers = trackers
        self.damage: str | None = None
        if not on:
            return
        self._path = workdir / FILE
        lines, damaged, _ = read_sound(workdir)
        if damaged:
            self.damage = f"cut off the damaged end of {self._path}, from line {damaged} on"
        kept = [line for line in lines if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Appends a line; `metrics` has `"step"` among its names.

        Raises:
          RunFailed: where it cannot be written, as on a full disk.
        """
        if not self._on:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(dict(metrics)) + "\n")
                file.flush()
                os.fsync(file.fileno())  # on disk before a checkpoint counts on it
        except OSError as error:
            raise RunFailed(f"cannot write {self._path}: {error.strerror}") from error
        for tracker in self._trackers:
            tracker.log(metrics, metrics["step"])

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
        content = {
            "step": step,
            "epoch": epoch,
            "class_names": list(class_names),
            "confusion": confusion,
        }
        self._replace(CONFUSION, content)

    def write_images(self, step: int, epoch: int, images: Mapping[str, Any]) -> None:
        """Replaces `images.json`, some images with what the last evaluation took them for.

        Args:
          step: of the evaluation.
          epoch: likewise.
          images: from `pictures.describe`.

        Raises:
          RunFailed: where it cannot be written.
        """
        self._replace(pictures.FILE, {"step": step, "epoch": epoch, **images})

    def _replace(self, name: str, content: Mapping[str, Any]) -> None:
        if not self._on:
            return
        try:
            write_atomically(self._path.with_name(name), json.dumps(content) + "\n")
        except UserError as error:
            raise RunFailed(str(error)) from error

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self._trackers:
            tracker.close()


def read(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, without a last one that is not complete.

    Raises:
      ValueError: where another line is damaged.
    """
    lines, damaged, is_last = read_sound(workdir)
    if damaged and not is_last:
        raise ValueError(f"line {damaged} is not an epoch's")
    return lines


def read_sound(workdir: Path, file: str = FILE) -> tuple[list[dict[str, Any]], int, bool]:
    """Returns the lines of a run's `metrics.jsonl`, or another such file, up to a damaged one.

    With them its number, counted from 1, or 0 where there is none; and whether that line is an
    incomplete last one, as a writer that was cut off leaves it behind.
    """
    path = workdir / file
    if not path.exists():
        return [], 0, False
    lines: list[dict[str, Any]] = []
    rows = path.read_text(errors="replace").split("\n")
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        is_last = number == len(rows)
        try:
            line = json.loads(row)
            if is_last or not isinstance(line["step"], int):
                return lines, number, is_last
        except (ValueError, TypeError, KeyError, RecursionError):
            return lines, number, is_last
        lines.append(line)
    return lines, 0, False


class StepsLog:
    """One line in `steps.jsonl` for every so-manieth step: its loss, accuracy and learning rate.

    Args:
      workdir: the run's working directory.
      every: steps between two lines.
      batch_size: images per step.
      lrs: the learning rate of every step.
      step: where the run continues from; lines after it are dropped.
      trackers: show the numbers too, as `steps/loss` and so on.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        every: int,
        batch_size: int,
        lrs: np.ndarray,
        step: int,
        trackers: Sequence[Tracker],
    ):
        self._path = workdir / STEPS
        self._every, self._batch_size, self._lrs = every, batch_size, lrs
        self._trackers = trackers
        lines = read_sound(workdir, STEPS)[0] if step else []
        kept = [line for line in lines if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, first: int, losses: np.ndarray, corrects: np.ndarray) -> None:
        """Takes the losses and the numbers of correctly classified images from step `first` on.

        Raises:
          RunFailed: where a line cannot be written.
        """
        for step, (loss, correct) in enumerate(zip(losses, corrects, strict=True), first):
            if step % self._every:
                continue
            numbers = {
                "loss": float(loss),
                "accuracy": int(correct) / self._batch_size,
                "lr": float(self._lrs[step - 1]),
            }
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps({"step": step, **numbers}) + "\n")
            except OSError as error:
                raise RunFailed(f"cannot write {self._path}: {error.strerror}") from error
            for tracker in self._trackers:
                tracker.log({"steps": numbers}, step)


class MetricAccumulator:
    """Loss and accuracy of one or more runs over an epoch, summed one call behind the device.

    Args:
      batch_size: images per step.
      sums: of each run, from `sums()` of the session this one continues, or None.
      steps: of each run, what takes the steps' own numbers; empty: nothing does.

    Attributes:
      bad: the first loss that was not finite, as its run, its step and itself; None without one.
    """

    def __init__(
        self,
        batch_size: int,
        sums: Sequence[Mapping[str, float] | None],
        steps: Sequence[StepsLog] = (),
    ):
        empty = {"loss": 0.0, "correct": 0, "steps": 0}
        self._batch_size = batch_size
        self._steps = steps
        self._sums = [dict(one or empty) for one in sums]
        self._pending: tuple[int, jax.Array, jax.Array] | None = None
        self.bad: tuple[int, int, float] | None = None

    def push(self, step: int, losses: jax.Array, corrects: jax.Array) -> None:
        """Takes the results of the steps up to `step`, and counts those pushed before.

        Args:
          step: steps taken so far.
          losses: `[steps]`, or `[runs, steps]`.
          corrects: likewise.
        """
        self.settle()
        self._pending = (step, losses, corrects)

    def settle(self) -> None:
        """Waits for what was pushed last and counts it."""
        if self._pending is None:
            return
        step, *results = self._pending
        self._pending = None
        losses, corrects = (a.reshape(len(self._sums), -1) for a in jax.device_get(results))
        first = step - losses.shape[1] + 1
        for run, sums in enumerate(self._sums):
            for number, loss in enumerate(losses[run].tolist(), first):
                if not math.isfinite(loss) and (self.bad is None or number < self.bad[1]):
                    self.bad = run, number, loss
                sums["loss"] += loss
            sums["correct"] += int(np.sum(corrects[run]))
            sums["steps"] += losses.shape[1]
        for run, log in enumerate(self._steps):
            log.write(first, losses[run], corrects[run])

    def sums(self) -> list[dict[str, float]]:
        """Returns what has been counted of each run, for another accumulator to continue."""
        return [dict(one) for one in self._sums]

    @property
    def losses(self) -> list[float]:
        """Each run's mean over the steps counted; NaN before the first."""
        return [one["loss"] / one["steps"] if one["steps"] else math.nan for one in self._sums]

    @property
    def accuracies(self) -> list[float]:
        """Each run's fraction of the images counted; NaN before the first."""
        images = [one["steps"] * self._batch_size for one in self._sums]
        pairs = zip(self._sums, images, strict=True)
        return [one["correct"] / count if count else math.nan for one, count in pairs]

    @property
    def loss(self) -> float:
        """The mean of `losses`."""
        return statistics.fmean(self.losses)

    @property
    def accuracy(self) -> float:
        """The mean of `accuracies`."""
        return statistics.fmean(self.accuracies)
