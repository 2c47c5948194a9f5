"""The time that a training session may take."""

import time


class Deadline:
    """The time by which to have stopped and saved.

    Room is kept for twice the longest step of work so far (one more may be under way) and for the
    longest save; compiling counts in neither, and cannot be stopped.

    Args:
      seconds: from now; None: never.

    Attributes:
      is_set: whether there is such a time.
    """

    def __init__(self, seconds: float | None):
        self.is_set = seconds is not None
        self._end = None if seconds is None else time.monotonic() + seconds
        self._work = self._compilation = 0.0
        self._save = 10.0  # until one was timed

    def worked(self, seconds: float) -> None:
        """Records how long a step of work took."""
        self._work = max(self._work, seconds)

    def saved(self, seconds: float) -> None:
        """Records how long a save took."""
        self._save = max(1.0, 2 * seconds)

    def compiled(self, seconds: float) -> None:
        """Records how long a recipe took to compile."""
        self._compilation = max(self._compilation, seconds)

    @property
    def left_for_another(self) -> float:
        """Seconds left for a recipe that is not compiled yet, judged by those that were."""
        return self.left - self._compilation

    @property
    def left(self) -> float:
        """Seconds left for work; infinite without an end."""
        if self._end is None:
            return float("inf")
        return self._end - time.monotonic() - 2 * self._work - self._save
