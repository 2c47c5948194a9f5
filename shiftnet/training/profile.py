"""A trace of a few steps, for TensorBoard's profile page or XProf."""

from pathlib import Path

import jax

SKIPPED, TRACED = 3, 5  # calls of the device: the first ones compile


class Profile:
    """Traces some calls of the device; the trace is below `workdir/tensorboard/plugins/profile`.

    Args:
      workdir: the run's working directory.
      on: False does nothing.
    """

    def __init__(self, workdir: Path, *, on: bool):
        self._directory = workdir / "tensorboard"
        self._calls = 0 if on else SKIPPED + TRACED

    def step(self, results: jax.Array) -> None:
        """Records one call of the device, which gave `results`."""
        self._calls += 1
        if self._calls == SKIPPED:
            results.block_until_ready()
            jax.profiler.start_trace(self._directory)
        elif self._calls == SKIPPED + TRACED:
            results.block_until_ready()
            jax.profiler.stop_trace()

    def close(self) -> None:
        """Ends the trace of a run that is shorter."""
        if SKIPPED <= self._calls < SKIPPED + TRACED:
            self._calls = SKIPPED + TRACED
            jax.profiler.stop_trace()
