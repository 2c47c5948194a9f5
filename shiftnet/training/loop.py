"""The training loop: a recipe and a working directory in, a trained network and its numbers out."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import shiftnet.config
import shiftnet.data
import shiftnet.models
from shiftnet.checkpoint import BEST, LATEST, Series, from_arrays, read, to_arrays
from shiftnet.data import Dataset
from shiftnet.errors import RunFailed, UserError
from shiftnet.training import low_bit
from shiftnet.training.evaluation import Evaluator, make_evaluator
from shiftnet.training.feed import make_feed
from shiftnet.training.interrupt import Interrupt
from shiftnet.training.low_bit import Codes, LevelWatch
from shiftnet.training.mesh import make_mesh, replicated
from shiftnet.training.metrics import MetricsLog, Tally
from shiftnet.training.profile import Profile
from shiftnet.training.progress import Progress
from shiftnet.training.schedules import learning_rates
from shiftnet.training.step import Program, TrainState
from shiftnet.training.times import Times
from shiftnet.training.workdir import claimed


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
      finished: False where it was interrupted; training again in the same place continues it.
      step: steps taken.
      final: top-1 accuracy on the test set after the last epoch, a fraction; None if unfinished.
      best: of the epoch with the highest accuracy so far, `{"epoch", "accuracy", "test_accuracy"}`
        (fractions); None before the first evaluation.
      chosen_on: `"test"` or `"validation"`, the images that `best` was chosen on.
      weights: the table of the network's weights, where some have few bits; None elsewhere.
      signal: the number of the signal that interrupted it, 0 for none.
    """

    finished: bool
    step: int
    final: float | None
    best: Mapping[str, Any] | None
    chosen_on: str
    weights: str | None = None
    signal: int = 0


def train(
    config: Any, workdir: str | Path, *, init: str | Path | None = None, profile: bool = False
) -> Summary:
    """Trains, or continues the run that `workdir` holds.

    Every process of a `jax.distributed` job calls this with the same arguments; the first one
    writes and prints. Each epoch leaves out the images that do not fill a last batch.

    Args:
      config: a validated recipe.
      workdir: where checkpoints, metrics and the recipe go; made where it is missing.
      init: a checkpoint to take parameters and running statistics from, see `start_from`; a run
        that is continued does not look at it.
      profile: write a trace of a few steps, see `Profile`.

    Raises:
      UserError: for a recipe that cannot be trained, one that differs from the run's, or an `init`
        that does not fit.
      RunFailed: where the loss is not finite, the device's memory is too small, a checkpoint
        cannot be written, or another process of the job is gone.
    """
    smaller = f"--config.batch_size={max(config.batch_size // 2, 1)}"
    with (
        explained(f"at batch_size {config.batch_size}", smaller),
        Times() as times,
        contextlib.ExitStack() as stack,
    ):
        return _train(config, Path(workdir), init, profile, times, stack)


def _train(
    config: Any,
    workdir: Path,
    init: str | Path | None,
    profile: bool,
    times: Times,
    stack: contextlib.ExitStack,
) -> Summary:
    shiftnet.models.check(config.model)  # before a data set is downloaded for it
    mesh = make_mesh(config.batch_size)
    dataset = shiftnet.data.of_recipe(config.data)
    num_examples = len(dataset.train)
    steps_per_epoch = num_examples // config.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"batch_size {config.batch_size} is more than the {num_examples} training images"
        )
    total_steps = config.epochs * steps_per_epoch
    program = Program(
        config,
        num_classes=len(dataset.class_names),
        mean=dataset.mean,
        std=dataset.std,
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
    )
    stack.enter_context(claimed(workdir, config))
    series = Series(workdir / LATEST, config.checkpoint.keep)
    best_series = Series(workdir / BEST)
    is_main = jax.process_index() == 0
    progress = Progress(
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        batch_size=config.batch_size,
        every_seconds=config.log.every_seconds,
        on=is_main,
    )

    watch = LevelWatch(program)
    state, codes, note, skipped = restore_or_init(program, watch, series, config, dataset, mesh)
    step: int = note["step"]
    if step < total_steps:
        note["final"] = None  # of a run that was shorter
    metrics_log = MetricsLog(workdir, step=step, tensorboard=config.log.tensorboard, on=is_main)
    progress.line(describe(config, dataset, state, steps_per_epoch, mesh))
    if init is not None and not step:
        state, told = start_from(state, init, len(dataset.class_names), mesh)
        codes = watch.codes(state.params, state.stats)
        progress.line(told)
    for sentence in skipped:
        progress.line(sentence)
    if step:
        progress.line(f"continuing after step {step}, from {series.path(step)}")

    feed = make_feed(
        config,
        program,
        dataset.train,
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
        state=note["feed"],
        times=times,
    )
    evaluators = make_evaluators(config, program, dataset, mesh)
    chosen_on = next(iter(evaluators))
    lrs = learning_rates(config)
    tally = Tally(config.batch_size, note["tally"])
    epoch_began = (times.clock(), step)

    def save() -> None:
        note.update(step=step, tally=tally.sums(), feed=feed.get_state())
        model = to_arrays(state.params, state.stats)
        levels = {"levels": codes} if watch else {}
        with times.on("checkpoints"):
            series.save(step, note, model=model, optimizer=state.opt_state, **levels)

    signal = 0
    profiled = Profile(workdir, on=profile and is_main)
    with contextlib.closing(feed), contextlib.closing(profiled), Interrupt() as interrupt:
        while step < total_steps:
            epoch, before_step = step // steps_per_epoch, step
            state, losses, corrects = feed.advance(state, step)
            step += len(losses)
            profiled.step(losses)
            # This waits for the call before, so that the device has the next one meanwhile.
            tally.push(step, losses, corrects)
            progress.step(step, tally.loss, tally.accuracy)
            signal = interrupt.requested()
            epoch_ends = step % steps_per_epoch == 0
            between = config.checkpoint.every_steps
            save_now = bool(signal) or (between and step // between > before_step // between)
            if epoch_ends or save_now:
                tally.settle()
            if tally.bad_step is not None:
                raise RunFailed(diverged(tally, lrs[epoch], series))

            if epoch_ends:
                epoch += 1
                began, first = epoch_began
                metrics = {
                    "step": step,
                    "epoch": epoch,
                    "lr": float(lrs[epoch - 1]),
                    "train_loss": tally.loss,
                    "train_accuracy": tally.accuracy,
                    "images_per_second": (step - first)
                    * config.batch_size
                    / (times.clock() - began),
                }
                tally = Tally(config.batch_size)
                if skipped := feed.skipped():
                    metrics["train_skipped"] = len(skipped)
                    report_skipped(progress, "training", skipped)
                if watch:
                    before, codes = codes, watch.codes(state.params, state.stats)
                    metrics["weights"] = watch.metrics(before, codes)
                if epoch % config.eval.every_epochs == 0 or step == total_steps:
                    for name, evaluator in evaluators.items():
                        with times.on("evaluation"):
                            evaluation = evaluator(state.params, state.stats)
                        metrics |= evaluation.metrics(name)
                        report_skipped(progress, name, evaluation.skipped)
                        if name == "test":
                            metrics_log.write_confusion(
                                step, epoch, dataset.class_names, evaluation.confusion()
                            )
                    accuracy = metrics[f"{chosen_on}_accuracy"]
                    note["final"] = metrics["test_accuracy"] if step == total_steps else None
                    if note["best"] is None or accuracy > note["best"]["accuracy"]:
                        note["best"] = {
                            "epoch": epoch,
                            "accuracy": accuracy,
                            "test_accuracy": metrics["test_accuracy"],
                        }
                        best_note = {**note, "step": step}
                        with times.on("checkpoints"):
                            best_series.save(
                                step, best_note, model=to_arrays(state.params, state.stats)
                            )
                metrics["time"] = times.fractions()
                metrics_log.write(metrics)
                progress.line(epoch_line(metrics, config.epochs))
            if (epoch_ends and epoch % config.checkpoint.every_epochs == 0) or (
                save_now or step == total_steps
            ):
                save()
            if epoch_ends:
                progress.pause()
                epoch_began = (times.clock(), step)
            if signal:
                break

    with times.on("checkpoints"):
        series.close()
        best_series.close()
    metrics_log.close()
    progress.line(times.sentence())
    weights = None
    if watch:
        zeros = {name: share["zeros"] for name, share in watch.metrics(codes, codes).items()}
        weights = low_bit.table(nnx.merge(program.graphdef, state.params, state.stats), zeros)
    finished = step >= total_steps
    return Summary(finished, step, note["final"], note["best"], chosen_on, weights, signal)


def restore_or_init(
    program: Program,
    watch: LevelWatch,
    series: Series,
    config: Any,
    dataset: Dataset,
    mesh: Mesh,
) -> tuple[TrainState, Codes, dict[str, Any], list[str]]:
    """The newest good checkpoint's state, the levels at its last epoch's end, its note; or fresh.

    Last, a sentence on each checkpoint that was skipped.
    """
    seed = np.uint32(config.seed)
    step, skipped = series.newest_good()
    note = {
        "config": shiftnet.config.to_json(config),
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }
    if step is None:
        state = program.init(seed)
        codes = watch.codes(state.params, state.stats)
        start: dict[str, Any] = {"step": 0, "tally": None, "feed": {}, "best": None, "final": None}
        return state, codes, {**note, **start}, skipped
    like = program.init.eval_shape(seed)  # with its shardings
    levels = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(watch.codes, like.params, like.stats),
    )
    parts, saved = series.restore(
        step,
        model=to_arrays(like.params, like.stats),
        optimizer=like.opt_state,
        **({"levels": levels} if watch else {}),
    )
    source = series.path(step)
    state = TrainState(
        step=jax.device_put(jnp.int32(step), replicated(mesh)),
        params=from_arrays(like.params, parts["model"], source),
        stats=from_arrays(like.stats, parts["model"], source),
        opt_state=parts["optimizer"],
    )
    return state, parts.get("levels", {}), {**saved, **note}, skipped


def start_from(
    state: TrainState, init: str | Path, num_classes: int, mesh: Mesh
) -> tuple[TrainState, str]:
    """A fresh state with the numbers of a checkpoint, and a sentence on what was taken.

    Arrays that the checkpoint lacks, such as the latents of another form of weights, stay as they
    were drawn; so do those of the last layer where the classes differ in number.

    Raises:
      UserError: where the checkpoint has none of the arrays, or one of another shape.
    """
    saved = read(init)
    classes = len(saved.note["class_names"])
    own = to_arrays(state.params, state.stats)
    taken, fresh = {}, []
    for name, array in own.items():
        other = saved.arrays.get(name)
        if other is None:
            fresh.append(name)
        elif other.shape == array.shape:
            taken[name] = jax.device_put(np.asarray(other), array.sharding)
        elif (classes, num_classes) == (other.shape[-1], array.shape[-1]):
            fresh.append(name)
        else:
            raise UserError(
                f"{saved.path}: {name!r} has shape {other.shape}, the network needs {array.shape}"
            )
    if not taken:
        raise UserError(f"{saved.path} has none of the network's arrays")
    arrays = own | taken
    state = dataclasses.replace(
        state,
        params=from_arrays(state.params, arrays, saved.path),
        stats=from_arrays(state.stats, arrays, saved.path),
    )
    told = f"started from {saved.path}: {len(taken)} arrays taken"
    return state, f"{told}; fresh: {', '.join(fresh)}" if fresh else told


def make_evaluators(
    config: Any, program: Program, dataset: Dataset, mesh: Mesh
) -> dict[str, Evaluator]:
    """One for each held-out set; the first chooses the best epoch."""
    splits = {"validation": dataset.validation, "test": dataset.test}
    return {
        name: make_evaluator(
            program.graphdef,
            split,
            config.data,
            mean=dataset.mean,
            std=dataset.std,
            batch_size=config.eval.batch_size,
            mesh=mesh,
        )
        for name, split in splits.items()
        if split is not None
    }


def report_skipped(progress: Progress, which: str, names: Sequence[str]) -> None:
    """Names the files that could not be decoded, if there are any."""
    if names:
        progress.line(f"skipped {len(names)} corrupt {which} files: {', '.join(names)}")


def describe(
    config: Any, dataset: Dataset, state: TrainState, steps_per_epoch: int, mesh: Mesh
) -> str:
    """What is about to be trained, on what."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    count = len(dataset.train)
    device = mesh.devices.flat[0].device_kind
    return (
        f"{config.model.arch} on {dataset.name}: {parameters} parameters, {count} training images "
        f"in {steps_per_epoch} steps of {config.batch_size} "
        f"({count - steps_per_epoch * config.batch_size} left out each epoch), "
        f"{mesh.size} x {device}"
    )


def epoch_line(metrics: Mapping[str, float], epochs: int) -> str:
    """An epoch's numbers in one line."""
    parts = [
        f"epoch {metrics['epoch']}/{epochs}",
        f"lr {metrics['lr']:g}",
        f"train loss {metrics['train_loss']:.4f} accuracy {metrics['train_accuracy']:.2%}",
    ]
    parts += [
        f"{name} loss {metrics[f'{name}_loss']:.4f} accuracy {metrics[f'{name}_accuracy']:.2%}"
        for name in ("validation", "test")
        if f"{name}_loss" in metrics
    ]
    return "  ".join([*parts, f"{metrics['images_per_second']:.0f} images/s"])


def diverged(tally: Tally, lr: float, series: Series) -> str:
    """The sentence for a loss that is not finite."""
    series.close()
    last, _ = series.newest_good()
    good = (
        "there is no checkpoint yet"
        if last is None
        else f"the last good one is {series.path(last)}"
    )
    return (
        f"the loss became {tally.bad_loss} at step {tally.bad_step} (learning rate {lr:g}); {good}"
    )


@contextlib.contextmanager
def explained(load: str, smaller: str) -> Iterator[None]:
    """Turns JAX's errors for too little memory, and for a lost process, into sentences.

    Args:
      load: what the device holds.
      smaller: the option that makes that less.
    """
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
        raise RunFailed(f"the device ran out of memory {load}; try {smaller}") from error
