"""What there is: the rows that were trained, with the numbers of their result files."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftnet import results, tables
from shiftnet.results import Row, Table

FOLDER = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network.

    Attributes:
      name: what `shiftnet.load` takes: the row's, and `_short` or `_distilled` where that
        recipe stood in for the row's own.
      dataset: what it was trained on.
      accuracy: top-1 of this file on the test images in percent, as `evaluate.py` prints it.
      over_seeds: top-1 in percent of each seed that was trained, for the epoch of `epoch`.
      epoch: whether `over_seeds` is after the `"best"` epoch on the test images or the `"final"`.
      parameters: of the network.
      multiply_adds: per image.
      bytes: of its file.
      recipe: as `train.py --config` takes it.
      reported: top-1 in percent that was published for this network; None if none was.
      stand_in: the name of the recipe that stood in for the row's own, or nothing; its results
        are in the folder of that name.
      row, table, result: what all of that is taken from, see `shiftnet.results`.
    """

    name: str
    dataset: str
    accuracy: float
    over_seeds: tuple[float, ...]
    epoch: str
    parameters: int
    multiply_adds: int
    bytes: int
    recipe: str
    reported: float | None
    stand_in: str
    row: Row = dataclasses.field(repr=False)
    table: Table = dataclasses.field(repr=False)
    result: Mapping[str, Any] = dataclasses.field(repr=False)


class Models(list[Model]):
    """Networks, which print as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no trained network matches"
        head = ("name", "data set", "top-1, %", "over seeds", "parameters", "bytes", "recipe")
        rows: list[tuple[object, ...]] = [head]
        for model in self:
            rows.append(
                (
                    model.name,
                    model.dataset,
                    f"{model.accuracy:.2f}",
                    f"{results.mean_and_spread(model.over_seeds)} (n={len(model.over_seeds)})",
                    model.parameters,
                    model.bytes,
                    model.recipe,
                )
            )
        return tables.aligned(rows)


def list_models(pattern: str = "*", *, folder: Path = FOLDER) -> Models:
    """Lists the trained networks, in the order of the results' tables.

    Args:
      pattern: of their names, with wildcards, such as `"*c100*"`.
      folder: of results.

    Raises:
      UserError: if a file there is damaged.
    """
    found = Models()
    for table, row, stand_in, name in results.networks(folder):
        if fnmatch.fnmatchcase(name, pattern) and (model := _model(table, row, stand_in, folder)):
            found.append(model)
    return found


def get(name: str, *, folder: Path = FOLDER) -> Model | None:
    """Returns the network of a name; None if there is none that was trained.

    Raises:
      UserError: if a file there is damaged.
    """
    for table, row, stand_in, own_name in results.networks(folder):
        if own_name == name:
            return _model(table, row, stand_in, folder)
    return None


def _model(table: Table, row: Row, stand_in: str, folder: Path) -> Model | None:
    result = results.read(folder / stand_in, row.name)
    if result is None or not result.get("checkpoint"):
        return None
    kept = result["checkpoint"]
    epoch = "final" if stand_in else table.epoch
    recipe = row.recipe
    if stand_in:
        recipe += f"{',' if ':' in recipe else ':'}recipe={stand_in}"
    return Model(
        name="_".join(filter(None, (row.name, stand_in))),
        dataset=result["config"]["data"]["name"],
        accuracy=100 * kept["test_accuracy"],
        over_seeds=tuple(results.accuracies(result, epoch)),
        epoch=epoch,
        parameters=result["parameters"],
        multiply_adds=result["multiply_adds"],
        bytes=kept["bytes"],
        recipe=recipe,
        reported=row.reported,
        stand_in=stand_in,
        row=row,
        table=table,
        result=result,
    )
