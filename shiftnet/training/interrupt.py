"""Ctrl-C, or the notice before a machine is taken away: finish the step, save, stop."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, the first Ctrl-C or SIGTERM is only recorded; a second Ctrl-C interrupts.

    SIGTERM is what SLURM, Kubernetes and cloud machines send before they end a process, 30 seconds
    before by default. Further ones change nothing.

    Outside the main thread, where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if not self._signal:
            again = "once more stops at once, without saving"
            hint = f"; {again}" if signum == signal.SIGINT else ""
            sys.stderr.write(f"\nstopping after this step{hint}\n")
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        self._signal = signum

    def requested(self) -> int:
        """The signal that asks to stop, 0 for none.

        All processes of a job get the same answer at the same call, whichever got the signal.
        """
        if jax.process_count() == 1:
            return self._signal
        return int(multihost_utils.process_allgather(np.int32(self._signal)).max())
