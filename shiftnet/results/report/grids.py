"""Makes the tables of the report, as texts in cells, for both the page and Markdown."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shiftnet import config as config_lib
from shiftnet.results import Row, mean_and_spread
from shiftnet.results.report import sources
from shiftnet.results.report.sources import Filled, Outcome, Training
from shiftnet.tables import duration

NONE = "\N{EN DASH}"
FAR = 1.0  # points; a row that differs by more from what was reported is marked
# Families that a shift network is compared with at the same size, by the start of their names.
RIVALS = ("", "depthwise")
FEWEST_SEEDS = 3  # of both, or no difference is stated
EQUAL_SIZE = (
    "Shift networks against networks of about their size, as trained here. The difference has its "
    f"standard error, and is given from {FEWEST_SEEDS} seeds of both on; it is in bold if it is "
    "more than twice that."
)
NOTHING = "The given paths have no results."
SHORT = (
    "These runs show that a recipe learns. Their accuracies are not those of the full schedule, "
    "and are not compared with what was reported."
)


class Cell(NamedTuple):
    """A text, marked if it should stand out."""

    text: str
    marked: bool = False


class Tile(NamedTuple):
    """A number to see first: what it is, itself, and a few words below it."""

    title: str
    value: str
    note: str = ""


class Grid(NamedTuple):
    """A table.

    Attributes:
      head: the columns' titles.
      rows: the cells of each row; the first is the row's title.
      notes: pairs of a row's title and a sentence about it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[tuple[str, str]] = ()

    @property
    def are_words(self) -> list[bool]:
        """For each column, whether it holds words rather than numbers."""
        return [title in _WORDS for title in self.head]


def reading(filled: Filled) -> str:
    """Returns sentences that explain a table of `compared` or `brief`."""
    table = filled.table
    words = (
        f"Reported: {table.source}. Accuracies are top-1 on the test set in percent; ours are "
        "means over n seeds ± the standard deviation."
    )
    if any(row.reported is not None for row in table.rows):
        words += (
            f" The difference is our accuracy after the {table.epoch} epoch minus the reported "
            f"one, in bold if it is more than {FAR:g} point."
        )
    return words


def compared(filled: Filled) -> Grid:
    """Returns the rows that were trained on the full schedule: what was reported, and ours."""
    older = _has_older(filled)
    rows = [row for row in filled.table.rows if row.name in filled.full]
    head = ["row", "parameters", "reported", *(["older"] if older else [])]
    return Grid(
        head=[*head, "ours, final", "ours, best", "difference", "n", *_KEPT_AND_SPEED, "recipe"],
        rows=[
            [
                *_reported_row(row, older),
                *_ours(filled.full[row.name]),
                _difference(filled, row),
                *_seeds_network_and_speed(filled.full[row.name]),
                Cell(row.recipe),
            ]
            for row in rows
        ],
        notes=[(row.name, row.note) for row in rows if row.note],
    )


def waiting(filled: Filled) -> Grid:
    """Returns the rows that were not trained on the full schedule: what was reported."""
    older = _has_older(filled)
    rows = [row for row in filled.table.rows if row.name not in filled.full]
    return Grid(
        head=["row", "parameters", "reported", *(["older"] if older else []), "recipe"],
        rows=[[*_reported_row(row, older), Cell(row.recipe)] for row in rows],
        notes=[(row.name, row.note) for row in rows if row.note],
    )


def rivals(filled: Filled) -> Grid | None:
    """Returns shift networks against the networks of about their size, where both were trained.

    A row is a pair such as shiftresnet20_3c_c100 and resnet20_3c_c100.
    """
    epoch, rows = filled.table.epoch, {row.name: row for row in filled.table.rows}
    found = []
    for name, outcome in filled.full.items():
        match = re.fullmatch(r"shift(resnet\d+_\d+c_\w+)", name)
        if match is None:
            continue
        for prefix in RIVALS:
            other = filled.full.get(f"{prefix}{match[1]}")
            if other is None:
                continue
            row, rival = rows[name], rows[other.training.name]
            ours, theirs = (list(getattr(one, epoch)) for one in (outcome, other))
            reported = (
                None
                if row.reported is None or rival.reported is None
                else row.reported - rival.reported
            )
            found.append(
                [
                    Cell(name),
                    Cell(rival.name),
                    Cell(f"{row.parameters:,} / {rival.parameters:,}"),
                    _mean(ours),
                    _mean(theirs),
                    Cell(f"{len(ours)} / {len(theirs)}"),
                    _gap(ours, theirs),
                    Cell(NONE if reported is None else _signed(reported)),
                ]
            )
    head = ["row", "rival", "parameters", "ours", "the rival's", "n", "difference", "reported"]
    return Grid(head, found) if found else None


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> Cell:
    """Returns the difference of two means and its standard error, if there are seeds enough."""
    if min(len(ours), len(theirs)) < FEWEST_SEEDS:
        return Cell(NONE)
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (ours, theirs)))
    gap = statistics.mean(ours) - statistics.mean(theirs)
    return Cell(f"{_signed(gap)} ± {error:.2f}", marked=abs(gap) > 2 * error)


def brief(filled: Filled) -> Grid:
    """Returns the rows that were trained, with only the accuracy that is compared."""
    epoch = filled.table.epoch
    rows = [row for row in filled.table.rows if row.name in filled.full]
    return Grid(
        head=["row", "parameters", "reported", f"ours, {epoch}", "difference", "n"],
        rows=[
            [
                Cell(row.name),
                Cell(f"{row.parameters:,}"),
                _reported(row),
                _mean(getattr(filled.full[row.name], epoch)),
                _difference(filled, row),
                Cell(str(len(filled.full[row.name].final))),
            ]
            for row in rows
        ],
        notes=[(row.name, row.note) for row in rows if row.note],
    )


def shortened(filled: Filled) -> Grid:
    """Returns the rows that were trained on a shortened schedule, without a comparison."""
    return Grid(
        head=["row", "schedule", "parameters", "ours, final", "ours, best", "n", *_KEPT_AND_SPEED],
        rows=[
            [
                Cell(row.name),
                Cell(schedule(outcome.training)),
                Cell(f"{row.parameters:,}"),
                *_ours(outcome),
                *_seeds_network_and_speed(outcome),
            ]
            for row in filled.table.rows
            if (outcome := filled.shortened.get(row.name))
        ],
    )


def of_trainings(trainings: Sequence[Training]) -> Grid:
    """Returns the runs in working directories."""
    costs = ("parameters", "multiply-adds", "bytes, packed")
    accuracies = ("train, last", "test, last", "test, best")
    return Grid(
        head=["run", "schedule", *costs, *accuracies, "n", "images/s"],
        rows=[_training_row(training) for training in trainings],
    )


def by_recipe(compared: Mapping[str, Sequence[tuple[str, Training]]]) -> Grid:
    """Returns rows that were trained by several recipes, one line for each."""
    rows = []
    for trainings in compared.values():
        for words, training in trainings:
            final, best = _accuracies(training)
            seconds = training.about.seconds
            each = None if seconds is None else duration(seconds / len(training.runs))
            rows.append(
                [
                    Cell(training.name),
                    Cell(words),
                    _mean(final),
                    _mean(best),
                    Cell(str(len(training.runs))),
                    Cell(each or NONE),
                    Cell(", ".join(_devices(training)) or NONE),
                ]
            )
    head = ["row", "recipe", "ours, final", "ours, best", "n", "time, per seed", "device"]
    return Grid(head, rows)


def tiles(training: Training) -> list[Tile]:
    """Returns the numbers to see first of a training."""
    final, best = _accuracies(training)
    found = []
    if final:
        note = f"best {mean_and_spread(best)} %"
        if len(training.runs) > 1:
            note += f", {len(training.runs)} seeds"
        elif line := sources.best(training.runs[0]):
            note += f" after epoch {line['epoch']}"
        found.append(Tile("Test accuracy", f"{mean_and_spread(final)} %", note))
    if training.epochs_done < training.epochs:
        note = f"of {training.epochs}"
    else:
        note = "" if training.epochs == training.full_epochs else f"of {training.full_epochs}"
    least, most = training.epochs_of_all, training.epochs_done
    found.append(Tile("Epochs", str(most) if least == most else f"{least} to {most}", note))
    if training.parameters is not None and training.multiply_adds is not None:
        note = f"{_metric(training.multiply_adds)} multiply-adds"
        found.append(Tile("Parameters", f"{training.parameters:,}", note))
    if training.bytes is not None:
        is_low = training.parameters is not None and training.bytes < 4 * training.parameters
        note = "low-bit weights packed" if is_low else "float32"
        found.append(Tile("Size", f"{_metric(training.bytes)}B", note))
    if training.about.seconds is not None:
        rates = _rates(training)
        note = f"{statistics.median(rates):,.0f} images/s" if rates else ""
        found.append(Tile("Training time", duration(training.about.seconds), note))
    return found


def facts(training: Training) -> list[tuple[str, str]]:
    """Returns what a training was made with: recipe, data, machine, code and packages."""
    about = training.about
    found = [*_recipe(about.config)]
    if len(training.runs) > 1:
        found.append(("Seeds", ", ".join(str(run.seed) for run in training.runs)))
    if about.sessions:
        last = about.sessions[-1]
        commits = dict.fromkeys(one.commit for one in about.sessions if one.commit is not None)
        found += [
            ("Machine", ", then ".join(_devices(training))),
            ("Code", ", then ".join(map(_commit, commits)) or "not under version control"),
            ("Packages", ", ".join(f"{name} {version}" for name, version in last.versions.items())),
        ]
    if about.finished:
        found.append(("Last epoch", about.finished))
    return [(name, words) for name, words in found if words]


def _recipe(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns a recipe in words, without the settings that are as always."""
    if not config:
        return []

    def of(group: str) -> Mapping[str, Any]:
        return config.get(group) or {}

    model, data, optimizer = of("model"), of("data"), of("optimizer")
    usual = config_lib.default_config().model.to_dict()
    settings = [
        f"{name} {value}" for name, value in model.items() if value != usual.get(name, value)
    ]
    settings = [text for text in settings if not text.startswith("arch ")]
    place = f" from {data['dir']}" if data.get("dir") and data.get("source") == "folder" else ""
    source = data.get("name", "") if data.get("source") != "folder" else "image files"
    rate = optimizer.get("lr")
    training = [
        optimizer.get("name", "sgd"),
        "" if rate is None else f"learning rate {rate:g}",
        f"{of('schedule').get('name', 'step')} schedule",
        f"{config.get('epochs')} epochs",
        f"{config.get('batch_size')} images per step",
    ]
    return [
        ("Network", ", ".join([str(model.get("arch", "")), *settings])),
        ("Data", f"{source}{place}"),
        ("Training", ", ".join(filter(None, training))),
    ]


def _devices(training: Training) -> list[str]:
    return list(dict.fromkeys(session.device for session in training.about.sessions))


def _commit(commit: str) -> str:
    """Shortens a commit, as `git log --oneline` does."""
    name, _, changed = commit.partition("-")
    return f"{name[:10]}{' with changes' if changed else ''}"


def _metric(number: float) -> str:
    """Returns a number with three digits and a prefix of the SI, such as `"5.95 M"`."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5 or prefix == "G":
            break
        number /= 1000
    return f"{number:.3g} {prefix}"


def missing(filled: Filled) -> int:
    """Returns how many rows of a table were not trained on the full schedule."""
    return len(filled.table.rows) - len(filled.full)


def missing_words(filled: Filled) -> str:
    """Returns a title for the rows of `waiting`."""
    return f"{missing(filled)} of {len(filled.table.rows)} rows have not been trained yet"


def schedule(training: Training) -> str:
    """Returns how far the runs are, and whether that is the recipe's whole schedule."""
    if training.epochs < training.full_epochs:
        return f"{training.epochs} of {training.full_epochs} epochs"
    if training.ended_early and training.epochs_done < training.epochs:
        return f"{training.epochs_done} of {training.epochs} epochs, ended early"
    if (least := training.epochs_of_all) < (most := training.epochs_done):
        return f"epochs {least} to {most} of {training.epochs}, by seed"
    if training.epochs_done < training.epochs:
        return f"epoch {training.epochs_done} of {training.epochs}"
    return f"{training.epochs} epochs"


_WORDS = ("row", "rival", "run", "schedule", "device", "recipe", "class", "predicted")
_KEPT_AND_SPEED = ("kept network", "images/s (of peak)", "time, all seeds", "device")


def _has_older(filled: Filled) -> bool:
    return any(row.older is not None for row in filled.table.rows)


def _reported_row(row: Row, older: bool) -> list[Cell]:
    cells = [Cell(row.name), Cell(f"{row.parameters:,}"), _reported(row)]
    return [*cells, Cell(_points(row.older))] if older else cells


def _reported(row: Row) -> Cell:
    spread = "" if row.spread is None else f" ± {row.spread:.2f}"
    return Cell(_points(row.reported) + spread)


def _ours(outcome: Outcome) -> list[Cell]:
    return [_mean(outcome.final), _mean(outcome.best)]


def _difference(filled: Filled, row: Row) -> Cell:
    """Returns ours minus what was reported, for the epoch that the table compares."""
    if row.reported is None:
        return Cell(NONE)
    ours = statistics.mean(getattr(filled.full[row.name], filled.table.epoch))
    points = round(ours - row.reported, 2)
    return Cell(_signed(points), marked=abs(points) > FAR)


def _seeds_network_and_speed(outcome: Outcome) -> list[Cell]:
    peak = outcome.fraction_of_peak
    rate = f"{outcome.images_per_second:,.0f}" + ("" if peak is None else f" ({peak:.1%})")
    return [
        Cell(str(len(outcome.final))),
        Cell(_points(outcome.kept)),
        Cell(rate),
        Cell(duration(outcome.seconds)),
        Cell(outcome.device),
    ]


def _training_row(training: Training) -> list[Cell]:
    last = [run.lines[-1] for run in training.runs if run.lines]
    final, best = _accuracies(training)
    rates = _rates(training)
    costs = (training.parameters, training.multiply_adds, training.bytes)
    return [
        Cell(training.name),
        Cell(schedule(training)),
        *(Cell(NONE if cost is None else f"{cost:,}") for cost in costs),
        _mean(_percents(last, "train_accuracy")),
        _mean(final),
        _mean(best),
        Cell(str(len(training.runs))),
        Cell(f"{statistics.median(rates):,.0f}" if rates else NONE),
    ]


def _accuracies(training: Training) -> tuple[list[float], list[float]]:
    """Returns the seeds' test accuracies in percent, the last and that of the best epoch."""
    last = [lines[-1] for run in training.runs if (lines := sources.evaluated(run))]
    best = [line for run in training.runs if (line := sources.best(run))]
    return _percents(last, "test_accuracy"), _percents(best, "test_accuracy")


def _rates(training: Training) -> list[float]:
    lines = (line for run in training.runs for line in run.lines)
    rates = (sources.number(line, "images_per_second") for line in lines)
    return [rate for rate in rates if rate is not None]


def _percents(lines: Sequence[sources.Line], name: str) -> list[float]:
    return [100 * value for line in lines if (value := sources.number(line, name)) is not None]


def _mean(values: Sequence[float]) -> Cell:
    return Cell(mean_and_spread(values) if values else NONE)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _points(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
