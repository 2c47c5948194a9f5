"""Trains the rows of the results' tables, several seeds at a time, and keeps what came out.

Without --only and --next it lists the rows and trains nothing. A row that was stopped, by --budget
or Ctrl-C, goes on exactly where it was when it is chosen again.
"""

import dataclasses
import datetime
import fnmatch
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import shiftnet.data
from shiftnet import config as config_lib
from shiftnet import models, packing, results, tables
from shiftnet.checkpoint import DIGESTS, LATEST
from shiftnet.data import Dataset
from shiftnet.errors import RunFailed, UserError, reported, say
from shiftnet.inference import Classifier
from shiftnet.planning.plan import CHIPS, TRAINING_IMAGES
from shiftnet.training import metrics
from shiftnet.training.evaluation import make_evaluator
from shiftnet.training.mesh import make_mesh
from shiftnet.training.processes import use_compilation_cache
from shiftnet.training.together import Deadline, Outcome, train_together

MOST_SEEDS = 1000
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The dtype of what is not low-bit in the networks that are kept.
REST = "float16"
SHORT = "smoke"
# Where networks of more bytes go, which are too large to be kept in a repository.
LARGE, LARGE_BYTES = "large", 5_000_000


@dataclasses.dataclass(frozen=True)
class Work:
    """A row and what is left to do of it.

    Attributes:
      row: as in its table.
      epoch: its table's, the `"best"` or the `"final"`.
      config: the row's recipe, shortened where that was asked for.
      full_epochs: that the recipe has when it is not.
      folder: where its result goes.
      result: what there is of it, as `shiftnet.results` has it, or None.
      stale: what differs where the result that is there is of another recipe, which is then left
        alone: there is no `result` and nothing to do.
      groups: the seeds that are missing, those together that are trained together, and where; first
        those that were begun.
    """

    row: results.Row
    epoch: str
    config: Any
    full_epochs: int
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
        return [
            (
                seeds,
                max((line["epoch"] for line in metrics.read(place / f"seed{seeds[0]}")), default=0),
            )
            for seeds, place in self.groups
        ]


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line names; returns the exit code."""
    arguments = _arguments(argv)
    deadline, failed = Deadline(arguments.budget), 0
    use_compilation_cache()
    works = list(_works(arguments))
    if arguments.list or not (arguments.only or arguments.next):
        print(_list(works, arguments.seeds))
        if not arguments.list:
            print("\nto train some of them: --only PATTERN or --next, see --help")
        return 0
    for work in works:
        if work.stale:
            path = results.path_of(work.folder, work.row.name)
            failed = say(
                f"{path} is of another recipe, with {'; '.join(work.stale)}: "
                "move it away to train the row anew",
                2,
            )
    missing = [work for work in works if work.groups]
    if arguments.next:
        missing.sort(key=lambda work: work.cost)
    if not missing and not failed:
        print("nothing is missing of what was asked for")
    too_long = 0
    for work in missing:
        seconds = _estimate(work, works) if arguments.next else None
        if seconds is not None and seconds > deadline.left:
            if not too_long:  # many may be
                about = tables.duration(seconds)
                print(f"{work.row.name} would take about {about}: it does not fit", flush=True)
            too_long += 1
            continue
        try:
            ended = _train_row(work, arguments.data_dir, deadline)
        except RunFailed as error:  # the next row may go well
            failed = say(f"{work.row.name}: {error}", 1)
        else:
            if ended is not None:
                return ended or failed
        works = list(_works(arguments))
    if too_long > 1:
        print(f"{too_long - 1} more rows do not fit")
    return failed


def seconds_of(text: str) -> float:
    """Seconds of a time like `"90s"`, `"9m"` or `"2h"`.

    Raises:
      UserError: for another form.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smh])", text)
    if not match or not float(match[1]):
        raise UserError(f"--budget must be a time such as 90s, 9m or 2h, found {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def shorten(config: Any, epochs: int) -> None:
    """Shortens a recipe's schedule: steps of the learning rate move along, restarts stay."""
    full, config.epochs = config.epochs, min(epochs, config.epochs)
    boundaries = config.schedule.boundaries
    if config.schedule.name == "step":
        boundaries = [round(boundary * config.epochs / full) for boundary in boundaries]
    inside = {boundary for boundary in boundaries if 0 < boundary < config.epochs}
    config.schedule.boundaries = tuple(sorted(inside))
    config_lib.validate(config)


def _arguments(argv: Sequence[str] | None) -> Any:
    parser = config_lib.Parser(prog="shiftnet reproduce", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the rows, train nothing")
    parser.add_argument(
        "--only", metavar="PATTERN", help="the rows or tables of that name, e.g. 'shiftresnet20_*'"
    )
    parser.add_argument(
        "--next", action="store_true", help="the cheapest missing rows, while they fit the budget"
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="of a row (default: 1)")
    parser.add_argument(
        "--together",
        metavar="N",
        type=int,
        help="seeds to train in one program (default: all; on a CPU, which gains nothing, 1)",
    )
    parser.add_argument("--budget", metavar="TIME", help="stop and save within 90s, 9m, 2h, ...")
    parser.add_argument(
        "--epochs", metavar="N", type=int, help=f"shorten schedules; results go into {SHORT}/"
    )
    parser.add_argument("--results", metavar="DIR", default="results", help="default: results")
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        default="runs/reproduce",
        help="for what is not finished (default: runs/reproduce)",
    )
    parser.add_argument("--data-dir", metavar="DIR", default="", help="default: as in training")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "together", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    if arguments.seeds > MOST_SEEDS:
        raise UserError(f"--seeds must be at most {MOST_SEEDS}, found {arguments.seeds}")
    if arguments.only and arguments.next:
        raise UserError("--only and --next exclude each other")
    if arguments.budget is not None:
        arguments.budget = seconds_of(arguments.budget)
    return arguments


def _works(arguments: Any) -> Iterator[Work]:
    folder, pattern = Path(arguments.results), arguments.only or "*"
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
        full_epochs = config.epochs
        if arguments.epochs is not None:
            shorten(config, arguments.epochs)
        apart = SHORT if config.epochs < full_epochs else ""
        result, stale = results.read(folder / apart, row.name), []
        if result is not None:
            before = config_lib.from_json(json.dumps(result["config"]))
            ignored = ("seed", *config_lib.IMMATERIAL)
            stale = config_lib.differences(before, config, ignore=ignored)
        if stale:
            result, missing = None, []
        else:
            done = _seeds_of(result)
            missing = [seed for seed in range(arguments.seeds) if seed not in done]
        workdir = Path(arguments.workdir, apart)
        groups = list(_groups(row, missing, arguments.together, workdir))
        yield Work(row, table.epoch, config, full_epochs, folder / apart, result, stale, groups)


def _groups(
    row: results.Row, missing: Sequence[int], together: int | None, folder: Path
) -> Iterator[tuple[list[int], Path]]:
    """Seeds to train together, and where: those that were begun so, then the others.

    `together` is how many, None for what suits the device; more than that are not gone on with.
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
    """Whether there is something to go on from."""
    return any(place.glob(f"{LATEST}/*/{DIGESTS}"))


def _images(config: Any) -> float:
    """Images that a whole training sees; infinite where the size of the set is not known."""
    return config.epochs * TRAINING_IMAGES.get(config.data.name, math.inf)


def _train_row(work: Work, data_dir: str, deadline: Deadline) -> int | None:
    """Trains the missing seeds of a row; the exit code where that ends the command, else None."""
    for seeds, workdir in work.groups:
        if deadline.left_for_another <= 0:
            print("no time is left")
            return 0
        # Another process may have finished them since they were looked up.
        if set(seeds) <= set(_seeds_of(results.read(work.folder, work.row.name))):
            continue
        outcome = _train(work, seeds, workdir, data_dir, deadline)
        if not outcome.finished and outcome.step:
            print(
                f"{work.row.name}: stopped after step {outcome.step}, saved in {workdir}; "
                "the same command goes on"
            )
        elif not outcome.finished:
            print(f"{work.row.name}: stopped before its first step, nothing is saved")
        if outcome.signal:
            return 128 + outcome.signal
        if not outcome.finished:
            return 0
    return None


def _seeds_of(result: Mapping[str, Any] | None) -> list[int]:
    return [run["seed"] for run in result["runs"]] if result else []


def _train(
    work: Work, seeds: Sequence[int], workdir: Path, data_dir: str, deadline: Deadline
) -> Outcome:
    """Trains some seeds of a row, or goes on doing so; keeps the result if they are finished."""
    work.config.data.dir = data_dir
    dataset = shiftnet.data.of_recipe(work.config.data)
    work.config.data.dir = ""  # of this machine alone
    print(f"{work.row.name}, seeds {', '.join(map(str, seeds))}, in {workdir}", flush=True)
    outcome = train_together(
        *(work.config, seeds, dataset, workdir),
        keep=work.epoch,
        deadline=deadline,
        visit=_visit(),
    )
    if outcome.finished:
        # Other seeds of the row may have been finished since it was looked up.
        before = results.read(work.folder, work.row.name)
        result = _result(work, before, seeds, outcome, dataset)
        results.write(work.folder, result)
        shutil.rmtree(workdir)  # all that it is good for is in the results
        print(_told(work, result), flush=True)
    return outcome


def _result(
    work: Work,
    before: Mapping[str, Any] | None,
    seeds: Sequence[int],
    outcome: Outcome,
    dataset: Dataset,
) -> dict[str, Any]:
    """A row's result: what there was before, and the runs that have just finished."""
    last, earlier = outcome.visits[-1], outcome.visits[:-1]
    made = {
        "together": len(seeds),
        "seconds": round(outcome.seconds, 1),
        "images_per_second": round(outcome.images_per_second, 1),
        "fraction_of_peak": _fraction_of_peak(work, outcome),
        **last,
        "earlier": earlier,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    runs = [
        {
            "seed": seed,
            "final_accuracy": lines[-1]["test_accuracy"],
            "best_accuracy": best["accuracy"],
            "best_epoch": best["epoch"],
            **made,
            "epochs": lines,
        }
        for seed, lines, best in zip(seeds, outcome.lines, outcome.best, strict=True)
    ]
    old = before or {"runs": [], "checkpoint": None}
    others = [run for run in old["runs"] if run["seed"] not in seeds]
    return {
        "row": work.row.name,
        "config": work.config.to_dict(),
        "class_names": dataset.class_names,
        "epochs": work.config.epochs,
        "full_epochs": work.full_epochs,
        "parameters": work.row.parameters,
        "multiply_adds": work.row.multiply_adds,
        "bytes": work.row.bytes,
        "runs": sorted([*others, *runs], key=lambda run: run["seed"]),
        "checkpoint": old["checkpoint"] or _keep(work, seeds[0], outcome, dataset),
    }


def _keep(work: Work, seed: int, outcome: Outcome, dataset: Dataset) -> dict[str, Any]:
    """Writes the first seed's network beside the result, and evaluates what was written."""
    path = work.folder / f"{work.row.name}.safetensors"
    epoch = outcome.best[0]["epoch"] if work.epoch == "best" else work.config.epochs
    steps_per_epoch = outcome.step // work.config.epochs
    recipe = config_lib.from_json(outcome.note["config"])
    recipe.seed = seed
    note = {
        **outcome.note,
        "config": config_lib.to_json(recipe),
        "step": epoch * steps_per_epoch,
    }
    assert outcome.kept is not None
    work.folder.mkdir(parents=True, exist_ok=True)
    packing.write(path, outcome.kept, note, REST)
    if path.stat().st_size > LARGE_BYTES:
        (work.folder / LARGE).mkdir(exist_ok=True)
        path = path.replace(work.folder / LARGE / path.name)
    model = Classifier.load(path)
    evaluation = make_evaluator(
        model.graphdef,
        dataset.test,
        recipe.data,
        mean=model.mean,
        std=model.std,
        batch_size=recipe.eval.batch_size,
        mesh=make_mesh(devices=jax.local_devices()[:1]),
    )(model.params, model.stats)
    return {
        "file": path.relative_to(work.folder).as_posix(),
        "bytes": path.stat().st_size,
        "seed": seed,
        "epoch": epoch,
        "test_accuracy": evaluation.top1,
        "confusion": evaluation.confusion(),
    }


@functools.cache
def _visit() -> dict[str, Any]:
    """On what and with what code this process trains, as it is when it begins."""
    return {
        "device": _device(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "commit": _commit(),
    }


def _device() -> str:
    kind = jax.local_devices()[0].device_kind
    if kind != "cpu":
        return kind
    return f"CPU, {len(os.sched_getaffinity(0))} cores ({platform.machine()})"


def _fraction_of_peak(work: Work, outcome: Outcome) -> float | None:
    chip = next((c for c in CHIPS.values() if c.kind == jax.local_devices()[0].device_kind), None)
    if chip is None or len({visit["device"] for visit in outcome.visits}) > 1:
        return None
    flops = 2 * 3 * work.row.multiply_adds * outcome.images_per_second
    return round(flops / chip.flops[work.config.model.dtype], 4)


def _commit() -> str | None:
    """The checkout's commit, marked where code or recipes that git knows differ from it.

    Or what SHIFTNET_COMMIT says, for a copy that has no history, or another one.
    """
    if said := os.environ.get("SHIFTNET_COMMIT"):
        return said
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "-uno", ":/shiftnet", ":/configs"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if changes.strip() else "")


def _estimate(work: Work, works: Sequence[Work]) -> float | None:
    """Seconds that the missing seeds would take, by the results of this device.

    By those of the same family of networks where there are any, or else by the slowest; None where
    there are none at all.
    """
    rates: dict[str, list[float]] = {}  # multiply-adds a second, by family
    for other in works:
        for run in other.result["runs"] if other.result else ():
            if results.devices(run) == [_device()]:
                cost = 3.0 * other.row.multiply_adds * _images(other.config) * run["together"]
                rates.setdefault(_family(other), []).append(cost / run["seconds"])
    if not rates:
        return None
    slowest = min(min(values) for values in rates.values())
    return work.cost / min(rates.get(_family(work), [slowest]))


def _family(work: Work) -> str:
    return f"{models.parse_arch(work.config.model.arch)[0]} {work.config.model.weights}"


def _list(works: Sequence[Work], seeds: int) -> str:
    rows: list[tuple[object, ...]] = [
        ("row", "parameters", "reported", "ours", "seeds", "state", "to do")
    ]
    for work in works:
        values = results.accuracies(work.result, work.epoch) if work.result else []
        seconds = _estimate(work, works) if work.groups else None
        rows.append(
            (
                work.row.name,
                work.row.parameters,
                "" if work.row.reported is None else f"{work.row.reported:.2f}",
                results.mean_and_spread(values) if values else "",
                f"{len(values)} of {max(seeds, len(values))}",
                _state(work),
                "" if seconds is None else f"about {tables.duration(seconds)}",
            )
        )
    return tables.aligned(rows)


def _state(work: Work) -> str:
    if work.stale:
        return "another recipe's"
    if not work.groups:
        return "done"
    if not any(_begun(place) for _, place in work.groups):
        return "missing"
    done = max(done for _, done in work.epochs_done)
    return f"running, {done} of {work.config.epochs} epochs"


def _told(work: Work, result: Mapping[str, Any]) -> str:
    """What a row came to, in a line."""
    values = results.accuracies(result, work.epoch)
    parts = [
        f"{work.row.name}: {results.mean_and_spread(values)} % ({work.epoch} epoch, "
        f"{len(values)} seed{'s' if len(values) > 1 else ''})"
    ]
    if result["epochs"] < result["full_epochs"]:
        parts.append(f"on {result['epochs']} of {result['full_epochs']} epochs")
    elif work.row.reported is not None:
        parts.append(f"reported {work.row.reported:.2f} %")
    kept = result["checkpoint"]
    parts.append(
        f"{work.folder / kept['file']} has {kept['test_accuracy']:.2%} in {kept['bytes']:,} bytes"
    )
    return ", ".join(parts)
