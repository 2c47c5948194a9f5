"""Ctrl-C, or the notice before a machine is taken away: finish the step, save, stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from shiftnet.errors import end_at_once

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
        self._ends_at_once = False

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if self._ends_at_once and signum == signal.SIGINT:
            return  # the thread that watches has been told too
        if not self._signal:
            again = "once more stops at once, without saving"
            hint = f"; {again}" if signum == signal.SIGINT else ""
            sys.stderr.write(f"\nstopping after this step{hint}\n")
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        self._signal = signum

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """While entered, Ctrl-C ends the process with one line: while there is nothing to save.

        Even where Python runs no handler, as while XLA compiles for minutes.
        """
        if not self._previous:
            yield
            return
        receive, send = os.pipe()
        os.set_blocking(send, False)

        def watch() -> None:
            while (number := os.read(receive, 1)[0]) != 0:
                if number == signal.SIGINT:
                    end_at_once(number)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        before = signal.set_wakeup_fd(send)
        self._ends_at_once = True
        try:
            yield
        finally:
            self._ends_at_once = False
            signal.set_wakeup_fd(before)
            os.write(send, b"\0")
            watching.join()
            os.close(receive)
            os.close(send)

    def requested(self) -> int:
        """The signal that asks to stop, 0 for none.

        All processes of a job get the same answer at the same call, whichever got the signal.
        """
        if jax.process_count() == 1:
            return self._signal
        return int(multihost_utils.process_allgather(np.int32(self._signal)).max())
