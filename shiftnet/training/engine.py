"""The training engine: a recipe, its seeds and a working directory in, trained networks out."""

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import shiftnet.config
import shiftnet.data
import shiftnet.models
from shiftnet.checkpoint import AVERAGED, BEST, LATEST, CheckpointManager, to_arrays
from shiftnet.config import Config
from shiftnet.data import Dataset, Split
from shiftnet.errors import NotTrainable, RunFailed, UserError
from shiftnet.files import path_of
from shiftnet.kernels import operation
from shiftnet.training import environment, low_bit, pictures
from shiftnet.training.batch_statistics import make_estimator
from shiftnet.training.data_iterator import make_data_iterator
from shiftnet.training.deadline import Deadline
from shiftnet.training.distillation import Teacher
from shiftnet.training.evaluation import make_evaluator
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.losses import balanced_weights
from shiftnet.training.low_bit import LevelWatch
from shiftnet.training.mesh import make_mesh
from shiftnet.training.metrics import MetricAccumulator, MetricsLog, StepsLog
from shiftnet.training.optimizer import keep_frozen
from shiftnet.training.profile import Profile
from shiftnet.training.progress import Progress
from shiftnet.training.restore import Init, Record, check_same_data, facts, restore, start_from
from shiftnet.training.schedules import learning_rates, rates_of_steps
from shiftnet.training.step import Program, StackedProgram
from shiftnet.training.times import Times
from shiftnet.training.trackers import make_trackers
from shiftnet.training.trained import read as read_trained
from shiftnet.training.workdir import locked, write_environment, write_recipe


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run, or several of one recipe, ended.

    Lists have one entry per seed.

    Attributes:
      finished: False where it was interrupted; training again in the same place continues it.
      step: steps taken.
      final: top-1 accuracy on the test set after the last epoch, a fraction; None if unfinished.
      best: `{"epoch", "accuracy", "test_accuracy"}` (fractions) of the epoch with the highest
        accuracy so far; None before the first evaluation.
      chosen_on: `"test"` or `"validation"`, the images that `best` was chosen on.
      weights: the table of the first seed's weights, where some have few bits; None elsewhere.
      signal: the number of the signal that interrupted it, 0 for none.
      seconds: spent in all sessions, compilation included.
      sessions: what `train` was told of each session, each once, the last one last.
      network: the first seed's, as it is now.
      metadata: as a checkpoint of the network would have it.
    """

    finished: bool
    step: int
    final: list[float | None]
    best: list[dict[str, Any] | None]
    chosen_on: str
    weights: str | None = None
    signal: int = 0
    seconds: float = dataclasses.field(default=0.0, compare=False)
    sessions: Sequence[Mapping[str, Any]] = dataclasses.field(default=(), compare=False)
    network: nnx.Module | None = dataclasses.field(default=None, compare=False)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


def train(
    config: Config,
    workdir: str | Path,
    *,
    init: Init | str | Path | None = None,
    profile: bool = False,
    seeds: Sequence[int] | None = None,
    dataset: Dataset | None = None,
    deadline: Deadline | None = None,
    save_seconds: float = 0.0,
    session: Mapping[str, Any] | None = None,
    stop: Callable[[Sequence[Mapping[str, Any]]], bool] | None = None,
    find: Callable[[str, str], Path] = path_of,
) -> Outcome:
    """Trains, or continues the run or runs that `workdir` holds.

    Every process of a `jax.distributed` job calls this with the same arguments; the first one
    writes and prints. Each epoch leaves out the images that do not fill a last batch.

    Several seeds are trained in one program, see `StackedProgram`. `workdir` then has what is
    common to them and the best network of the first one, and `workdir/seedN` each one's metrics.

    Args:
      config: a validated recipe.
      workdir: where checkpoints, metrics and the recipe go; made where it is missing.
      init: a checkpoint or packed file to take parameters and running statistics from, see
        `start_from`; a run that is continued does not look at it.
      profile: write a trace of a few steps, see `Profile`.
      seeds: different ones, in place of the recipe's, each with a folder in `workdir`, and trained
        on the first device alone; None: the recipe's, on all devices.
      dataset: what `config.data` names; None: it is opened here.
      deadline: when to stop and save; None: at the end.
      save_seconds: the least time between two checkpoints at epochs' ends.
      session: what to remember of this session beside earlier ones, as JSON.
      stop: is shown what was logged of each epoch with an evaluation, one line per seed; True ends
        the session there.
      find: gives the path that a setting stands for, `config.distill.teacher`; it takes the value
        and the setting's name. That of the commands knows trained networks by name.

    Raises:
      UserError: for a recipe that cannot be trained, one that differs from the run's, other data
        than the run's, fewer epochs than it has taken, or an `init` that does not fit.
      RunFailed: where the loss is not finite, the device's memory is too small, a checkpoint
        cannot be written, or another process of the job is gone.
    """
    with explained(config, seeds), Times() as times, contextlib.ExitStack() as stack:
        workdir, deadline = Path(workdir), deadline or Deadline(None)

        # --- Data ---------------------------------------------------------------------------------

        shiftnet.models.check(config.model)  # before a data set is downloaded for it
        if seeds is None:
            mesh = make_mesh(config.batch_size)
            folders = [workdir]
            may_differ: tuple[str, ...] = shiftnet.config.RESUMABLE
        else:
            mesh = make_mesh(devices=jax.local_devices()[:1])
            folders = [workdir / f"seed{seed}" for seed in seeds]
            may_differ = ("seed", *shiftnet.config.IMMATERIAL)
        configs = [_with_seed(config, seed) for seed in seeds or [config.seed]]
        for one in configs:
            shiftnet.data.fit(one.data, shiftnet.models.image_size(one.model.arch))
        config, runs = configs[0], len(configs)
        dataset = dataset or shiftnet.data.of_recipe(config.data)
        start = Init(init) if isinstance(init, str | Path) else init
        if runs > 1:
            check_together(config, dataset, start)
        num_examples = len(dataset.train)
        steps_per_epoch = num_examples // config.batch_size
        total_steps = config.epochs * steps_per_epoch
        if not steps_per_epoch:
            raise UserError(
                f"batch_size {config.batch_size} is more than the {num_examples} training images"
            )

        # --- Program ------------------------------------------------------------------------------

        operation.decide()  # which kernels can be trusted, before any is traced
        teacher = None
        if config.distill.teacher:
            place = find(config.distill.teacher, "distill.teacher")
            guide = read_trained(place, "distill.teacher")
            teacher = Teacher.of(guide, dataset.class_names, config.model.arch)
        single = Program(
            config,
            num_classes=len(dataset.class_names),
            mean=dataset.mean,
            std=dataset.std,
            steps_per_epoch=steps_per_epoch,
            mesh=mesh,
            teacher=teacher,
            class_weights=class_weights(config, dataset),
        )
        program = single if runs == 1 else StackedProgram(single, runs)
        numbers = np.array([one.seed for one in configs], np.uint32)
        seed = numbers[0] if runs == 1 else numbers
        watch = LevelWatch(single, runs)
        lrs = learning_rates(config, steps_per_epoch)

        # --- Restore ------------------------------------------------------------------------------
        # What the working directory holds comes before --init, and that before a fresh network.

        is_main = jax.process_index() == 0
        stack.enter_context(locked(workdir, config, may_differ))
        checkpoints = CheckpointManager(workdir / LATEST, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        best_checkpoints = CheckpointManager(workdir / BEST, keep=sys.maxsize)  # see `save`
        stack.callback(best_checkpoints.close)
        ema_checkpoints = CheckpointManager(workdir / AVERAGED, config.checkpoint.keep)
        stack.callback(ema_checkpoints.close)
        metadata = {
            "config": shiftnet.config.to_json(config),
            "seeds": numbers.tolist(),
            "stacked": runs > 1,
            **facts(dataset, steps_per_epoch, teacher),
        }

        newest, messages = checkpoints.newest_good()
        saved = checkpoints.metadata(newest) if newest is not None else {}
        record = Record.of_metadata(saved, runs)
        step = record.step
        if newest is not None:
            source = checkpoints.path(newest)
            check_same_data(saved, metadata, source)
            if saved.get("seeds", metadata["seeds"]) != metadata["seeds"]:
                raise UserError(f"{source} has the seeds {saved['seeds']}, not {metadata['seeds']}")
        if step > total_steps or (step == total_steps and None in record.final and seeds is None):
            least = max(-(-step // steps_per_epoch), config.epochs + 1)
            raise UserError(
                f"{workdir} has already taken {step} steps, and epochs {config.epochs} means "
                f"{total_steps}: give --config.epochs={least} or more, or another --workdir"
            )

        def is_over() -> bool:
            """Whether all epochs are done, or `config.patience` is."""
            best = record.best[0]
            waited = step // steps_per_epoch - best["epoch"] if best else 0
            return step >= total_steps or 0 < config.patience <= waited

        progress = Progress(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            epochs=config.epochs,
            batch_size=config.batch_size * runs,
            every_seconds=config.log.every_seconds,
            on=is_main,
        )
        best_arrays = None
        if newest is None:
            state = program.init(seed)
            codes = watch.codes(state.params, state.stats)
        else:
            state, codes, best_arrays = restore(program, watch, seed, checkpoints, newest, saved)
        progress.message(describe(config, dataset, state, steps_per_epoch, program))
        if dataset.found:
            progress.message(f"found {dataset.found}")
        for message in messages:
            progress.message(message)
        if newest is None and start is not None:
            state, message = start_from(single, state, start, config, dataset)
            codes = watch.codes(state.params, state.stats)
            progress.message(message)
        elif is_over():
            progress.message(f"already finished, after step {step}")
        elif newest is not None:
            progress.message(f"continuing after step {step}, from {source}")
        if newest is not None and start is not None:
            progress.message(f"{start.path} is not used: this run has started before")
        for folder, own in ({workdir: config} | dict(zip(folders, configs, strict=True))).items():
            write_recipe(folder, own)
        write_environment(workdir, step, environment.describe())
        if not is_over():
            record.final = [None] * runs  # of a run that was shorter
        if session is not None:
            record.sessions = [*(one for one in record.sessions if one != session), session]

        def best_step() -> int:
            return record.best[0]["epoch"] * steps_per_epoch if record.best[0] else 0

        def save_best(arrays: Mapping[str, jax.Array]) -> None:
            own = {"step": best_step(), "stacked": False}
            with times.on("checkpoints"):
                best_checkpoints.save(
                    best_step(), {**metadata, **record.metadata(), **own}, model=arrays
                )

        estimate = None
        estimated: dict[int, tuple[int, nnx.State]] = {}
        if config.ema.estimate:
            estimate = make_estimator(
                program.graphdef,
                dataset.train,
                config.data,
                mean=dataset.mean,
                std=dataset.std,
                batch_size=config.batch_size,
                batches=config.ema.estimate,
                mesh=mesh,
            )

        def network(run: int) -> tuple[nnx.State, nnx.State]:
            """The parameters and statistics that a run is evaluated and kept with."""
            if state.ema is None or step == 0:  # an average begins with the first step
                return program.of((state.params, state.stats), run)
            params, stats = program.of(state.ema, run)
            if estimate is not None:
                if run not in estimated or estimated[run][0] != step:
                    with times.on("evaluation"):
                        found = estimate(params, stats)
                        estimated[run] = step, keep_frozen(stats, found, config.optimizer.freeze)
                stats = estimated[run][1]
            return params, stats

        # A later best network belongs to epochs that are trained again, perhaps with other rates.
        best_checkpoints.delete(after=step)
        ema_checkpoints.delete(after=step)
        if record.best[0] and not best_checkpoints.has_good(best_step()):
            if best_arrays is not None:
                save_best(best_arrays)
            elif best_step() == step:
                save_best(to_arrays(*network(0)))
            else:
                lost = f"the best network, of epoch {record.best[0]['epoch']}, is lost"
                if not is_over():
                    lost += ": from here on the best epoch is chosen anew"
                    record.best[0] = None
                progress.message(lost)

        # --- Loop ---------------------------------------------------------------------------------

        trackers = []
        if is_main and seeds is None:
            about = environment.describe()
            trackers = make_trackers(config, workdir, step=step, environment=about)
        logs = [MetricsLog(folder, step=step, trackers=trackers, on=is_main) for folder in folders]
        for log in logs:
            stack.callback(log.close)
        step_logs = []
        if is_main and config.log.every_steps:
            step_logs = [
                StepsLog(
                    folder,
                    every=config.log.every_steps,
                    batch_size=config.batch_size,
                    lrs=rates_of_steps(config, steps_per_epoch),
                    step=step,
                    trackers=trackers,
                )
                for folder in folders
            ]
        for log in logs:
            if log.damage:
                progress.message(log.damage)
        data = make_data_iterator(
            config,
            program,
            seed,
            dataset.train,
            steps_per_epoch=steps_per_epoch,
            mesh=mesh,
            state=record.data,
            times=times,
        )
        stack.callback(data.close)
        evaluators = {
            name: make_evaluator(
                program.graphdef,
                split,
                config.data,
                mean=dataset.mean,
                std=dataset.std,
                batch_size=config.eval.batch_size,
                mesh=mesh,
            )
            # The first one chooses the best epoch.
            for name, split in (("validation", dataset.validation), ("test", dataset.test))
            if split is not None
        }
        chosen_on = next(iter(evaluators))
        accumulator = MetricAccumulator(config.batch_size, record.sums, step_logs)
        saved_step = began_at = step
        began, before = time.monotonic(), record.seconds
        saved_at = began
        epoch_began = (times.clock(), step)
        deadline.worked(record.epoch_end)  # the longest work there is
        # The best networks that the kept checkpoints name, and the one that is being written.
        referenced: deque[int] = deque(maxlen=config.checkpoint.keep + 1)

        def settle() -> None:
            """Waits for the device, and stops the run where a loss is not finite."""
            accumulator.settle()
            if accumulator.bad is not None:
                run, bad_step, loss = accumulator.bad
                whose = f" of seed {configs[run].seed}" if runs > 1 else ""
                rate = lrs[(bad_step - 1) // steps_per_epoch]
                raise NotTrainable(
                    f"the loss{whose} became {loss} at step {bad_step} (learning rate {rate:g}); "
                    f"{last_good(checkpoints, bad_step)}"
                )

        def save() -> None:
            settle()
            record.step, record.sums, record.data = step, accumulator.sums(), data.get_state()
            record.seconds = before + time.monotonic() - began
            parts = {"model": to_arrays(state.params, state.stats), "optimizer": state.opt_state}
            if watch:
                parts["levels"] = codes
            save_began = time.monotonic()
            if state.ema is not None:
                parts["ema"] = to_arrays(*state.ema)
                own = {**metadata, **record.metadata(), "stacked": False}
                averaged = to_arrays(*network(0))
                with times.on("checkpoints"):
                    ema_checkpoints.save(step, own, model=averaged)
                    ema_checkpoints.wait()  # the newest of a run is in both places
            with times.on("checkpoints"):
                best_checkpoints.wait()  # a checkpoint names no network that is not on disk
                checkpoints.save(step, {**metadata, **record.metadata()}, **parts)
                if deadline.is_set:
                    checkpoints.wait()  # the checkpoint is to be on disk by then
            deadline.saved(time.monotonic() - save_began)
            referenced.append(best_step())
            if len(referenced) == referenced.maxlen:
                best_checkpoints.delete(before=referenced[0])

        signal, is_stopped = 0, False
        choices: list[str] = []
        profiled = stack.enter_context(contextlib.closing(Profile(workdir, on=profile and is_main)))
        interrupt = stack.enter_context(Interrupt())
        while not is_over() and deadline.left > 0 and not signal and not is_stopped:
            # Step
            step_began, step_before = times.clock(), step
            with contextlib.ExitStack() as first:
                if step == began_at:
                    first.enter_context(interrupt.ending_at_once())  # nothing can be lost yet
                    progress.message("compiling the training step, which may take minutes ...")
                chosen = first.enter_context(operation.choices())  # while it is traced
                state, losses, corrects = data.advance(state, step)
            for choice in chosen:
                if choice not in choices:
                    choices.append(choice)
                    progress.message(f"kernel chosen for {choice}")
            step += losses.shape[-1]
            profiled.step(losses)
            # This waits for the call before, so that the device has the next one meanwhile and no
            # more than that is in flight.
            accumulator.push(step, losses, corrects)
            progress.step(step, accumulator.loss, accumulator.accuracy)
            deadline.worked(times.clock() - step_began)
            if jax.process_count() > 1:
                # If this process's step has failed, it must say so: the others, who wait for it in
                # the step, would not hear a question. Asking waits for the step in any case.
                jax.block_until_ready(losses)
            signal = interrupt.requested()

            epoch_ends = step % steps_per_epoch == 0
            between = config.checkpoint.every_steps
            save_now = between > 0 and step // between > step_before // between
            if accumulator.bad is not None or epoch_ends:
                settle()
            if epoch_ends:
                epoch, end_began = step // steps_per_epoch, times.clock()
                first_clock, first_step = epoch_began
                images = (step - first_step) * config.batch_size * runs
                rate = images / (end_began - first_clock)

                # Log
                lines: list[dict[str, Any]] = [
                    {
                        "step": step,
                        "epoch": epoch,
                        "lr": float(lrs[epoch - 1]),
                        "train_loss": loss,
                        "train_accuracy": accuracy,
                        "images_per_second": rate,
                    }
                    for loss, accuracy in zip(
                        accumulator.losses, accumulator.accuracies, strict=True
                    )
                ]
                accumulator = MetricAccumulator(config.batch_size, [None] * runs, step_logs)
                if skipped := data.skipped():
                    lines[0]["train_skipped"] = len(skipped)
                    report_skipped(progress, "training", skipped)
                if watch:
                    codes_before, codes = codes, watch.codes(state.params, state.stats)
                    for run, line in enumerate(lines):
                        both = program.of((codes_before, codes), run)
                        line["weights"] = watch.metrics(*both)
                for run, line in enumerate(lines):
                    own = program.of((state.params, state.stats), run)
                    if shares := watch.activations(*own):
                        line["activations"] = shares

                # Evaluate
                if epoch % config.eval.every_epochs == 0 or is_over():
                    for run, (line, log) in enumerate(zip(lines, logs, strict=True)):
                        networks = {"": network(run)}
                        if state.ema is not None:  # the last one is whose confusion is written
                            raw = program.of((state.params, state.stats), run)
                            networks = {"raw_": raw, **networks}
                        for prefix, arrays in networks.items():
                            for name, evaluate in evaluators.items():
                                with times.on("evaluation"):
                                    evaluation = evaluate(*arrays)
                                line |= evaluation.metrics(f"{prefix}{name}")
                                if not prefix:
                                    report_skipped(progress, name, evaluation.skipped)
                        names, confusion = dataset.class_names, evaluation.confusion()
                        log.write_confusion(step, epoch, names, confusion)
                        if run == 0 and is_main:
                            shown = pictures.describe(evaluation, dataset.test, names)
                            log.write_images(step, epoch, shown)

                        # Best
                        accuracy, best = line[f"{chosen_on}_accuracy"], record.best[run]
                        if best is None or accuracy > best["accuracy"]:
                            record.best[run] = {
                                "epoch": epoch,
                                "accuracy": accuracy,
                                "test_accuracy": line["test_accuracy"],
                            }
                            if run == 0:
                                save_best(to_arrays(*network(0)))
                    if is_over():
                        record.final = [line["test_accuracy"] for line in lines]
                        for line in lines:
                            if not math.isfinite(line["test_loss"]):
                                raise NotTrainable(
                                    f"after the last step the loss on the test images is "
                                    f"{line['test_loss']}; {last_good(checkpoints, step + 1)}"
                                )
                for line, log in zip(lines, logs, strict=True):
                    line["time"] = times.fractions()
                    log.write(line)
                progress.message(epoch_line(lines, config.epochs))
                is_stopped = stop is not None and "test_accuracy" in lines[0] and stop(lines)
                seconds = times.clock() - end_began
                record.epoch_end = max(record.epoch_end, seconds)
                deadline.worked(seconds)

            # Save
            waited = time.monotonic() - saved_at >= save_seconds
            if epoch_ends and epoch % config.checkpoint.every_epochs == 0 and waited:
                save_now = True
            if save_now and not is_over() and not signal:
                save()
                saved_step, saved_at = step, time.monotonic()
            if epoch_ends:
                progress.pause()
                epoch_began = (times.clock(), step)

        # --- End ----------------------------------------------------------------------------------

        if step > saved_step:
            save()
        signal = signal or interrupt.requested()
        with times.on("checkpoints"):
            checkpoints.close()
            best_checkpoints.close()
            ema_checkpoints.close()
        if is_over() and step < total_steps:
            best = record.best[0]
            progress.message(
                f"ended early: no higher validation accuracy since epoch {best and best['epoch']}"
            )
        if step > began_at:
            progress.message(times.sentence())
        deadline.compiled(times.compilation)
        trained, weights = nnx.merge(program.graphdef, *network(0)), None
        if watch:
            now = watch.metrics(*(program.of(codes, 0),) * 2)
            weights = low_bit.table(trained, {name: share["zeros"] for name, share in now.items()})
        return Outcome(
            finished=is_over(),
            step=step,
            final=record.final,
            best=record.best,
            chosen_on=chosen_on,
            weights=weights,
            signal=signal,
            seconds=record.seconds,
            sessions=record.sessions,
            network=trained,
            metadata={**metadata, **record.metadata()},
        )


def _with_seed(config: Config, seed: int) -> Config:
    own = shiftnet.config.from_json(shiftnet.config.to_json(config))
    own.seed = seed
    return own


def class_weights(config: Config, dataset: Dataset) -> np.ndarray | None:
    """Returns what `loss.class_weights` makes images of each class count; None for all the same.

    Raises:
      UserError: where the classes of a data set's images are not known without reading them.
    """
    if config.loss.class_weights == "none":
        return None
    labels = getattr(dataset.train, "labels", None)
    if labels is None:
        raise UserError(
            f"loss.class_weights needs the classes of all images, and those of {dataset.name} are "
            "not known before they are read; a folder's are"
        )
    return balanced_weights(labels, len(dataset.class_names))


def check_together(config: Config, dataset: Dataset, init: Init | None) -> None:
    """Checks that several seeds of a recipe can be trained in one program.

    Raises:
      UserError: where they cannot.
    """
    if not isinstance(dataset.train, Split):
        reason = f"{dataset.name} is read from files"
    elif config.parallel.fsdp:
        reason = "parallel.fsdp divides one network's parameters"
    elif init is not None:
        reason = "--init is one network"
    elif config.patience:
        reason = "with patience each of them ends at an epoch of its own"
    else:
        return
    raise UserError(f"several seeds cannot be trained together: {reason}; train them one by one")


def report_skipped(progress: Progress, which: str, names: Sequence[str]) -> None:
    """Prints the names of the files that could not be decoded, if there are any."""
    if names:
        progress.message(f"skipped {len(names)} corrupt {which} files: {', '.join(names)}")


def describe(
    config: Config,
    dataset: Dataset,
    state: Any,
    steps_per_epoch: int,
    program: Program | StackedProgram,
) -> str:
    """Describes in a line what is about to be trained, on what data and devices."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) // program.runs
    count = len(dataset.train)
    device = program.mesh.devices.flat[0].device_kind
    return (
        f"{config.model.arch} on {dataset.name}: {parameters} parameters, {count} training images "
        f"in {steps_per_epoch} steps of {config.batch_size} "
        f"({count - steps_per_epoch * config.batch_size} left out each epoch), "
        f"{program.mesh.size} x {device}{_seeds(program.runs)}"
    )


def epoch_line(lines: Sequence[Mapping[str, float]], epochs: int) -> str:
    """Puts an epoch's numbers into one line, the means of several seeds'."""
    first = lines[0]

    def mean(key: str) -> float:
        return statistics.fmean(line[key] for line in lines)

    parts = [
        f"epoch {first['epoch']}/{epochs}",
        f"lr {first['lr']:g}",
        f"train loss {mean('train_loss'):.4f} accuracy {mean('train_accuracy'):.2%}",
    ]
    parts += [
        f"{name} loss {mean(f'{name}_loss'):.4f} accuracy {mean(f'{name}_accuracy'):.2%}"
        for name in ("validation", "test")
        if f"{name}_loss" in first
    ]
    return "  ".join([*parts, f"{first['images_per_second']:.0f} images/s{_seeds(len(lines))}"])


def _seeds(runs: int) -> str:
    return f" ({runs} seeds)" if runs > 1 else ""


def last_good(checkpoints: CheckpointManager, bad_step: int) -> str:
    """Says which checkpoint a run that failed can be continued from.

    The loss of a step is that of the numbers before it: those of the checkpoint there are bad too.
    """
    checkpoints.close()
    step, _ = checkpoints.newest_good()
    if step is None:
        return "there is no checkpoint yet"
    place = checkpoints.path(step)
    if step < bad_step - 1:
        return f"the last good one is {place}"
    return f"{place} has the numbers that gave it: remove it to continue from an earlier state"


@contextlib.contextmanager
def explained(config: Config, seeds: Sequence[int] | None) -> Iterator[None]:
    """Turns JAX's errors for too little memory, and for a lost process, into `RunFailed`."""
    load = f"at batch_size {config.batch_size}"
    smaller = f"--config.batch_size={max(config.batch_size // 2, 1)}"
    if seeds is not None and len(seeds) > 1:
        load, smaller = f"{load} with {len(seeds)} seeds", f"--together={len(seeds) // 2}"
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            if jax.process_count() == 1:
                raise
            raise RunFailed(
                "another process of the job is gone, or cannot be reached "
                f"({str(error).splitlines()[0][:200]}); "
                "start the job again to continue from its last checkpoint"
            ) from error
        raise NotTrainable(f"the device ran out of memory {load}; try {smaller}") from error
