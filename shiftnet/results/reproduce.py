"""Trains the rows of the results' tables, several seeds at a time, and keeps what came out."""

import contextlib
import dataclasses
import datetime
import fcntl
import fnmatch
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import shiftnet.data
from shiftnet import checkpoint, models, packing, results, tables
from shiftnet import config as config_lib
from shiftnet.checkpoint import BEST, DIGESTS, LATEST
from shiftnet.config import Config, DataConfig
from shiftnet.data import Dataset
from shiftnet.errors import RunFailed, UserError, say
from shiftnet.files import sha256_of
from shiftnet.inference import Classifier
from shiftnet.planning.plan import CHIPS, TRAINING_IMAGES
from shiftnet.tensor_file import SUFFIX
from shiftnet.training import environment, metrics
from shiftnet.training.deadline import Deadline
from shiftnet.training.engine import Outcome, train
from shiftnet.training.evaluation import make_evaluator
from shiftnet.training.mesh import make_mesh
from shiftnet.training.workdir import InUse, lock

# The dtype of what is not low-bit in the networks that are kept.
REST = "float16"
SHORT = "smoke"
# Where networks of more bytes go, which are too large to be kept in a repository.
LARGE, LARGE_BYTES = "large", 5_000_000
# Where networks are that can be trained further.
TRAINABLE = "trainable"
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "digits": 355, "imagenet2012": 50_000}
# A state is saved at the end of an epoch when this many seconds have passed since it was last.
SAVE_EVERY = 120.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train, and where.

    Attributes:
      results: the folder of results, with its table.
      workdir: for what is not finished.
      data_dir: where the data sets are; empty: as in training.
      pattern: the names of rows or tables, with wildcards.
      seeds: of each row.
      together: seeds to train in one program; None: all, but one on a CPU, which gains nothing.
      epochs: schedules are shortened to that many, and their results kept apart; None: they are
        not.
      recipe: another recipe for every row, one of `CIFAR_RECIPES`; its results are kept in the
        folder of that name, and count after the last epoch; empty: each row's own.
    """

    results: Path = Path("results")
    workdir: Path = Path("runs/reproduce")
    data_dir: str = ""
    pattern: str = "*"
    seeds: int = 1
    together: int | None = None
    epochs: int | None = None
    recipe: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A row and what is left to do of it.

    Attributes:
      row: as in its table.
      epoch: its table's, the `"best"` or the `"final"`.
      config: the row's recipe, or another one where that was asked for; shortened likewise.
      full_epochs: those of the row's own recipe.
      recipe: the name of the other one, or nothing.
      folder: where its result goes.
      result: what there is of it, as `shiftnet.results` has it, or None.
      stale: what differs where the result that is there is of another recipe, which is then left
        alone: there is no `result` and nothing to do.
      groups: the seeds that are missing, those together that are trained together, and where; first
        those that were begun.
    """

    row: results.Row
    epoch: str
    config: Config
    full_epochs: int
    recipe: str
    folder: Path
    result: dict[str, Any] | None
    stale: Sequence[str]
    groups: Sequence[tuple[list[int], Path]]

    @property
    def cost(self) -> float:
        """Multiply-adds of what is left of the missing seeds, three times the forward passes'."""
        left = (len(seeds) * (1 - done / self.config.epochs) for seeds, done in self.epochs_done)
        return sum(left) * _images(self.config) * 3.0 * self.row.multiply_adds

    @property
    def epochs_done(self) -> list[tuple[list[int], int]]:
        """Each group's seeds, and the epochs that they have behind them."""
        found = []
        for seeds, place in self.groups:
            lines, *_ = metrics.read_sound(place / f"seed{seeds[0]}")
            found.append((seeds, max((line["epoch"] for line in lines), default=0)))
        return found


def run(options: Options, deadline: Deadline, *, cheapest_first: bool = False) -> int:
    """Trains what is missing; returns the exit code.

    Args:
      options: what.
      deadline: when to stop and save.
      cheapest_first: in the order of their cost, and only those that fit the deadline.
    """
    failed, too_long = 0, 0
    jobs = list(find(options))
    for job in jobs:
        if job.stale:
            path = results.path_of(job.folder, job.row.name)
            failed = say(
                f"{path} is of another recipe, with {'; '.join(job.stale)}: "
                "move it away to train the row anew",
                2,
            )
    missing = [job for job in jobs if job.groups]
    if cheapest_first:
        missing.sort(key=lambda job: job.cost)
    if not missing and not failed:
        print("nothing is missing of what was asked for")
    for job in missing:
        seconds = _estimate(job, jobs) if cheapest_first else None
        if seconds is not None and seconds > deadline.left:
            if not too_long:  # many may be
                about = tables.duration(seconds)
                print(f"{job.row.name} would take about {about}: it does not fit", flush=True)
            too_long += 1
            continue
        try:
            ended = _train_row(job, options, deadline)
        except RunFailed as error:  # the next row may go well
            failed = say(f"{job.row.name}: {error}", 1)
        else:
            if ended is not None:
                return ended or failed
        jobs = list(find(options))
    if too_long > 1:
        print(f"{too_long - 1} more rows do not fit")
    return failed


def shorten(config: Config, epochs: int) -> None:
    """Shortens a recipe's schedule: steps and warm-up of the rate move along, restarts stay."""
    full, config.epochs = config.epochs, min(epochs, config.epochs)
    config.schedule.warmup *= config.epochs / full
    boundaries = config.schedule.boundaries
    if config.schedule.name == "step":
        boundaries = tuple(round(boundary * config.epochs / full) for boundary in boundaries)
    inside = {boundary for boundary in boundaries if 0 < boundary < config.epochs}
    config.schedule.boundaries = tuple(sorted(inside))
    config_lib.validate(config)


def find(options: Options) -> Iterator[Job]:
    """Finds the rows that the options name, and what is left to do of each.

    Raises:
      UserError: where there are none, or a file is damaged.
    """
    folder, pattern = options.results, options.pattern
    chosen = [
        (table, row)
        for table in results.tables(folder)
        for row in table.rows
        if any(fnmatch.fnmatchcase(name, pattern) for name in (row.name, table.name))
    ]
    if not chosen:
        raise UserError(f"no row and no table of {folder / results.TABLE} matches {pattern!r}")
    for table, row in chosen:
        config = config_lib.load(row.recipe)
        full_epochs, epoch = config.epochs, table.epoch
        if options.recipe:
            config, epoch = _by_recipe(row, options.recipe), "final"
        epochs = config.epochs
        if options.epochs is not None:
            shorten(config, options.epochs)
        parts = (options.recipe, SHORT if config.epochs < epochs else "")
        apart = "-".join(part for part in parts if part)
        result, stale = results.read(folder / apart, row.name), []
        if result is not None:
            try:
                before = config_lib.from_json(json.dumps(result["config"]))
            except UserError as error:
                path = results.path_of(folder / apart, row.name)
                raise UserError(f"{path} is damaged: in config {error}") from error
            ignored = ("seed", *config_lib.IMMATERIAL)
            stale = config_lib.differences(before, config, ignore=ignored)
        if stale:
            result, missing = None, []
        else:
            done = _seeds_of(result)
            missing = [seed for seed in range(options.seeds) if seed not in done]
        workdir = options.workdir / apart
        begun = row.init and not options.recipe
        together = 1 if begun else options.together  # a program starts from one network
        groups = list(_groups(row, missing, together, workdir))
        yield Job(
            row=row,
            epoch=epoch,
            config=config,
            full_epochs=full_epochs,
            recipe=options.recipe,
            folder=folder / apart,
            result=result,
            stale=stale,
            groups=groups,
        )


def _by_recipe(row: results.Row, recipe: str) -> Config:
    """Returns a row's network with the settings of another recipe."""
    file, argument = config_lib.split_recipe(row.recipe)
    return config_lib.load(f"{file}:{','.join(filter(None, (argument, f'recipe={recipe}')))}")


def _groups(
    row: results.Row, missing: Sequence[int], together: int | None, folder: Path
) -> Iterator[tuple[list[int], Path]]:
    """Divides seeds into groups to train together, each with its place; first those begun so.

    `together` is how many, None for what suits the device; larger groups are not continued.
    """
    left = set(missing)
    for place in sorted(folder.glob(f"{row.name}_seeds*")):
        numbers = place.name.removeprefix(f"{row.name}_seeds").split("-")
        if not all(number.isdecimal() for number in numbers) or not _begun(place):
            continue
        seeds = [int(number) for number in numbers]
        if left.issuperset(seeds) and len(seeds) <= (together or len(seeds)):
            yield seeds, place
            left.difference_update(seeds)
    rest = sorted(left)
    # Several in one program gain nothing on a CPU.
    size = together or (1 if jax.default_backend() == "cpu" else max(len(rest), 1))
    for first in range(0, len(rest), size):
        seeds = rest[first : first + size]
        yield seeds, folder / f"{row.name}_seeds{'-'.join(map(str, seeds))}"


def _begun(place: Path) -> bool:
    """Whether there is something to continue."""
    return any(place.glob(f"{LATEST}/*/{DIGESTS}"))


def _images(config: Config) -> float:
    """Images that a whole training sees; infinite where the size of the set is not known."""
    return config.epochs * TRAINING_IMAGES.get(config.data.name, math.inf)


def _train_row(job: Job, options: Options, deadline: Deadline) -> int | None:
    """Trains the missing seeds of a row; the exit code where that ends the command, else None."""
    for seeds, workdir in job.groups:
        if deadline.left_for_another <= 0:
            print("no time is left")
            return 0
        try:
            with _alone_with(workdir):
                # Another process may have finished them since they were looked up.
                if set(seeds) <= set(_seeds_of(results.read(job.folder, job.row.name))):
                    continue
                outcome = _train(job, seeds, workdir, options, deadline)
        except InUse as error:
            print(f"{job.row.name}, seeds {_names(seeds)}, left out: {error}", flush=True)
            continue
        if not outcome.finished and outcome.step:
            print(
                f"{job.row.name}: stopped after step {outcome.step}, saved in {workdir}; "
                "the same command continues it"
            )
        elif not outcome.finished:
            print(f"{job.row.name}: stopped before its first step, nothing is saved")
        if outcome.signal:
            return 128 + outcome.signal
        if not outcome.finished:
            return 0
    return None


@contextlib.contextmanager
def _alone_with(workdir: Path) -> Iterator[None]:
    """Keeps other processes from these seeds until their result is written.

    Raises:
      InUse: where another process is training them.
    """
    path = workdir.with_name(f"{workdir.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path, workdir):
        try:
            yield
        finally:
            path.unlink()  # who has opened it by now finds the result, or the run's own lock


def _names(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _seeds_of(result: Mapping[str, Any] | None) -> list[int]:
    return [run["seed"] for run in result["runs"]] if result else []


def _train(
    job: Job, seeds: Sequence[int], workdir: Path, options: Options, deadline: Deadline
) -> Outcome:
    """Trains some seeds of a row, or continues that; keeps the result if they are finished."""
    job.config.data.dir = options.data_dir
    dataset = shiftnet.data.of_recipe(job.config.data)
    job.config.data.dir = ""  # of this machine alone
    check_size(job.row.name, job.config.data, dataset)
    start = "" if job.recipe else job.row.init  # which belongs to the row's own recipe
    teacher = job.config.distill.teacher
    init = _network(start, options, "starts from", trainable=True) if start else None
    of_teacher = _network(teacher, options, "learns from") if teacher else Path()
    print(f"{job.row.name}, seeds {_names(seeds)}, in {workdir}", flush=True)
    outcome = train(
        job.config,
        workdir,
        init=init,
        seeds=seeds,
        dataset=dataset,
        deadline=deadline,
        save_seconds=SAVE_EVERY,
        session=environment.describe(),
        find=lambda *_: of_teacher,
    )
    if outcome.finished:
        with _locked(options.results):
            # Other seeds of the row may have been finished since it was looked up.
            before = results.read(job.folder, job.row.name)
            result = _result(job, before, seeds, outcome, dataset, workdir)
            result["init"] = init and {"network": start, "sha256": sha256_of(init)}
            if teacher:
                result["teacher"] = {"network": teacher, "sha256": sha256_of(of_teacher)}
            results.write(job.folder, result)
        shutil.rmtree(workdir)  # all that it is good for is in the results
        print(_summary(job, result), flush=True)
    return outcome


def _network(name: str, options: Options, what: str, *, trainable: bool = False) -> Path:
    """Returns the file of a row's network, or the one that can be trained further.

    Args:
      name: of the network, as `shiftnet.load` takes it.
      options: with the folder of results.
      what: what another row does with it, for the error.
      trainable: which of its files.

    Raises:
      RunFailed: where there is no such network yet.
    """
    for _, row, stand_in, known in results.networks(options.results):
        if known == name:
            folder = options.results / stand_in
            kept = (results.read(folder, row.name) or {}).get("checkpoint") or {}
            path = folder / (kept.get("trainable", {}) if trainable else kept).get("file", "")
            if path.is_file():
                return path
    kind = "trainable network" if trainable else "network"
    raise RunFailed(f"it {what} {name}, of which there is no {kind} yet; train that first")


def check_size(row: str, data: DataConfig, dataset: Dataset) -> None:
    """Checks that a data set has as many images as the one that a row is about.

    Raises:
      UserError: where it has not.
    """
    if data.source == "folder":
        return
    training = TRAINING_IMAGES.get(data.name, sum(dataset.images.values()) - len(dataset.test))
    expected = {
        "training": training - shiftnet.data.num_validation(data.name, training, data.validation),
        "test": TEST_IMAGES.get(data.name, len(dataset.test)),
    }
    for part, found in (("training", len(dataset.train)), ("test", len(dataset.test))):
        if found != expected[part]:
            raise UserError(
                f"{row} needs {data.name} with {expected[part]} {part} images, found {found}"
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from changing a folder's results within; waits for them before."""
    with (folder / results.TABLE).open("a") as file:  # nothing is written to it
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _result(
    job: Job,
    before: Mapping[str, Any] | None,
    seeds: Sequence[int],
    outcome: Outcome,
    dataset: Dataset,
    workdir: Path,
) -> dict[str, Any]:
    """Joins what there was of a row's result and the runs that have just finished.

    Raises:
      RunFailed: where a damaged checkpoint took the best network with it.
    """
    bests = [best for best in outcome.best if best is not None]
    if len(bests) < len(seeds):
        raise RunFailed(f"the best network in {workdir} is lost; remove it to train the seeds anew")
    last, earlier = outcome.sessions[-1], outcome.sessions[:-1]
    lines = [
        [{k: v for k, v in line.items() if k != "time"} for line in metrics.read(folder)]
        for folder in (workdir / f"seed{seed}" for seed in seeds)
    ]
    rate = statistics.median(line["images_per_second"] for line in lines[0])
    made = {
        "together": len(seeds),
        "seconds": round(outcome.seconds, 1),
        "images_per_second": round(rate, 1),
        "fraction_of_peak": _fraction_of_peak(job, outcome, rate),
        **last,
        "earlier": earlier,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    runs = [
        {
            "seed": seed,
            "final_accuracy": own[-1]["test_accuracy"],
            "best_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            **made,
            "epochs": own,
        }
        for seed, own, best in zip(seeds, lines, bests, strict=True)
    ]
    old = before or {"runs": [], "checkpoint": None}
    others = [run for run in old["runs"] if run["seed"] not in seeds]
    return {
        "row": job.row.name,
        "recipe": job.recipe,
        "config": job.config.to_dict(),
        "class_names": dataset.class_names,
        "epochs": job.config.epochs,
        "full_epochs": job.full_epochs,
        "parameters": job.row.parameters,
        "multiply_adds": job.row.multiply_adds,
        "bytes": job.row.bytes,
        "runs": sorted([*others, *runs], key=lambda run: run["seed"]),
        "checkpoint": old["checkpoint"] or _keep(job, seeds[0], outcome, dataset, workdir),
    }


def _keep(job: Job, seed: int, outcome: Outcome, dataset: Dataset, workdir: Path) -> dict[str, Any]:
    """Writes the first seed's network beside the result, and evaluates what was written."""
    name = f"{job.row.name}{SUFFIX}"
    network, metadata, epoch = outcome.network, outcome.metadata, job.config.epochs
    if job.epoch == "best":
        best = Classifier.load(workdir / BEST)
        network, metadata = best.network, best.metadata
        epoch = metadata["step"] * epoch // outcome.step
    assert network is not None
    states = nnx.split(network, nnx.Param, nnx.BatchStat)[1:]
    note = {key: metadata[key] for key in packing.NOTE}
    trainable = _written(
        job.folder,
        f"{TRAINABLE}/{name}",
        lambda path: checkpoint.write_file(path, checkpoint.to_arrays(*states), note),
    )
    packed = _written(job.folder, name, lambda path: packing.write(path, network, note, REST))
    found = _evaluated(job.folder / packed["file"], dataset)
    return {**packed, "seed": seed, "epoch": epoch, **found, "trainable": trainable}


def _written(folder: Path, name: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Writes a file where its size belongs; returns what a result says of it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    if path.stat().st_size > LARGE_BYTES:
        elsewhere = folder / LARGE / name
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        path = path.replace(elsewhere)
    return {"file": path.relative_to(folder).as_posix(), **_identity(path)}


def _identity(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _evaluated(path: Path, dataset: Dataset) -> dict[str, Any]:
    """Evaluates a packed file on one device, with products in float32."""
    model = Classifier.load(path)
    with jax.default_matmul_precision("float32"):
        evaluation = make_evaluator(
            model.graphdef,
            dataset.test,
            model.config.data,
            mean=model.mean,
            std=model.std,
            batch_size=model.config.eval.batch_size,
            mesh=make_mesh(devices=jax.local_devices()[:1]),
        )(model.params, model.stats)
    return {
        "test_accuracy": evaluation.top1,
        "device": environment.device(),
        "confusion": evaluation.confusion(),
    }


def reevaluate(options: Options) -> int:
    """Evaluates the networks of finished rows again, and writes what is found into their results.

    Returns:
      The exit code.
    """
    failed = 0
    for job in find(options):
        if job.result is None:
            continue
        kept = job.result.get("checkpoint")
        if kept is None:
            failed = say(f"{job.row.name}: its result has no network", 1)
            continue
        path = job.folder / kept["file"]
        if not path.is_file():
            failed = say(f"{job.row.name}: {path} does not exist", 1)
            continue
        job.config.data.dir = options.data_dir
        dataset = shiftnet.data.of_recipe(job.config.data)
        check_size(job.row.name, job.config.data, dataset)
        found = {**_identity(path), **_evaluated(path, dataset)}
        with _locked(options.results):
            result = results.read(job.folder, job.row.name)
            assert result is not None
            result["checkpoint"] = {**result["checkpoint"], **found}
            results.write(job.folder, result)
        before, after = kept.get("test_accuracy"), found["test_accuracy"]
        change = "" if before in (None, after) else f", where its file had {before:.2%}"
        print(f"{job.row.name}: {after:.2%}{change}", flush=True)
    return failed


def _fraction_of_peak(job: Job, outcome: Outcome, rate: float) -> float | None:
    chip = next((c for c in CHIPS.values() if c.kind == jax.local_devices()[0].device_kind), None)
    if chip is None or len({one["device"] for one in outcome.sessions}) > 1:
        return None
    flops = 2 * 3 * job.row.multiply_adds * rate
    return round(flops / chip.flops[job.config.model.dtype], 4)


def _estimate(job: Job, jobs: Sequence[Job]) -> float | None:
    """Seconds that the missing seeds would take, by the results of this device.

    By those of the same family of networks where there are any, or else by the slowest; None where
    there are none at all.
    """
    rates: dict[str, list[float]] = {}  # multiply-adds a second, by family
    for other in jobs:
        for run in other.result["runs"] if other.result else ():
            if results.devices(run) == [environment.device()]:
                cost = 3.0 * other.row.multiply_adds * _images(other.config) * run["together"]
                rates.setdefault(_family(other), []).append(cost / run["seconds"])
    if not rates:
        return None
    slowest = min(min(values) for values in rates.values())
    return job.cost / min(rates.get(_family(job), [slowest]))


def _family(job: Job) -> str:
    return f"{models.parse_arch(job.config.model.arch)[0]} {job.config.model.weights}"


def table(jobs: Sequence[Job], seeds: int) -> str:
    """Lists rows with what there is and what is left to do of each, for `seeds` seeds of each."""
    rows: list[tuple[object, ...]] = [
        ("row", "parameters", "reported", "ours", "seeds", "state", "to do")
    ]
    for job in jobs:
        values = results.accuracies(job.result, job.epoch) if job.result else []
        seconds = _estimate(job, jobs) if job.groups else None
        rows.append(
            (
                job.row.name,
                job.row.parameters,
                "" if job.row.reported is None else f"{job.row.reported:.2f}",
                results.mean_and_spread(values) if values else "",
                f"{len(values)} of {max(seeds, len(values))}",
                _state(job),
                "" if seconds is None else f"about {tables.duration(seconds)}",
            )
        )
    return tables.aligned(rows)


def _state(job: Job) -> str:
    if job.stale:
        return "another recipe's"
    if not job.groups:
        return "done"
    if not any(_begun(place) for _, place in job.groups):
        return "missing"
    done = max(done for _, done in job.epochs_done)
    return f"running, {done} of {job.config.epochs} epochs"


def _summary(job: Job, result: Mapping[str, Any]) -> str:
    """Puts a row's result into one line."""
    values = results.accuracies(result, job.epoch)
    parts = [
        f"{job.row.name}: {results.mean_and_spread(values)} % ({job.epoch} epoch, "
        f"{len(values)} seed{'s' if len(values) > 1 else ''})"
    ]
    if job.recipe:
        parts.append(f"by the {job.recipe} recipe")
    if result["epochs"] < result["full_epochs"]:
        parts.append(f"on {result['epochs']} of {result['full_epochs']} epochs")
    elif job.row.reported is not None:
        parts.append(f"reported {job.row.reported:.2f} %")
    kept = result["checkpoint"]
    parts.append(
        f"{job.folder / kept['file']} has {kept['test_accuracy']:.2%} in {kept['bytes']:,} bytes"
    )
    return ", ".join(parts)
