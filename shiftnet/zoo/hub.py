"""Fetches networks from the Hugging Face hub, by `huggingface_hub` where it is installed."""

import os
import re
from pathlib import Path

from shiftnet import tensor_file
from shiftnet.errors import UserError

ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_address(typed: str | os.PathLike[str]) -> bool:
    """Tells whether something was named by an address in the hub."""
    return os.fspath(typed).startswith("hf://")


def fetch(address: str) -> Path:
    """Returns the local path of the network at `hf://owner/name` or `hf://owner/name@revision`.

    `huggingface_hub` keeps it in its cache, where it is found without a network too.

    Raises:
      UserError: if that package is not installed, or the network cannot be had.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"expected hf://owner/name or hf://owner/name@revision, found {address!r}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f'{address} needs huggingface_hub, which is not installed: pip install "shiftnet[hub]"'
        ) from error
    try:
        path = huggingface_hub.hf_hub_download(
            match["repository"], tensor_file.HUB_NAME, revision=match["revision"]
        )
    except Exception as error:  # its own kinds, those of its HTTP library, and the system's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{address} cannot be had: {reason}") from error
    return Path(path)
