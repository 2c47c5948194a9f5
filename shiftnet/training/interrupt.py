"""Ctrl-C: finish the step, save, stop."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupt:
    """While entered, the first Ctrl-C is only noted; the second interrupts as usual.

    Outside the main thread, where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._previous)
        self._requested = True
        sys.stderr.write("\nstopping after this step; once more stops at once, without saving\n")

    def requested(self) -> bool:
        """Whether to stop. All processes of a job get the same answer at the same call."""
        if jax.process_count() == 1:
            return self._requested
        return bool(multihost_utils.process_allgather(np.array(self._requested)).any())
