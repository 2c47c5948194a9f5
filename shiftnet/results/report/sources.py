"""Reads what a report is about: working directories of runs, and folders of results."""

import contextlib
import dataclasses
import datetime
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

import shiftnet.config
import shiftnet.data
from shiftnet import checkpoint, models, results
from shiftnet.config import CIFAR_RECIPES, Config
from shiftnet.errors import UserError
from shiftnet.models import own
from shiftnet.models.counting import count
from shiftnet.training import metrics, pictures
from shiftnet.training.workdir import ENVIRONMENT, RECIPE

Line = Mapping[str, Any]


class Run(NamedTuple):
    """The run of one seed: the lines of its `metrics.jsonl`, one per epoch."""

    seed: int
    lines: Sequence[Line]


class Confusion(NamedTuple):
    """How many images of each class were predicted as which class.

    Attributes:
      class_names: distinct names, by label.
      counts: (label, prediction, images) for each pair that occurs.
      of: the network that predicted, in words.
    """

    class_names: Sequence[str]
    counts: Sequence[tuple[int, int, int]]
    of: str


class Picture(NamedTuple):
    """An image and what the network took it for.

    Attributes:
      image: its number in the data set, or its file.
      label, prediction: names of classes.
      confidence: the probability that the network gives to its prediction, a fraction.
      data: the image as a data URL.
    """

    image: str
    label: str
    prediction: str
    confidence: float
    data: str


class Pictures(NamedTuple):
    """Images of an evaluation: the most confident mistakes, and a sample of all."""

    wrong: Sequence[Picture]
    sample: Sequence[Picture]
    of: str  # the network that predicted, in words


class Session(NamedTuple):
    """On what and with what code a run was trained; None is unknown."""

    device: str
    versions: Mapping[str, str]
    commit: str | None


@dataclasses.dataclass(frozen=True)
class About:
    """The facts about a training that are not numbers of an epoch.

    Attributes:
      config: the recipe's settings, groups being mappings in it; empty where they are not known.
      sessions: one for each change of the device, the packages or the code, the newest last.
      seconds: time of all seeds together, in all sessions; None if it is not known.
      finished: when the last epoch ended, `"2026-11-27 19:06 UTC"`; empty if it is not known.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sessions: Sequence[Session] = ()
    seconds: float | None = None
    finished: str = ""


@dataclasses.dataclass(frozen=True)
class Training:
    """A recipe and its runs.

    Attributes:
      name: the distinct name of the working directory or row.
      epochs: epochs of the recipe.
      full_epochs: epochs of the row's full recipe; equal to `epochs` if that is not known.
      parameters: the network's parameters; None, like the next two, if they could not be counted.
      multiply_adds: multiply-adds per image.
      bytes: size of all parameters, with low-bit weights packed.
      runs: one per seed.
      confusion: None if none was written.
      about: its recipe, machine and time.
      pictures: None if none were written.
      row: the row of the results' table that it is named after, or would be.
      patience: epochs without a higher validation accuracy that end a run; 0: none do.
    """

    name: str
    epochs: int
    full_epochs: int
    parameters: int | None
    multiply_adds: int | None
    bytes: int | None
    runs: Sequence[Run]
    confusion: Confusion | None
    about: About = About()
    pictures: Pictures | None = None
    row: str = ""
    patience: int = 0

    @property
    def ended_early(self) -> bool:
        """Whether `patience` ended every run."""
        return self.patience > 0 and all(waited(run.lines) >= self.patience for run in self.runs)

    @property
    def epochs_done(self) -> int:
        """Epochs of the run that is furthest."""
        return max(self._epochs, default=0)

    @property
    def epochs_of_all(self) -> int:
        """Epochs that every run has."""
        return min(self._epochs, default=0)

    @property
    def _epochs(self) -> list[int]:
        return [max((line["epoch"] for line in run.lines), default=0) for run in self.runs]


def waited(lines: Sequence[Line]) -> int:
    """Returns the epochs since the first one of the highest validation accuracy."""
    known = [line for line in lines if "validation_accuracy" in line]
    if not known:
        return 0
    best = max(known, key=lambda line: line["validation_accuracy"])
    return max(line["epoch"] for line in lines) - best["epoch"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a row.

    Attributes:
      training: the runs.
      recipe: the name of the recipe that stood in for the row's own, or nothing.
      final, best: top-1 on the test set in percent, per seed.
      images_per_second: rate of all seeds that were trained together, the median over the seeds.
      fraction_of_peak: likewise; None if the device's peak is not known.
      seconds: total time of all seeds.
      device: the devices they were trained on.
      kept: top-1 in percent of the network that is kept, as `evaluate.py` prints it; None if there
        is none.
      kept_bytes: of its file; 0 if there is none.
    """

    training: Training
    recipe: str
    final: Sequence[float]
    best: Sequence[float]
    images_per_second: float
    fraction_of_peak: float | None
    seconds: float
    device: str
    kept: float | None
    kept_bytes: int

    @property
    def is_shortened(self) -> bool:
        """Whether the schedule was shortened, so that no full one compares with it."""
        return self.training.epochs < self.training.full_epochs


class Filled(NamedTuple):
    """A table with its rows' results, on the full schedule and on a shortened one."""

    table: results.Table
    full: Mapping[str, Outcome]
    shortened: Mapping[str, Outcome]
    whole: bool  # whether rows that were not trained are shown too


class Found(NamedTuple):
    """Everything to report on."""

    tables: Sequence[Filled]
    trainings: Sequence[Training]  # of working directories
    others: Sequence[results.Other] = ()  # networks of others on CIFAR-100


def find(paths: Sequence[Path]) -> Found:
    """Reads every path: a run's working directory, a row's, or a folder of results.

    A folder of results without a table of its own uses its parent's, and shows only the rows that
    it has. Runs whose recipes differ only in the seed are put together.

    Raises:
      UserError: if a path is none of these, or a file in it is damaged.
    """
    workdirs = []
    folders: dict[Path, list[Path]] = {}  # of results, by the folder that has their table
    for path in {path.resolve(): path for path in paths}.values():
        if (path / RECIPE).is_file():
            seeds = [file.parent for file in sorted(path.glob(f"seed*/{RECIPE}"))]
            workdirs.extend(seeds or [path])
        elif (path / results.TABLE).is_file():
            folders.setdefault(path.resolve(), []).append(path)
        elif path.is_dir() and (path.resolve().parent / results.TABLE).is_file():
            owner = path.resolve().parent
            if not any(_has_row(path, table) for table in results.tables(owner)):
                raise UserError(f"{path} has no result of a row of {owner / results.TABLE}")
            folders.setdefault(owner, []).append(path)
        else:
            raise UserError(
                f"{path} is neither a run's working directory, which has {RECIPE}, "
                f"nor a folder of results, which has {results.TABLE} or lies beside it"
            )
    tables = [table for owner, inside in folders.items() for table in _filled(owner, inside)]
    others = [other for owner in folders for other in results.others(owner)]
    return Found(tables, _trainings(workdirs), others)


def family(row: str) -> str:
    """Returns the family of a row or a run: `"wrn_1bit"` for `"wrn20_10_1bit_c100"`.

    It is the part of the name before the depth, and the form of the weights or of the blocks if the
    name has one.
    """
    match = re.match(r"((?:s3_)?[a-z_]+)\d", row)
    if match is None:
        return row
    forms = re.findall(
        r"_(\dbit|s3|denseshift|ternary|apot|pot|int|net|noskip)(?=_|$)", row[match.end() :]
    )
    return "_".join([match[1], *forms])


def number(line: Line, name: str) -> float | None:
    """Returns a number of a line; None if it is missing or not finite."""
    value = line.get(name)
    finite = isinstance(value, int | float) and -math.inf < value < math.inf
    return value if finite else None


def evaluated(run: Run) -> list[Line]:
    """Returns the lines of the epochs after which the run was evaluated."""
    return [line for line in run.lines if number(line, "test_accuracy") is not None]


def best(run: Run) -> Line | None:
    """Returns the line of the best epoch, by the held-out images if there are any."""

    def accuracy(line: Line) -> float:
        held_out = number(line, "validation_accuracy")
        return line["test_accuracy"] if held_out is None else held_out

    return max(evaluated(run), key=accuracy, default=None)


def _has_row(folder: Path, table: results.Table) -> bool:
    return any(results.path_of(folder, row.name).exists() for row in table.rows)


def _filled(owner: Path, folders: Sequence[Path]) -> list[Filled]:
    """Returns the tables of `owner` with the results in the folders."""
    filled = []
    whole = any(folder.resolve() == owner for folder in folders)
    for table in results.tables(owner):
        outcomes = [
            outcome
            for row in table.rows
            for folder in folders
            if (outcome := _outcome(folder, row.name))
        ]
        own = [outcome for outcome in outcomes if not outcome.recipe]
        if whole or own:
            full = {o.training.name: o for o in own if not o.is_shortened}
            short = {o.training.name: o for o in own if o.is_shortened}
            filled.append(Filled(table, full, short, whole))
        for recipe in sorted({outcome.recipe for outcome in outcomes} - {""}):
            named = [outcome for outcome in outcomes if outcome.recipe == recipe]
            epochs = CIFAR_RECIPES.get(recipe, {}).get("epochs")
            full = {o.training.name: o for o in named if o.training.epochs == epochs}
            short = {o.training.name: o for o in named if o.training.epochs != epochs}
            filled.append(Filled(_by_recipe(table, recipe, epochs), full, short, whole=False))
    return filled


def _by_recipe(table: results.Table, recipe: str, epochs: int | None) -> results.Table:
    """Returns the table of the rows that were trained by another recipe than their own."""
    note = f"These networks were trained by recipe={recipe}, {epochs or 'other'} epochs."
    if "distill.teacher" in CIFAR_RECIPES.get(recipe, {}):
        note += " They learned from a larger network trained here, which the reported ones did not."
    if table.epoch == "best" and any(row.reported is not None for row in table.rows):
        note += (
            " No epoch was chosen for ours; the reported one is the best of all on the test set."
        )
    title = f"{table.title}, by the {recipe} recipe"
    rows = tuple(dataclasses.replace(row, note="") for row in table.rows)
    return dataclasses.replace(table, title=title, note=note, epoch="final", rows=rows)


def _outcome(folder: Path, row: str) -> Outcome | None:
    result = results.read(folder, row)
    if result is None:
        return None
    path = results.path_of(folder, row)
    try:
        runs = result["runs"]
        confusion = None
        if kept := result["checkpoint"]:
            confusion = _confusion(
                kept["confusion"],
                result["class_names"],
                f"seed {kept['seed']}, epoch {kept['epoch']}",
            )
        peaks = [float(peak) for run in runs if (peak := run["fraction_of_peak"]) is not None]
        return Outcome(
            training=Training(
                name=row,
                epochs=int(result["epochs"]),
                full_epochs=int(result["full_epochs"]),
                parameters=int(result["parameters"]),
                multiply_adds=int(result["multiply_adds"]),
                bytes=int(result["bytes"]),
                runs=[Run(run["seed"], _checked(run["epochs"])) for run in runs],
                confusion=confusion,
                about=_about_row(result),
                row=row,
            ),
            recipe=str(result.get("recipe", "")),
            final=[float(accuracy) for accuracy in results.accuracies(result, "final")],
            best=[float(accuracy) for accuracy in results.accuracies(result, "best")],
            images_per_second=statistics.median(float(run["images_per_second"]) for run in runs),
            fraction_of_peak=statistics.median(peaks) if peaks else None,
            # Each of the seeds trained together has the seconds of all of them.
            seconds=sum(run["seconds"] / run["together"] for run in runs),
            device=", ".join(dict.fromkeys(name for run in runs for name in results.devices(run))),
            kept=100 * float(kept["test_accuracy"]) if kept else None,
            kept_bytes=int(kept["bytes"]) if kept else 0,
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged: {_words(error)}") from error


def _trainings(workdirs: Sequence[Path]) -> list[Training]:
    """Groups working directories by recipe; a seed that occurs twice starts another group."""
    groups: dict[tuple[str, int], list[tuple[Path, Config]]] = {}
    for workdir in workdirs:
        config = _config(workdir)
        recipe = {**config.to_dict(), "seed": 0, "data": {**config.data.to_dict(), "dir": ""}}
        text, turn = json.dumps(recipe), 0
        while any(config.seed == other.seed for _, other in groups.get((text, turn), ())):
            turn += 1
        groups.setdefault((text, turn), []).append((workdir, config))
    names = _names([_place(members[0][0]) for members in groups.values()])
    return [_training(*both) for both in zip(names, groups.values(), strict=True)]


def _place(workdir: Path) -> Path:
    """Returns the folder that a run is named after: its own, or that of the row it is a seed of."""
    path = workdir.resolve()
    return path.parent if re.fullmatch(r"seed\d+", path.name) else path


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the last parts of paths, as many as make them distinct."""
    most = max((len(path.parts) for path in paths), default=1)
    for length in range(1, most + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _training(name: str, members: Sequence[tuple[Path, Config]]) -> Training:
    """Returns the training of one recipe from its working directories."""
    config = members[0][1]
    runs = [Run(config.seed, _lines(workdir)) for workdir, config in members]
    confusion = next((c for workdir, config in members if (c := _of(workdir, config))), None)
    costs = _count(config, confusion)
    more = len({_place(workdir) for workdir, _ in members}) - 1
    return Training(
        name=f"{name} and {more} more" if more else name,
        epochs=config.epochs,
        full_epochs=config.epochs,
        parameters=costs and costs.parameters,
        multiply_adds=costs and costs.multiply_adds,
        bytes=costs and costs.weight_bytes,
        runs=runs,
        confusion=confusion,
        about=_about(config, [workdir for workdir, _ in members]),
        pictures=next(
            (p for workdir, config in members if (p := _pictures(workdir, config))), None
        ),
        row=re.sub(r"_seeds[\d-]+$", "", _place(members[0][0]).name),
        patience=config.patience,
    )


def _about(config: Config, workdirs: Sequence[Path]) -> About:
    """Returns the facts that runs wrote beside their metrics, as far as they can be read."""
    places = list(dict.fromkeys(map(_place, workdirs)))
    sessions, seconds = [], []
    for place in places:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            found = json.loads((place / ENVIRONMENT).read_text(encoding="utf-8"))
            sessions += [session for entry in found if (session := _session(entry)) not in sessions]
        # There may be none yet, or the run may replace it meanwhile.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            metadata = checkpoint.read_metadata(checkpoint.find(place))
            seconds.append(float(metadata["seconds"]))
    times = [(workdir / metrics.FILE).stat().st_mtime for workdir in workdirs if _lines(workdir)]
    return About(
        config.to_dict(),
        sessions,
        sum(seconds) if len(seconds) == len(places) else None,
        _moment(datetime.datetime.fromtimestamp(max(times), datetime.UTC)) if times else "",
    )


def _about_row(result: Mapping[str, Any]) -> About:
    """Returns the facts in a row's file."""
    sessions: list[Session] = []
    for run in result["runs"]:
        for entry in (*run.get("earlier", ()), run):
            if (session := _session(entry)) not in sessions:
                sessions.append(session)
    finished = max(str(run.get("finished", "")) for run in result["runs"])
    return About(
        result["config"],
        sessions,
        # Each of the seeds trained together has the seconds of all of them.
        sum(run["seconds"] / run["together"] for run in result["runs"]),
        _moment(datetime.datetime.fromisoformat(finished)) if finished else "",
    )


def _session(entry: Mapping[str, Any]) -> Session:
    commit = entry["commit"]
    versions = {str(name): str(version) for name, version in entry["versions"].items()}
    return Session(str(entry["device"]), versions, None if commit is None else str(commit))


def _moment(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _pictures(workdir: Path, config: Config) -> Pictures | None:
    """Returns the images that a run wrote beside its metrics, if it did."""
    path = workdir / pictures.FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        words = f"seed {config.seed}, epoch {int(found['epoch'])}"
        wrong, sample = (list(map(_picture, found[kind])) for kind in ("wrong", "sample"))
        return Pictures(wrong, sample, words)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {_words(error)}") from error


def _picture(found: Mapping[str, Any]) -> Picture:
    """Checks an image of a file.

    Raises:
      KeyError, TypeError, ValueError: if it is malformed.
    """
    if not re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*", found["data"]):
        raise ValueError(f"the data of image {found['image']} are not of a PNG or JPEG")
    image, label, prediction = (str(found[name]) for name in ("image", "class", "prediction"))
    return Picture(image, label, prediction, float(found["confidence"]), found["data"])


def _config(workdir: Path) -> Config:
    path = workdir / RECIPE
    try:
        return shiftnet.config.from_json(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _lines(workdir: Path) -> list[Line]:
    path = workdir / metrics.FILE
    try:
        return _checked(metrics.read(workdir))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {_words(error)}") from error


def _checked(lines: Sequence[Any]) -> list[Line]:
    """Checks the parts of lines that are drawn.

    Raises:
      KeyError, TypeError, ValueError, AttributeError: if one is not the line of an epoch.
    """
    for line in lines:
        if not isinstance(line["epoch"], int):
            raise TypeError(f"epoch {line['epoch']!r} is not a whole number")
        for name, value in line.items():
            if name.endswith("accuracy") and not (
                value is None or (type(value) in (int, float) and 0 <= value <= 1)
            ):
                raise ValueError(f"{name} is {value!r:.40}, expected from 0 to 1")
        for layer in line.get("weights", {}).values():
            _ = [(int(level), float(share)) for level, share in layer["levels"].items()]
    return list(lines)


def _of(workdir: Path, config: Config) -> Confusion | None:
    """Returns the confusion that a run wrote beside its metrics, if it did."""
    path = workdir / metrics.CONFUSION
    try:
        found = json.loads(path.read_text())
        words = f"seed {config.seed}, epoch {found['epoch']}"
        return _confusion(found["confusion"], found["class_names"], words)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {_words(error)}") from error


def _confusion(counts: Any, class_names: Sequence[str], of: str) -> Confusion:
    """Checks a file's confusion.

    Raises:
      TypeError, ValueError: if it is malformed.
    """
    names = [str(name) for name in class_names]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    checked = []
    for label, prediction, images in counts:
        if not (0 <= label < len(names) and 0 <= prediction < len(names) and images > 0):
            raise ValueError(f"[{label}, {prediction}, {images}] is not of {len(names)} classes")
        checked.append((int(label), int(prediction), int(images)))
    return Confusion(names, checked, of)


def _count(config: Config, confusion: Confusion | None):
    """Returns the costs of a recipe's network.

    None if its number of classes is not known, or it is of a class of the user's own, whose code a
    page does not run.
    """
    if own.is_own(config.model.arch):
        return None
    if config.data.source == "tfds" and config.data.name in shiftnet.data.IN_MEMORY:
        classes, side = len(shiftnet.data.class_names(config.data.name)), 32
    elif confusion:
        classes = len(confusion.class_names)
        side = config.data.size or models.image_size(config.model.arch)
    else:
        return None
    network = nnx.eval_shape(lambda: models.build(config.model, classes, rngs=nnx.Rngs(0)))
    return count(network, (side, side, 3))


def _words(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
