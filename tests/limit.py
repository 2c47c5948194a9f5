"""The time that a damaged file or command line may take."""

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn


class Hang(BaseException):
    """Raised where a case takes too long; not an Exception, so that nothing catches it before."""


def _hang(*_: object) -> NoReturn:
    raise Hang


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises Hang after so many seconds of CPU, or after 30 times as many in all.

    The machine may have other work; what only waits needs no CPU.
    """
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, seconds),
        signal.ITIMER_REAL: (signal.SIGALRM, 30 * seconds),
    }
    for timer, (number, most) in timers.items():
        signal.signal(number, _hang)
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
