"""Paths as people type them, and files that are replaced in one step."""

import glob
import os
import re
import uuid
from pathlib import Path

from shiftnet.errors import UserError


def path_of(text: str | os.PathLike[str], what: str) -> Path:
    """Returns the local path that a person typed, with a leading `~` or `~name` expanded.

    Args:
      text: the path as typed.
      what: the option, field or argument it was given for, named in errors.

    Raises:
      UserError: if it is a URL, or there is no such home directory.
    """
    typed = os.fspath(text)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", typed):
        raise UserError(f"{what} must be a local path, found the URL {typed!r}")
    if not typed.startswith("~"):  # Path takes the dot from ./~
        return Path(typed)
    try:
        return Path(typed).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what} is {typed!r}, but there is no such home directory") from error


def expand_pattern(text: str | os.PathLike[str], what: str) -> list[Path]:
    """Returns the path that was typed if it exists, otherwise all paths that it matches as a glob.

    Args:
      text, what: as for `path_of`.

    Raises:
      UserError: as `path_of`, or if a pattern matches nothing.
    """
    path = path_of(text, what)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    matches = sorted(glob.glob(str(path)))
    if not matches:
        raise UserError(f"no file matches {what} {os.fspath(text)!r}")
    return [Path(match) for match in matches]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces a file, so that its readers find the old content or the new, never a part.

    The content is on disk before it takes the file's place, and nothing is left on failure.

    Args:
      path: the file, in a directory that exists.
      content: text is written as UTF-8.

    Raises:
      UserError: if the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # not another writer's
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
