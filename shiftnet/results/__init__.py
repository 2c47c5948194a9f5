"""The results: a table of what is to be reproduced, and one JSON file for each row that was.

A folder of results holds `table.toml`, the rows with what was reported for them; `NAME.json` for
each row that was trained, written by `python -m shiftnet reproduce` and never by hand; and
`NAME.safetensors`, the network of its first seed, which `evaluate.py --ckpt` takes, packed;
`trainable/NAME.safetensors` is the same network as float32 numbers with its batch norms, which
`train.py --init` takes. A file of more than 5 MB is in `large/`, which is no part of the
repository. The folder `smoke/` holds such files of shortened schedules, and `short/` and
`distilled/` those of the recipes of these names.

The same folder is `shiftnet/zoo/results`, a link in a checkout; a wheel has the table, the JSON
files and the packed networks of up to 5 MB there.

A row's JSON file:

- `row`: its name; `recipe`: the name of the recipe that stood in for its own, or nothing;
- `config`: the recipe (an object; its `seed` is of no meaning); `class_names`;
- `epochs`: how many the recipe has; `full_epochs`: how many the row's own has, more where the
  schedule was shortened;
- `init`: `network` (its name; `row` in older files) and `sha256` of what the training started from;
  null for none; `teacher`: likewise of the packed network that it learned from, only if it did;
- `parameters`, `multiply_adds` (an image), `bytes` (of all parameters, low-bit weights packed);
- `runs`: a list, one for each seed:
    - `seed`; `epochs`: a list of the lines of its `metrics.jsonl`, one an epoch, without `time`;
    - `final_accuracy`, `best_accuracy` (fractions of the test set, after the last epoch and after
      the best) and `best_epoch`;
    - `together`: how many seeds were trained in one program; `seconds`: what those took together,
      compilation, evaluation and checkpoints included; `images_per_second`: of all of them, the
      median over the epochs; `fraction_of_peak`: the arithmetic of the products, three times the
      forward pass's, as a fraction of the device's peak, null where that is not known;
    - `device`, `versions` (by package), `commit` (of the code, `-dirty` where it was changed; null
      where that is not known); `earlier`: such three of other visits that trained it before, where
      any of them differed; `finished` (when, UTC);
- `checkpoint`: of the network that is kept: `file` (from the JSON file's folder on), `bytes`,
  `sha256`, `seed`, `epoch`; `test_accuracy`, as `evaluate.py` finds it in that file, and
  `confusion`, a list of `[label, prediction, images]` for what occurs, both with products in
  float32 on `device`; `trainable`: `file`, `bytes` and `sha256` of the other file. (Until 2026-11
  there were no `sha256`, `device` and `trainable`, and a GPU rounded products.)
"""

import dataclasses
import json
import math
import re
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftnet.config import CIFAR_RECIPES
from shiftnet.errors import UserError
from shiftnet.files import write_atomically

TABLE = "table.toml"
OTHERS = "others.toml"
EPOCHS = ("best", "final")

# What must be there, and of which types; numbers are finite and not negative.
_NUMBER = (int, float)
_ROW = {"name": str, "recipe": str, "parameters": int, "multiply_adds": int, "bytes": int}
_RESULT = {"config": dict, "class_names": list, "epochs": int, "full_epochs": int, "runs": list}
_RUN = {
    "seed": int,
    "final_accuracy": _NUMBER,
    "best_accuracy": _NUMBER,
    "together": int,
    "seconds": _NUMBER,
    "device": str,
    "epochs": list,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A network to train, and what was reported for it.

    Attributes:
      name: of its files.
      recipe: as `train.py --config` takes it, from the top of the checkout.
      parameters: of the network.
      multiply_adds: an image.
      bytes: of all parameters, low-bit weights packed.
      reported: top-1 on the test set in per cent; None where nothing was.
      spread: the standard deviation that was reported with it.
      older: what an older version of the source reports instead.
      note: a sentence on what is odd about it, or nothing.
      init: the name of the network that its training starts from, as `networks` has it, or
        nothing.
    """

    name: str
    recipe: str
    parameters: int
    multiply_adds: int
    bytes: int
    reported: float | None = None
    spread: float | None = None
    older: float | None = None
    note: str = ""
    init: str = ""


@dataclasses.dataclass(frozen=True)
class Other:
    """A public network of others on CIFAR-100, to compare with.

    Attributes:
      name: short.
      accuracy: top-1 on the test set in per cent.
      bytes: of its parameters at their width.
      source: where both are stated.
    """

    name: str
    accuracy: float
    bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that were reported in one place.

    Attributes:
      name: short, unique.
      title: for a heading.
      source: where the numbers come from.
      epoch: whether they are the accuracy after the `best` epoch or after the `final` one.
      note: sentences on the table, or nothing.
      rows: in the source's order.
    """

    name: str
    title: str
    source: str
    epoch: str
    note: str
    rows: tuple[Row, ...]


def tables(folder: Path) -> list[Table]:
    """The tables that `folder` lists.

    Raises:
      UserError: where there is no such list, or it is not what it should be.
    """
    path = folder / TABLE
    try:
        found = [
            Table(**{**table, "rows": tuple(Row(**row) for row in table["rows"])})
            for table in tomllib.loads(path.read_text())["tables"]
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for table in found:
        for row in table.rows:
            numbers = {n: getattr(row, n) for n in ("reported", "spread", "older")}
            given = {n: value for n, value in numbers.items() if value is not None}
            if lacking := _lacking({**vars(row), **given}, _ROW | dict.fromkeys(given, _NUMBER)):
                raise UserError(f"{path}: in the row {row.name!r} {lacking}")
            if not re.fullmatch(r"\w[\w.-]*", row.name):  # it becomes a file's
                raise UserError(f"{path}: {row.name!r} is no name for a row")
        if table.epoch not in EPOCHS:
            raise UserError(f"{path}: epoch must be best or final, found {table.epoch!r}")
    names = [row.name for table in found for row in table.rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has two rows named {min(twice)}")
    known = {name for *_, name in _networks(found)}
    for table in found:
        for row in table.rows:
            if row.init and row.init not in known:
                raise UserError(f"{path}: {row.name} starts from {row.init!r}, which is no row")
    return found


def networks(folder: Path) -> Iterator[tuple[Table, Row, str, str]]:
    """Every network that there may be: its row, the recipe that stood in for its own, its name.

    The name is the row's, with `_RECIPE` behind it where another recipe stood in; the results of
    that recipe are in the folder of its name.

    Raises:
      UserError: where there is no table, or it is not what it should be.
    """
    return _networks(tables(folder))


def _networks(found: Sequence[Table]) -> Iterator[tuple[Table, Row, str, str]]:
    for table in found:
        for row in table.rows:
            for stand_in in ("", *CIFAR_RECIPES):
                yield table, row, stand_in, "_".join(filter(None, (row.name, stand_in)))


def others(folder: Path) -> list[Other]:
    """The networks of others that `folder` lists in `others.toml`, if it does.

    Raises:
      UserError: where it is not what it should be.
    """
    path = folder / OTHERS
    try:
        found = [Other(**entry) for entry in tomllib.loads(path.read_text())["networks"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    kinds = {"name": str, "accuracy": _NUMBER, "bytes": int, "source": str}
    for other in found:
        if lacking := _lacking(vars(other), kinds):
            raise UserError(f"{path}: of {other.name!r} {lacking}")
    return found


def path_of(folder: Path, row: str) -> Path:
    """Where a row's result is."""
    return folder / f"{row}.json"


def read(folder: Path, row: str) -> dict[str, Any] | None:
    """A row's result, None where there is none.

    Raises:
      UserError: where it is damaged.
    """
    path = path_of(folder, row)
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(result, dict) or result.get("row") != row or not result.get("runs"):
        raise UserError(f"{path} is not the result of row {row}")
    if flaw := next(filter(None, _flaws(result)), None):
        raise UserError(f"{path} is damaged: {flaw}")
    return result


def _flaws(result: Mapping[str, Any]) -> Iterator[str | None]:
    """Yields what is wrong with a result, or None, of one thing after the other."""
    yield _lacking(result, _RESULT)
    if (kept := result.get("checkpoint")) is not None:
        lacking = _lacking(kept, {"file": str})
        yield lacking and f"in checkpoint {lacking}"
    for run in result["runs"]:
        yield _lacking(run, _RUN)
        for name in ("final_accuracy", "best_accuracy"):
            yield f"{name} is {run[name]}" if run[name] > 1 else None
        for name in ("seconds", "together"):
            yield f"{name} is 0" if not run[name] else None
        earlier = run.get("earlier", [])
        if not isinstance(earlier, list) or not all(isinstance(one, Mapping) for one in earlier):
            yield f"earlier is {earlier!r:.40}"
    seeds = [run["seed"] for run in result["runs"]]
    yield "two runs have the same seed" if len(set(seeds)) < len(seeds) else None


def _lacking(found: Any, fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field that is; None where all are there."""
    if not isinstance(found, Mapping):
        return "there are no fields"
    for name, kind in fields.items():
        if name not in found:
            return f"{name} is missing"
        value = found[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {value!r:.40}"
        if isinstance(value, _NUMBER) and not 0 <= value < math.inf:
            return f"{name} is {value}"
    return None


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes a row's result, in one step.

    Raises:
      UserError: where it cannot be written.
    """
    path = path_of(folder, result["row"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    write_atomically(path, _readable(result) + "\n")


def accuracies(result: Mapping[str, Any], epoch: str) -> list[float]:
    """Of each run the accuracy after its `best` or its `final` epoch, in per cent."""
    return [100 * run[f"{epoch}_accuracy"] for run in result["runs"]]


def devices(run: Mapping[str, Any]) -> list[str]:
    """What a run was trained on, each once."""
    return _of_visits(run, "device")


def commits(run: Mapping[str, Any]) -> list[str]:
    """The commits whose code trained a run, each once, `-dirty` where it was changed."""
    return _of_visits(run, "commit")


def _of_visits(run: Mapping[str, Any], fact: str) -> list[str]:
    visits = (*run.get("earlier", ()), run)
    return list(dict.fromkeys(visit[fact] for visit in visits if visit.get(fact)))


def mean_and_spread(values: Sequence[float]) -> str:
    """`"65.83"`; of several values with the sample's standard deviation, `"65.83 ± 0.21"`."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _readable(value: Any, indent: str = "") -> str:
    """JSON with a line for each member, but lists and objects inside lists on one line each."""
    if isinstance(value, Mapping) and value:
        inner = [
            f"{indent} {json.dumps(key)}: {_readable(item, indent + ' ')}"
            for key, item in value.items()
        ]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if (
        isinstance(value, Sequence)
        and value
        and isinstance(value[0], Mapping)
        and "seed" in value[0]
    ):
        inner = [f"{indent} {_readable(item, indent + ' ')}" for item in value]
        return "[\n" + ",\n".join(inner) + f"\n{indent}]"
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        return "[\n" + ",\n".join(f"{indent} {json.dumps(v)}" for v in value) + f"\n{indent}]"
    return json.dumps(value)
