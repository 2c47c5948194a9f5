"""Measurements in worker processes: one a measurement, kept alive, idle while another one runs.

The parent writes one JSON object a line to a worker's standard input and reads one line back.
A worker that waits for its next line uses no processor, so two measurements can take turns
without competing for cores or sharing an allocator. Only the standard library is used: a worker
may run under another Python than its parent.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parent.parent
SECONDS_A_ROUND = 1.5  # long against the clock and a context switch, short against a slow drift
WARM_UP_STEPS = 3
MACHINE = Path("/proc/stat")


class WorkerError(RuntimeError):
    """A worker answered with an error or ended. The message is one line."""


class Worker:
    """The parent's end of one worker process. Use it as a context manager.

    Args:
      python: the interpreter to run.
      module: the module to run with `-m`, from the repository's root; it calls `serve`.
      environment: changes to this process's environment, which it gets otherwise as it is.
      patience: seconds that an answer may take, after which the worker is ended; None waits for
        ever.
    """

    def __init__(
        self,
        python: str,
        module: str,
        environment: Mapping[str, str] | None = None,
        patience: float | None = None,
    ):
        self.patience = patience
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # nothing to save, and compilers' helpers end slowly
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def ask(self, request: str, **arguments: Any) -> Any:
        """Sends one request and waits for its answer.

        Raises:
          WorkerError: the worker reported an error, or ended without an answer, or took too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": request, **arguments}), file=self._process.stdin, flush=True)
            if self.patience is not None:
                answered, _, _ = select.select([self._process.stdout], [], [], self.patience)
                if not answered:
                    self._process.kill()
                    self._process.wait()
                    raise WorkerError(f"no answer within {self.patience:g} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            self._errors.seek(0)
            said = [text for text in self._errors.read().splitlines() if text.strip()]
            raise WorkerError(said[-1].strip() if said else "the worker ended without a word")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    @property
    def lives(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def processor_seconds(self) -> float:
        """Processor time used so far; Linux only."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def duration(text: str) -> float:
    """Seconds of `8m`, `90s` or `480`.

    Raises:
      ValueError: for anything else.
    """
    factor = {"m": 60, "s": 1}.get(text[-1:])
    return float(text) if factor is None else float(text[:-1]) * factor


def steps_for(worker: Worker, seconds: float) -> int:
    """Warms a worker up; returns how many of its steps last about `seconds`, at least one."""
    worker.ask("run", steps=WARM_UP_STEPS)
    return max(1, round(seconds / worker.ask("run", steps=WARM_UP_STEPS)))


class Turns(NamedTuple):
    """What `alternate` measured.

    Attributes:
      times: the seconds a step of each round, by the worker's name.
      others: processor cores that everything but the workers used meanwhile, on average; None
        where the system does not say.
    """

    times: dict[str, list[float]]
    others: float | None


def alternate(
    workers: Mapping[str, Worker],
    rounds: int,
    steps: int | None = None,
    seconds: float = SECONDS_A_ROUND,
) -> Turns:
    """Times workers in turn, A B A B ..., after a warm-up.

    Args:
      workers: by name; each has its measurement open.
      rounds: how many times each is timed.
      steps: in each round; None takes as many as last about `seconds`.
      seconds: that a worker runs in each round.
    """
    counts = {name: steps_for(worker, seconds) for name, worker in workers.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    start, before = time.monotonic(), _processor_seconds_of_others(workers)
    for _ in range(rounds):
        for name, worker in workers.items():
            worker.ask("run", steps=1)  # untimed: the other worker had the caches
            times[name].append(worker.ask("run", steps=steps or counts[name]))
    after = _processor_seconds_of_others(workers)
    if before is None or after is None:
        return Turns(times, None)
    return Turns(times, max(0.0, after - before) / (time.monotonic() - start))


def _processor_seconds_of_others(workers: Mapping[str, Worker]) -> float | None:
    """Processor time that all but the workers used since the machine started."""
    if not MACHINE.exists():
        return None
    user, nice, system, _, _, *rest = map(int, MACHINE.read_text().split(maxsplit=9)[1:9])
    busy = user + nice + system + sum(rest)  # without idle and waiting for the disk
    own = sum(worker.processor_seconds() for worker in workers.values())
    return busy / os.sysconf("SC_CLK_TCK") - own


class Measurement(Protocol):
    """What a worker measures: one program on one batch.

    `check(steps)` returns the numbers that both sides must agree on; `run(steps)` runs about so
    many steps to the end of the device's work and returns the wall-clock seconds of each.
    """

    def check(self, steps: int) -> list: ...

    def run(self, steps: int) -> float: ...


class ProcessorTime:
    """A base for measurements whose runs also count processor time, of all threads."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    def take(self, steps: int) -> None:
        """Runs so many steps to their end."""
        raise NotImplementedError

    def run(self, steps: int) -> float:
        start, before = time.perf_counter(), time.process_time()
        self.take(steps)
        seconds = time.perf_counter() - start
        self._seconds += time.process_time() - before
        self._steps += steps
        return seconds / steps

    def processor_seconds(self) -> float:
        """Processor time of a step, over all runs so far."""
        return self._seconds / self._steps


def serve(open_measurement: Callable[..., Measurement], **requests: Callable[..., Any]) -> None:
    """The worker's end: answers requests until standard input closes.

    Whatever else is printed to standard output goes to standard error, so that it cannot be
    taken for an answer.

    Args:
      open_measurement: builds the measurement from the arguments of the request "open"; the
        requests "check" and "run" go to it.
      **requests: what else the worker answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measurement: Measurement | None = None
    for line in sys.stdin:
        arguments = json.loads(line)
        request = arguments.pop("do")
        try:
            if request == "open":
                measurement = open_measurement(**arguments)
                result = None
            elif request in requests:
                result = requests[request](**arguments)
            else:
                result = getattr(measurement, request)(**arguments)
            answer = {"result": result}
        except Exception as error:
            # The parent decides what a failure means: for a peer's form, go on with the next.
            reason = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {reason[0]}"}
        print(json.dumps(answer), file=answers, flush=True)
