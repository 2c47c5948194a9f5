"""Arranges the page: sentences, tables and figures under headings."""

import dataclasses
from collections.abc import Sequence

from shiftnet.results.report import charts, grids, sources
from shiftnet.results.report.charts import Chart
from shiftnet.results.report.grids import Grid, Tile
from shiftnet.results.report.sources import Confusion, Filled, Found, Picture, Training

CONFUSED_PAIRS = 15  # listed per run
OPEN_DETAILS = 4  # runs; with more than these, their details are closed at first
UNTRAINED = "No row of these tables has been trained on its full schedule; this was reported."
LEAST_EPOCHS = "Curves need two epochs; so far there are fewer."
NO_IMAGES = "This run has no images: it was trained by a version that did not keep any."


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: a heading, then whatever it has, in the order of the attributes.

    Attributes:
      title: the heading.
      tiles: the numbers to see first.
      sentences: paragraphs.
      grids: tables, each with its caption.
      charts: figures.
      pictures: captions, each with its images.
      facts: pairs of a name and words.
      details: sections that the reader can open one by one.
      open: whether they are open at first.
      run: the training that it is about, for its color; empty if there is none.
    """

    title: str
    tiles: Sequence[Tile] = ()
    sentences: Sequence[str] = ()
    grids: Sequence[tuple[str, Grid]] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[tuple[str, Sequence[Picture]]] = ()
    facts: Sequence[tuple[str, str]] = ()
    details: Sequence["Section"] = ()
    open: bool = False
    run: str = ""


def title(found: Found) -> str:
    """Returns the page's title: what is on it."""
    if not found.tables and len(found.trainings) == 1:
        return found.trainings[0].name
    rows = sum(len(filled.full) + len(filled.shortened) for filled in found.tables)
    counts = [(rows, "trained row"), (len(found.trainings), "run")]
    return " and ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts if n) or "No results"


def names(found: Found) -> list[str]:
    """Returns the names of all trainings of the page, each of which has one color on it."""
    outcomes = [
        o for filled in found.tables for o in (*filled.full.values(), *filled.shortened.values())
    ]
    trainings = [*(outcome.training for outcome in outcomes), *found.trainings]
    return list(dict.fromkeys(training.name for training in trainings))


def sections(found: Found) -> list[Section]:
    """Returns all sections of the page: first what was trained, at the end what was not."""
    if not found.tables and len(found.trainings) == 1:
        return [dataclasses.replace(_of_run(found.trainings[0], names(found)), title="This run")]
    rows = [row.name for filled in found.tables for row in filled.table.rows]
    families = list(dict.fromkeys(map(sources.family, rows)))
    parts, untrained = [], []
    if figure := charts.sizes(found):
        parts.append(Section("Accuracy against bytes", charts=[figure]))
    if compared := _compared(found):
        figures = [charts.recipes(compared, names(found))]
        grid = ("Accuracy by recipe", grids.by_recipe(compared))
        parts.append(Section("The same rows by several recipes", grids=[grid], charts=figures))
    for filled in found.tables:
        if filled.full:
            parts.append(_table(filled, families, names(found)))
        elif filled.whole:
            untrained.append(_table(filled, families, names(found)))
    if any(filled.shortened for filled in found.tables):
        parts.append(_shortened(found.tables, names(found)))
    if found.trainings:
        parts.append(_runs(found.trainings, names(found)))
    if untrained:
        parts.append(Section("Not trained yet", sentences=[UNTRAINED], details=untrained))
    return parts or [Section("Nothing to draw", sentences=[grids.NOTHING])]


def _compared(found: Found) -> dict[str, list[tuple[str, Training]]]:
    """Returns the rows that were trained by more than one recipe, with their trainings.

    A run whose working directory is named after a row counts too.
    """
    rows: dict[str, list[tuple[str, Training]]] = {}
    for filled in found.tables:
        own = {name: o for name, o in filled.shortened.items() if o.recipe}
        for outcome in (*filled.full.values(), *own.values()):
            words = f"full recipe, {grids.schedule(outcome.training)}"
            if outcome.recipe:
                words = f"{outcome.recipe} recipe, {outcome.training.epochs} epochs"
            rows.setdefault(outcome.training.row, []).append((words, outcome.training))
    for training in found.trainings:
        if training.row in rows and training.epochs_done:
            rows[training.row].append((f"run, {grids.schedule(training)}", training))
    return {
        row: trainings
        for row, trainings in rows.items()
        if len(trainings) > 1 and max(training.epochs_done for _, training in trainings) > 1
    }


def _table(filled: Filled, families: Sequence[str], names: Sequence[str]) -> Section:
    table = filled.table
    sentences = [words for words in (grids.reading(filled), table.note) if words]
    folded = []
    if filled.whole and grids.missing(filled):
        grid = ("Reported", grids.waiting(filled))
        folded.append(Section(grids.missing_words(filled), grids=[grid]))
    drawn = charts.costs(filled, families)
    if not drawn:
        sentences.append(
            "There is no figure, since nothing was reported and nothing has been trained."
        )
    trainings = [outcome.training for outcome in filled.full.values()]
    compared = [("Reported and ours", grids.compared(filled))] if filled.full else []
    if found := grids.rivals(filled):
        sentences.append(f"The second table: {grids.EQUAL_SIZE[0].lower()}{grids.EQUAL_SIZE[1:]}")
        compared.append(("At equal size", found))
    if not filled.full:  # there is nothing else in it
        compared, folded = [grid for part in folded for grid in part.grids], []
    curves = charts.curves(trainings, names, means=True) if len(trainings) > 1 else []
    return Section(
        table.title,
        sentences=sentences,
        grids=compared,
        charts=[*drawn, *curves],
        details=[*folded, *(of_training(training, names) for training in trainings)],
    )


def _shortened(tables: Sequence[Filled], names: Sequence[str]) -> Section:
    trainings = [outcome.training for filled in tables for outcome in filled.shortened.values()]
    return Section(
        "Shortened schedules",
        sentences=[grids.SHORT],
        grids=[
            (filled.table.title, grids.shortened(filled)) for filled in tables if filled.shortened
        ],
        charts=charts.curves(trainings, names, means=True) if len(trainings) > 1 else [],
        details=[of_training(training, names) for training in trainings],
    )


def _runs(trainings: Sequence[Training], names: Sequence[str]) -> Section:
    sentences = ["Accuracies are top-1 on the test set in percent."]
    drawn = []
    if len(trainings) > 1:
        drawn = [*charts.curves(trainings, names), *charts.sign_flips(trainings, names)]
        if not drawn:
            sentences.append(LEAST_EPOCHS)
    return Section(
        "Runs",
        sentences=sentences,
        grids=[("Runs", grids.of_trainings(trainings))],
        charts=drawn,
        details=[_of_run(training, names) for training in trainings],
        open=len(trainings) <= OPEN_DETAILS,
    )


def _of_run(training: Training, names: Sequence[str]) -> Section:
    """Returns the section about a working directory's runs, which have images since 2026-11."""
    section = of_training(training, names)
    if training.epochs_done and training.pictures is None:
        return dataclasses.replace(section, sentences=[*section.sentences, NO_IMAGES])
    return section


def of_training(training: Training, names: Sequence[str]) -> Section:
    """Returns the section about the runs of one recipe.

    Args:
      training: the runs.
      names: of all trainings of the page, as for `charts.curves`.
    """
    title, facts = f"{training.name}: {grids.schedule(training)}", grids.facts(training)
    if not training.epochs_done:
        sentences = ["There is nothing to draw: no epoch has finished yet."]
        return Section(title, sentences=sentences, facts=facts, run=training.name)
    sentences = []
    drawn = charts.curves([training], names)
    if not drawn:
        sentences.append(LEAST_EPOCHS)
    drawn += [*charts.sign_flips([training], names), *charts.levels(training.runs[0])]
    confused = []
    if training.confusion is None:
        sentences.append("This run has no confusion matrix.")
    elif training.confusion.counts:
        pairs = _confused(training.confusion)
        caption = f"Most confused classes ({training.confusion.of})"
        confused = [(caption, pairs)] if pairs.rows else []
        drawn += [charts.per_class(training.confusion, training.name, names)]
        if matrix := charts.matrix(training.confusion):
            drawn.append(matrix)
    shown = []
    if pictures := training.pictures:
        shown = [
            (f"Most confident mistakes ({pictures.of})", pictures.wrong),
            (f"Test images at random ({pictures.of})", pictures.sample),
        ]
    return Section(
        title,
        grids.tiles(training),
        sentences,
        confused,
        drawn,
        [(caption, found) for caption, found in shown if found],
        facts,
        run=training.name,
    )


def _confused(confusion: Confusion) -> Grid:
    """Returns the pairs of classes that are confused most often."""
    images: dict[int, int] = {}
    for label, _, count in confusion.counts:
        images[label] = images.get(label, 0) + count
    wrong = sorted(
        (entry for entry in confusion.counts if entry[0] != entry[1]), key=lambda entry: -entry[2]
    )
    return Grid(
        head=["class", "predicted", "images", "of the class"],
        rows=[
            [
                grids.Cell(confusion.class_names[label]),
                grids.Cell(confusion.class_names[prediction]),
                grids.Cell(f"{count:,}"),
                grids.Cell(f"{count / images[label]:.1%}"),
            ]
            for label, prediction, count in wrong[:CONFUSED_PAIRS]
        ],
    )
