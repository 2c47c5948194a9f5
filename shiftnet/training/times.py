"""Where a run's time goes."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import jax

# What JAX reports each time it traces, lowers or compiles a program (jax.monitoring).
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Times:
    """Seconds spent on other things than steps, while entered.

    `"compilation"` is counted wherever it happens, and not twice: a first evaluation counts as
    evaluation without what its program took to compile. `"input"` is what the loop waited for the
    next batch; a device that still had work meanwhile lost less.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._began = time.monotonic()
        self._thread = threading.get_ident()

    def __enter__(self) -> "Times":
        jax.monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record)

    def _record(self, event: str, duration_secs: float, **_: str | int) -> None:
        # What another thread compiles meanwhile is part of what this one traces or waits for.
        if event in _COMPILING and threading.get_ident() == self._thread:
            self._seconds["compilation"] += duration_secs

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time within as spent on `what`."""
        began = self.clock()
        try:
            yield
        finally:
            self._seconds[what] += max(self.clock() - began, 0.0)

    @property
    def compilation(self) -> float:
        """Seconds spent on it so far."""
        return self._seconds["compilation"]

    def clock(self) -> float:
        """Seconds since some moment, of a clock that stands still while programs are compiled."""
        return time.monotonic() - self.compilation

    def fractions(self) -> dict[str, float]:
        """The share of each in the time since this was made; the rest went into steps."""
        total = max(time.monotonic() - self._began, 1e-9)
        return {what: seconds / total for what, seconds in sorted(self._seconds.items())}

    def sentence(self) -> str:
        """The shares, for people."""
        shares = self.fractions()
        others = ", ".join(f"{share:.1%} {what}" for what, share in shares.items())
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        steps = max(1 - sum(shares.values()), 0.0)
        return f"time: {minutes} min {seconds} s, of which {steps:.1%} steps, {others}"
