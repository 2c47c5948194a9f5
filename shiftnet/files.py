"""Paths as people type them, downloads, and files that are replaced in one step."""

import glob
import hashlib
import http.client
import os
import re
import urllib.request
import uuid
from pathlib import Path

from shiftnet.errors import UserError


def path_of(text: str | os.PathLike[str], what: str) -> Path:
    """Returns the local path that a person typed, with a leading `~` or `~name` expanded.

    One like `./~` becomes an absolute path, since Path takes the dot from it.

    Args:
      text: the path as typed.
      what: the option, field or argument it was given for, named in errors.

    Raises:
      UserError: if it is a URL, or there is no such home directory.
    """
    typed = os.fspath(text)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", typed):
        raise UserError(f"{what} must be a local path, found the URL {typed!r}")
    if not typed.startswith("~"):
        path = Path(typed)
        return Path.cwd() / path if str(path).startswith("~") else path
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


class NotDownloaded(UserError):
    """What a URL names could not be fetched."""


def download(url: str, sha256: str) -> bytes:
    """Returns what a URL gives.

    Args:
      url: an `http`, `https`, `ftp` or `file` URL.
      sha256: what it must hash to, in lower-case hexadecimal.

    Raises:
      NotDownloaded: if it cannot be fetched.
      UserError: if it has another digest.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    # No such server, no such file there, cut off, or (ValueError) not a URL. URLError, TimeoutError
    # and errors of TLS are OSErrors.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotDownloaded(f"{url} cannot be downloaded ({error})") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(f"{url} has SHA-256 {found}, expected {sha256}; nothing was kept")
    return content


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in lower-case hexadecimal.

    Raises:
      OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_place(path: Path, what: str) -> None:
    """Refuses a path that `write_atomically` could not write, before the work that leads to it.

    Args:
      path: of the file.
      what: the option that it was given for, named in errors.

    Raises:
      UserError: if it is a directory, or lies in none.
    """
    if path.is_dir():
        raise UserError(f"{what} {path} is a directory, expected a file")
    if not path.parent.is_dir():
        raise UserError(f"{what} {path} must lie in a directory that exists")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces a file, so that its readers find the old content or the new, never a part.

    The content is on disk before it takes the file's place, and nothing is left on failure. A link
    stays, and the file that it names is replaced; a device or a pipe is written into.

    Args:
      path: the file, in a directory that exists.
      content: text is written as UTF-8; names of files that are not keep their bytes.

    Raises:
      UserError: if the file cannot be written.
    """
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")  # not another writer's
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
