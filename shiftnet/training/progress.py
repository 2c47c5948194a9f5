"""Prints how far a run is: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO


class Progress:
    """Reports steps as they finish.

    Args:
      total_steps: steps of the whole run.
      steps_per_epoch: full batches in the training set.
      epochs: epochs of the whole run.
      batch_size: images per step.
      every_seconds: seconds between two plain lines; the live line is renewed ten times a second.
      on: False prints nothing: in a job of several processes only the first one does.
      stream: where to write; None for standard output.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        steps_per_epoch: int,
        epochs: int,
        batch_size: int,
        every_seconds: float,
        on: bool = True,
        stream: TextIO | None = None,
    ):
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._batch_size = batch_size
        self._on = on
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._every = 0.1 if self._live else every_seconds
        self._last_shown = time.monotonic()
        self._mark: tuple[float, int] | None = None  # time and step that the rate counts from
        self._width = 0

    def pause(self) -> None:
        """Leaves the time until the next step out of the rate: compiling, evaluating, saving."""
        self._mark = None

    def step(self, step: int, loss: float, accuracy: float) -> None:
        """Records that `step` steps are done; `loss` and `accuracy` are the epoch's so far."""
        now = time.monotonic()
        if not self._on:
            return
        if self._mark is None:
            self._mark = (now, step)
            return
        if now - self._last_shown < self._every:
            return
        self._last_shown = now
        began, first = self._mark
        rate = (step - first) / (now - began) if now > began else 0.0
        epoch = min((step - 1) // self._steps_per_epoch + 1, self._epochs)
        left = f"{_duration((self._total_steps - step) / rate)} left" if rate else ""
        self._show(
            f"epoch {epoch}/{self._epochs}  step {step}/{self._total_steps}  "
            f"loss {loss:.4f}  accuracy {accuracy:.2%}  {rate * self._batch_size:.0f} images/s  "
            f"{left}"
        )

    def message(self, text: str) -> None:
        """Writes a line that stays."""
        if not self._on:
            return
        if self._live:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(text + "\n")
        self._stream.flush()

    def _show(self, text: str) -> None:
        if self._live:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
            self._stream.flush()
        else:
            self.message(text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
