"""Where networks' files are: in the package, in a mirror, or in the cache of what was fetched.

A mirror is a copy of the folder of results, large files included. `SHIFTNET_ZOO` names one, as a
folder or a URL. What comes from a URL is kept in `~/.cache/shiftnet/zoo`. Every file from outside
the package is compared with the SHA-256 in its result file each time it is opened.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftnet.errors import UserError
from shiftnet.files import download, path_of, sha256_of, write_atomically
from shiftnet.zoo.index import FOLDER, Model

MIRROR = "SHIFTNET_ZOO"


def can_be_had(model: Model, entry: Mapping[str, Any]) -> bool:
    """Tells whether a network's file is in the package, or a mirror or an address is known."""
    here = FOLDER / model.stand_in / entry["file"]
    return here.is_file() or bool(os.environ.get(MIRROR) or entry.get("url"))


def fetch(model: Model, entry: Mapping[str, Any]) -> Path:
    """Returns the local path of one of a network's files.

    Args:
      model: whose.
      entry: of its result, with `file`, `bytes`, and `sha256` (and `url`) if it may be elsewhere.

    Raises:
      UserError: if it is not here and cannot be fetched, or has another digest.
    """
    file = Path(model.stand_in, entry["file"])
    here = FOLDER / file
    if here.is_file():
        return here
    mirror, sha256 = os.environ.get(MIRROR, ""), entry.get("sha256")
    if not can_be_had(model, entry) or not sha256:
        raise UserError(
            f"{model.name} is not part of the package ({file}, {entry['bytes']:,} bytes); "
            f"set {MIRROR} to a folder or URL that has it"
        )
    if mirror and "://" not in mirror:
        path = path_of(mirror, MIRROR) / file
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected {model.name} in the mirror {MIRROR}")
        if (found := sha256_of(path)) != sha256:
            raise UserError(f"{path} has SHA-256 {found}, expected {sha256}")
        return path
    url = f"{mirror.rstrip('/')}/{file.as_posix()}" if mirror else entry["url"]
    path = _cache() / f"{model.name}-{sha256[:16]}.safetensors"
    if not path.is_file() or sha256_of(path) != sha256:
        content = download(url, sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        write_atomically(path, content)
    return path


def _cache() -> Path:
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(
            "there is no home directory to keep downloads in; set XDG_CACHE_HOME"
        ) from error
    return Path(home) / "shiftnet" / "zoo"
