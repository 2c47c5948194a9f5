"""Arranges the page: sentences, tables and figures under headings."""

import dataclasses
from collections.abc import Sequence

from shiftnet.results.report import charts, grids, sources
from shiftnet.results.report.charts import Chart
from shiftnet.results.report.grids import Grid
from shiftnet.results.report.sources import Confusion, Filled, Found, Training

CONFUSED_PAIRS = 15  # listed per run
OPEN_DETAILS = 4  # runs; with more than these, their details are closed at first
LEAST_EPOCHS = "Curves need two epochs; so far there are fewer."


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: a heading, then any sentences, tables and figures.

    Attributes:
      title: the heading.
      sentences: paragraphs above the tables.
      grids: tables, each with its caption.
      charts: figures.
      details: sections that the reader can open one by one.
      open: whether they are open at first.
    """

    title: str
    sentences: Sequence[str] = ()
    grids: Sequence[tuple[str, Grid]] = ()
    charts: Sequence[Chart] = ()
    details: Sequence["Section"] = ()
    open: bool = False


def sections(found: Found) -> list[Section]:
    """Returns all sections of the page."""
    names = [row.name for filled in found.tables for row in filled.table.rows]
    families = list(dict.fromkeys(map(sources.family, names)))
    parts = [_table(filled, families) for filled in found.tables if filled.whole or filled.full]
    if figure := charts.sizes(found):
        parts.insert(0, Section("Accuracy against bytes", charts=[figure]))
    if any(filled.shortened for filled in found.tables):
        parts.append(_shortened(found.tables))
    if found.trainings:
        parts.append(_runs(found.trainings))
    return parts or [Section("Nothing to draw", [grids.NOTHING])]


def _table(filled: Filled, families: Sequence[str]) -> Section:
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
    return Section(
        table.title,
        sentences,
        compared,
        [*drawn, *(charts.curves(trainings, means=True) if len(trainings) > 1 else [])],
        [*folded, *(of_training(training) for training in trainings)],
    )


def _shortened(tables: Sequence[Filled]) -> Section:
    trainings = [outcome.training for filled in tables for outcome in filled.shortened.values()]
    return Section(
        "Shortened schedules",
        [grids.SHORT],
        [(filled.table.title, grids.shortened(filled)) for filled in tables if filled.shortened],
        charts.curves(trainings, means=True) if len(trainings) > 1 else [],
        [of_training(training) for training in trainings],
    )


def _runs(trainings: Sequence[Training]) -> Section:
    sentences = ["Accuracies are top-1 on the test set in percent."]
    drawn = []
    if len(trainings) > 1:
        drawn = [*charts.curves(trainings), *charts.sign_flips(trainings)]
        if not drawn:
            sentences.append(LEAST_EPOCHS)
    return Section(
        "Runs",
        sentences,
        [("Runs", grids.of_trainings(trainings))],
        drawn,
        [of_training(training) for training in trainings],
        open=len(trainings) <= OPEN_DETAILS,
    )


def of_training(training: Training) -> Section:
    """Returns the section about the runs of one recipe."""
    title = f"{training.name}: {grids.schedule(training)}"
    if not training.epochs_done:
        return Section(title, ["There is nothing to draw: no epoch has finished yet."])
    sentences = []
    drawn = charts.curves([training])
    if not drawn:
        sentences.append(LEAST_EPOCHS)
    drawn += [*charts.sign_flips([training]), *charts.levels(training.runs[0])]
    confused = []
    if training.confusion is None:
        sentences.append("This run has no confusion matrix.")
    elif training.confusion.counts:
        pairs = _confused(training.confusion)
        caption = f"Most confused classes ({training.confusion.of})"
        confused = [(caption, pairs)] if pairs.rows else []
        drawn += [charts.per_class(training.confusion)]
        if matrix := charts.matrix(training.confusion):
            drawn.append(matrix)
    return Section(title, sentences, confused, drawn)


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
