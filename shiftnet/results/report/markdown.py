"""Writes the tables in Markdown, to a file of their own or between two lines of another file."""

import re
from collections.abc import Sequence
from pathlib import Path

from shiftnet.errors import UserError
from shiftnet.results.report import grids
from shiftnet.results.report.grids import Grid
from shiftnet.results.report.sources import Filled, Found

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def render(found: Found, *, brief: bool = False) -> str:
    """Returns all tables, with headings.

    Args:
      found: what to report on.
      brief: of results include only the rows that were trained on their full schedule, and the
        number of those that were not.
    """
    parts: list[str] = []
    for filled in found.tables:
        table = filled.table
        if brief and filled.full:
            parts += [f"### {text(table.title)}", *_source(filled), *_grid(grids.brief(filled))]
        elif not brief and (filled.whole or filled.full):
            parts += [f"## {text(table.title)}", *_source(filled)]
            if filled.full:
                parts += _grid(grids.compared(filled))
            if found_rivals := grids.rivals(filled):
                parts += [text(grids.EQUAL_SIZE), *_grid(found_rivals)]
            if filled.whole and grids.missing(filled):
                parts += _folded(grids.missing_words(filled), grids.waiting(filled))
    if brief:
        own = [filled for filled in found.tables if filled.whole]
        missing = sum(grids.missing(filled) for filled in own)
        rows = sum(len(filled.table.rows) for filled in own)
        if rows:
            words = "rows have not been trained on their full schedule yet."
            parts.append(f"{missing} of {rows} {words}")
    short = [filled for filled in found.tables if filled.shortened and not brief]
    if short:
        parts += ["## Shortened schedules", grids.SHORT]
    for filled in short:
        parts += [f"### {text(filled.table.title)}", *_grid(grids.shortened(filled))]
    if found.trainings:
        parts += ["## Runs", *_grid(grids.of_trainings(found.trainings))]
    return "\n\n".join(parts or [grids.NOTHING])


def into(path: Path, rendered: str) -> str:
    """Returns the file's text with `rendered` between its lines `BEGIN` and `END`.

    Raises:
      UserError: if the file exists without these lines; its content must not be lost.
    """
    block = f"{BEGIN}\n{rendered}\n{END}"
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"# Results\n\n{block}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    between = re.compile(rf"^{re.escape(BEGIN)}$.*?^{re.escape(END)}$", re.DOTALL | re.MULTILINE)
    if len(between.findall(old)) != 1:
        raise UserError(
            f"{path} must have the lines {BEGIN} and {END} exactly once; the tables go between them"
        )
    return between.sub(lambda match: block, old)


def text(words: str) -> str:
    """Escapes a text, so that Markdown shows it unchanged and in one line."""
    words = re.sub(r"([\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w))", r"\\\1", words)
    return " ".join(words.split()).replace("&", "&amp;")


def _source(filled: Filled) -> list[str]:
    """Returns the sentences above a table."""
    return [text(words) for words in (grids.reading(filled), filled.table.note) if words]


def _grid(grid: Grid) -> list[str]:
    ruler = ["---" if words else "---:" for words in grid.are_words]
    rows = [[f"**{text(c.text)}**" if c.marked else text(c.text) for c in row] for row in grid.rows]
    table = "\n".join(_line(cells) for cells in ([text(t) for t in grid.head], ruler, *rows))
    notes = "\n".join(f"- {text(row)}: {text(note)}" for row, note in grid.notes)
    return [table, notes] if notes else [table]


def _folded(title: str, grid: Grid) -> list[str]:
    """Returns a table that the reader opens."""
    return [f"<details>\n<summary>{text(title)}</summary>", *_grid(grid), "</details>"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
