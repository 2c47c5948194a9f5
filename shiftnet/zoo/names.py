"""From what people type to a file: a path, a trained network's name, or `hf://owner/name`."""

import difflib
import os
import re
from pathlib import Path

from shiftnet import results
from shiftnet.errors import UserError
from shiftnet.files import expand_pattern, path_of
from shiftnet.tensor_file import SUFFIX
from shiftnet.zoo import hub, storage
from shiftnet.zoo.index import FOLDER, Model, get, list_models


def find(typed: str | os.PathLike[str], what: str = "the checkpoint") -> Path:
    """Returns the local path that `typed` stands for; it is fetched first if it must be.

    A path that exists wins over a name. What is neither is returned as it is if it cannot be a
    name, so that what opens it says what is wrong with it.

    Args:
      typed: a path, a name, or `hf://owner/name` or `hf://owner/name@revision`.
      what: the option or argument it was given for, named in errors.

    Raises:
      UserError: if it looks like a name and there is no such network, or it cannot be fetched.
    """
    if hub.is_address(typed):
        return hub.fetch(os.fspath(typed))
    model = named(typed, what)
    if model is None:
        return path_of(typed, what)
    return file_of(model)


def file_of(model: Model) -> Path:
    """Returns the local path of a trained network's packed file.

    Raises:
      UserError: if it is not here and cannot be fetched.
    """
    return storage.fetch(model, model.result["checkpoint"])


def find_all(pattern: str, what: str) -> list[Path]:
    """Returns all paths that `find` gives for a pattern, of paths or else of names.

    Raises:
      UserError: as `find`, or if the pattern matches nothing.
    """
    if hub.is_address(pattern) or named(pattern, what) is not None:
        return [find(pattern, what)]
    try:
        return expand_pattern(pattern, what)
    except UserError:
        models = list_models(pattern)
        if not models:
            raise
        return [file_of(model) for model in models]


def find_trainable(typed: str | os.PathLike[str], what: str) -> Path:
    """Returns the path of what a run can start from.

    As `find`, but of a name the file with its batch norms, where it was kept and can be had.

    Raises:
      UserError: as `find`.
    """
    model = named(typed, what)
    if model is None:
        return find(typed, what)
    trainable = model.result["checkpoint"].get("trainable")
    if trainable is None or not storage.can_be_had(model, trainable):
        return file_of(model)
    return storage.fetch(model, trainable)


def named(typed: str | os.PathLike[str], what: str) -> Model | None:
    """Returns the network that was named; None for what is a path, or cannot be a name.

    Raises:
      UserError: for what could be a name, but is none.
    """
    name = os.fspath(typed)
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        return None
    if os.path.exists(path_of(typed, what)):  # False for a name that no file system takes
        return None
    if model := get(name):
        return model
    trained = {model.name: model for model in list_models()}
    if any(row.name == name for table in results.tables(FOLDER) for row in table.rows):
        others = [model.name for model in trained.values() if model.row.name == name]
        hint = f"did you mean {others[0]}?" if others else "shiftnet models lists what has"
        raise UserError(f"{name} has not been trained yet; {hint}")
    close = difflib.get_close_matches(name.lower().removesuffix(SUFFIX), trained, n=1)
    hint = f"did you mean {close[0]}?" if close else "shiftnet models lists them"
    raise UserError(f"{name} does not exist, and no trained network has that name; {hint}")
