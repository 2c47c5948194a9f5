"""Several seeds of one recipe trained together, in as many visits as it takes."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import shiftnet.config
from shiftnet.checkpoint import LATEST, Series, from_arrays, to_arrays
from shiftnet.data import Dataset, Split
from shiftnet.errors import RunFailed, UserError
from shiftnet.training.evaluation import make_evaluator
from shiftnet.training.feed import ResidentFeed
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.loop import explained
from shiftnet.training.low_bit import LevelWatch
from shiftnet.training.mesh import make_mesh, replicated
from shiftnet.training.metrics import MetricsLog, Tally, read
from shiftnet.training.progress import Progress
from shiftnet.training.schedules import learning_rates
from shiftnet.training.step import Program, StackedProgram, TrainState, run_of
from shiftnet.training.times import Times
from shiftnet.training.workdir import RECIPE, claimed

# A state is saved at the end of an epoch when this many seconds have passed since it was last.
SAVE_EVERY = 120.0


class Deadline:
    """The time by which to have stopped and saved.

    Room is kept for twice the longest step of work so far (one more may be under way) and for the
    longest save; compiling counts in neither, and cannot be stopped.

    Args:
      seconds: from now; None: never.
    """

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds
        self._work = self._compilation = 0.0
        self._save = 10.0  # until one was timed

    def worked(self, seconds: float) -> None:
        """Notes how long a step of work took."""
        self._work = max(self._work, seconds)

    def saved(self, seconds: float) -> None:
        """Notes how long a save took."""
        self._save = max(1.0, 2 * seconds)

    def compiled(self, seconds: float) -> None:
        """Notes how long a recipe took to compile."""
        self._compilation = max(self._compilation, seconds)

    @property
    def left_for_another(self) -> float:
        """Seconds that are left for a recipe that is not compiled yet, by those that were."""
        return self.left - self._compilation

    @property
    def left(self) -> float:
        """Seconds that are left for work; infinite without an end."""
        if self._end is None:
            return float("inf")
        return self._end - time.monotonic() - 2 * self._work - self._save


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where several runs of a recipe have come to.

    Attributes:
      finished: False where time ran out or a signal came; training again continues.
      step: steps taken by each.
      seconds: that all of them have taken together, compilation included, over all visits.
      visits: what `train_together` was told of those that trained them, each once, the last last.
      lines: of each seed, the lines of its `metrics.jsonl`.
      best: of each seed `{"epoch", "accuracy"}`, the epoch of the highest test accuracy.
      kept: the first seed's network after its best or its last epoch; None until finished.
      note: as a checkpoint of `kept` would have it.
      signal: that stopped it, 0 for none.
    """

    finished: bool
    step: int
    seconds: float
    visits: Sequence[Mapping[str, Any]]
    lines: list[list[dict[str, Any]]]
    best: list[Mapping[str, Any]]
    kept: nnx.Module | None
    note: Mapping[str, Any]
    signal: int = 0

    @property
    def images_per_second(self) -> float:
        """Of all runs together, the median over the epochs."""
        return statistics.median(line["images_per_second"] for line in self.lines[0])


def train_together(
    config: Any,
    seeds: Sequence[int],
    dataset: Dataset,
    workdir: str | Path,
    *,
    keep: str,
    deadline: Deadline | None = None,
    visit: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains a recipe with each of several seeds in one program, or goes on doing so.

    Every run gets the numbers that `train` gives for its seed, see `StackedProgram`. It goes on
    exactly where it was stopped. The first device is used alone.

    Args:
      config: a validated recipe, for images that fit on a device; its seed is of no meaning.
      seeds: different ones.
      dataset: what `config.data` names.
      workdir: for the state (`checkpoints/`) and each seed's `metrics.jsonl` (`seed0/`, ...).
      keep: which epoch's network of the first seed to return, the `"best"` or the `"final"`.
      deadline: when to stop; None: at the end.
      visit: what to remember of this one beside the others, as JSON: the device, the code.

    Raises:
      UserError: where the working directory holds something else, or the recipe cannot be trained
        this way.
      RunFailed: as `train` raises it.
    """
    runs = len(seeds)
    load = f"at batch_size {config.batch_size} with {runs} seeds"
    with (
        explained(load, f"--together={max(runs // 2, 1)}"),
        Times() as times,
        contextlib.ExitStack() as stack,
    ):
        training = _Runs(config, seeds, dataset, Path(workdir), keep, times, stack)
        deadline = deadline or Deadline(None)
        outcome = training.train(deadline, visit or {})
        deadline.compiled(times.compilation)
        return outcome


class _Runs:
    def __init__(
        self,
        config: Any,
        seeds: Sequence[int],
        dataset: Dataset,
        workdir: Path,
        keep: str,
        times: Times,
        stack: contextlib.ExitStack,
    ):
        if not isinstance(dataset.train, Split) or not isinstance(dataset.test, Split):
            raise UserError(
                f"{dataset.name} is read from files: train.py trains on it, a seed at a time"
            )
        if config.parallel.fsdp or config.data.validation:
            raise UserError("seeds are not trained together with parallel.fsdp or data.validation")
        self._config, self._seeds, self._keep, self._times = config, list(seeds), keep, times
        self._dataset = dataset
        self._numbers = np.asarray(seeds, np.uint32)
        self._steps_per_epoch = len(dataset.train) // config.batch_size
        self._total = config.epochs * self._steps_per_epoch
        if not self._steps_per_epoch:
            raise UserError(
                f"batch_size {config.batch_size} is more than the {len(dataset.train)} images"
            )
        mesh = make_mesh(devices=jax.local_devices()[:1])
        self._program = Program(
            config,
            num_classes=len(dataset.class_names),
            mean=dataset.mean,
            std=dataset.std,
            steps_per_epoch=self._steps_per_epoch,
            mesh=mesh,
        )
        self._stacked = StackedProgram(self._program, len(seeds))
        stack.enter_context(claimed(workdir, config, ignore=shiftnet.config.IMMATERIAL))
        self._series = Series(workdir / LATEST, keep=config.checkpoint.keep)
        stack.callback(self._series.close)
        self._watch = LevelWatch(self._program)
        self._codes_of = jax.jit(jax.vmap(self._watch.codes))
        self._restore()
        self._folders = [workdir / f"seed{seed}" for seed in self._seeds]
        self._logs = [self._log(*pair) for pair in zip(self._seeds, self._folders, strict=True)]
        self._feed = ResidentFeed(
            self._numbers, self._stacked, dataset.train, self._steps_per_epoch, mesh
        )
        self._evaluate = make_evaluator(
            self._program.graphdef,
            dataset.test,
            config.data,
            mean=dataset.mean,
            std=dataset.std,
            batch_size=config.eval.batch_size,
            mesh=mesh,
        )

    def _log(self, seed: int, folder: Path) -> MetricsLog:
        folder.mkdir(exist_ok=True)
        own = shiftnet.config.from_json(shiftnet.config.to_json(self._config))
        own.seed = seed
        (folder / RECIPE).write_text(shiftnet.config.to_json(own) + "\n")
        return MetricsLog(folder, step=self._note["step"], tensorboard=False)

    def _restore(self) -> None:
        """Sets the states, the levels, the first seed's best arrays and the note; or fresh ones."""
        step, skipped = self._series.newest_good()
        for sentence in skipped:
            print(sentence, flush=True)
        if step is None:
            self._states = self._stacked.init(self._numbers)
            self._codes = self._codes_of(self._states.params, self._states.stats)
            self._best = self._model(0)
            self._note: dict[str, Any] = {
                "config": shiftnet.config.to_json(self._config),
                "class_names": list(self._dataset.class_names),
                "mean": list(self._dataset.mean),
                "std": list(self._dataset.std),
                "seeds": self._seeds,
                "step": 0,
                "seconds": 0.0,
                "epoch_end": 0.0,
                "visits": [],
                "tallies": [None] * len(self._seeds),
                "best": [None] * len(self._seeds),
            }
            return
        like = jax.eval_shape(jax.vmap(self._program.draw), self._numbers)
        everywhere = replicated(self._program.mesh)  # as after a step, or that compiles once more
        parts, note = self._series.restore(
            step, **jax.tree.map(lambda leaf: _on(leaf, everywhere), self._parts(like))
        )
        source = self._series.path(step)
        if note["seeds"] != self._seeds:
            raise UserError(f"{source} is of the seeds {note['seeds']}, not of {self._seeds}")
        self._states = TrainState(
            step=jax.device_put(np.full(len(self._seeds), step, np.int32), everywhere),
            params=from_arrays(like.params, parts["model"], source),
            stats=from_arrays(like.stats, parts["model"], source),
            opt_state=parts["optimizer"],
        )
        self._codes = parts.get("levels", {})
        self._best = parts["best"]
        self._note = {"epoch_end": 0.0, "visits": [], **note}

    def _parts(self, states: TrainState) -> dict[str, Any]:
        """What a checkpoint holds, of abstract states."""
        levels = jax.eval_shape(self._codes_of, states.params, states.stats)
        first = jax.eval_shape(lambda s: run_of((s.params, s.stats), 0), states)
        parts = {
            "model": to_arrays(states.params, states.stats),
            "optimizer": states.opt_state,
            "best": to_arrays(*first),
        }
        return parts | ({"levels": levels} if self._watch else {})

    def _model(self, run: int) -> dict[str, jax.Array]:
        return to_arrays(*run_of((self._states.params, self._states.stats), run))

    def train(self, deadline: Deadline, visit: Mapping[str, Any]) -> Outcome:
        """Takes steps until the end, the deadline or a signal."""
        began, before = time.monotonic(), self._note["seconds"]
        self._note["visits"] = [*(v for v in self._note["visits"] if v != visit), visit]
        deadline.worked(self._note["epoch_end"])  # the longest work there is
        config, runs = self._config, len(self._seeds)
        progress = Progress(
            total_steps=self._total,
            steps_per_epoch=self._steps_per_epoch,
            epochs=config.epochs,
            batch_size=config.batch_size * runs,
            every_seconds=config.log.every_seconds,
        )
        tallies = [Tally(config.batch_size, sums) for sums in self._note["tallies"]]
        signal, step = 0, self._note["step"]
        epoch_began, saved_at = (self._times.clock(), step), began

        def save() -> None:
            for tally in tallies:
                tally.settle()
            seconds = before + time.monotonic() - began
            sums = [tally.sums() for tally in tallies]
            self._note.update(step=step, tallies=sums, seconds=seconds)
            with _timed(deadline.saved, time.monotonic):
                model = to_arrays(self._states.params, self._states.stats)
                levels = {"levels": self._codes} if self._watch else {}
                parts = {"model": model, "optimizer": self._states.opt_state, "best": self._best}
                self._series.save(step, self._note, **parts, **levels)
                self._series.wait()

        def ended(seconds: float) -> None:
            self._note["epoch_end"] = max(self._note["epoch_end"], seconds)
            deadline.worked(seconds)

        with Interrupt() as interrupt:
            while step < self._total and deadline.left > 0 and not signal:
                with _timed(deadline.worked, self._times.clock):
                    self._states, losses, corrects = self._feed.advance(self._states, step)
                    step += losses.shape[1]
                    for run, tally in enumerate(tallies):
                        tally.push(step, losses[run], corrects[run])
                progress.step(
                    step, _mean(t.loss for t in tallies), _mean(t.accuracy for t in tallies)
                )
                signal = interrupt.requested()
                if step % self._steps_per_epoch:
                    continue
                with _timed(ended, self._times.clock):
                    for tally in tallies:
                        tally.settle()
                    self._check(tallies)
                    seconds, first = self._times.clock() - epoch_began[0], epoch_began[1]
                    rate = (step - first) * config.batch_size * runs / seconds
                    lines = self._epoch_ends(step, tallies, rate)
                accuracy = _mean(line["test_accuracy"] for line in lines)
                progress.line(
                    f"epoch {lines[0]['epoch']}/{config.epochs}  "
                    f"train loss {_mean(line['train_loss'] for line in lines):.4f}  "
                    f"test accuracy {accuracy:.2%}  {rate:.0f} images/s"
                    + (f"  ({runs} seeds)" if runs > 1 else "")
                )
                tallies = [Tally(config.batch_size) for _ in self._seeds]
                if step < self._total and time.monotonic() - saved_at > SAVE_EVERY:
                    save()
                    saved_at = time.monotonic()
                progress.pause()
                epoch_began = (self._times.clock(), step)
            for tally in tallies:
                tally.settle()
            self._check(tallies)
            if step > self._note["step"]:
                save()
            signal = signal or interrupt.requested()

        for log in self._logs:
            log.close()
        finished = step >= self._total
        return Outcome(
            finished=finished,
            step=step,
            seconds=self._note["seconds"],
            visits=self._note["visits"],
            lines=[read(folder) for folder in self._folders],
            best=self._note["best"],
            kept=self._kept() if finished else None,
            note=self._note,
            signal=signal,
        )

    def _check(self, tallies: Sequence[Tally]) -> None:
        for seed, tally in zip(self._seeds, tallies, strict=True):
            if tally.bad_step is not None:
                raise RunFailed(
                    f"the loss of seed {seed} became {tally.bad_loss} at step {tally.bad_step}"
                )

    def _epoch_ends(self, step: int, tallies: Sequence[Tally], rate: float) -> list[dict[str, Any]]:
        """Evaluates every run and writes its line."""
        epoch = step // self._steps_per_epoch
        before = self._codes
        self._codes = self._codes_of(self._states.params, self._states.stats)
        lines = []
        for run, (tally, log) in enumerate(zip(tallies, self._logs, strict=True)):
            params, stats = run_of((self._states.params, self._states.stats), run)
            line = {
                "step": step,
                "epoch": epoch,
                "lr": float(learning_rates(self._config)[epoch - 1]),
                "train_loss": tally.loss,
                "train_accuracy": tally.accuracy,
                "images_per_second": rate,
            }
            if self._watch:
                both = run_of((before, self._codes), run)
                line["weights"] = self._watch.metrics(*both)
            evaluation = self._evaluate(params, stats)
            line |= evaluation.metrics("test")
            names = self._dataset.class_names
            log.write_confusion(step, epoch, names, evaluation.confusion())
            best = self._note["best"][run]
            if best is None or line["test_accuracy"] > best["accuracy"]:
                self._note["best"][run] = {"epoch": epoch, "accuracy": line["test_accuracy"]}
                if not run:
                    self._best = to_arrays(params, stats)
            log.write(line)
            lines.append(line)
        return lines

    def _kept(self) -> nnx.Module:
        arrays = self._best if self._keep == "best" else self._model(0)
        like = jax.eval_shape(self._program.draw, np.uint32(0))
        states = [from_arrays(part, arrays, "the run") for part in (like.params, like.stats)]
        return nnx.merge(self._program.graphdef, *states)


def _mean(values: Iterator[float]) -> float:
    return statistics.fmean(values)


@contextlib.contextmanager
def _timed(note: Callable[[float], None], clock: Callable[[], float]) -> Iterator[None]:
    """Tells `note` how many seconds of `clock` were spent within."""
    began = clock()
    yield
    note(clock() - began)


def _on(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
