"""Arrays and metadata in one `.safetensors` file, with a SHA-256 of each tensor and of the rest.

Any safetensors reader opens such a file. Its metadata has, besides what the writer gives, `format`
(the kind of file), `tensors` (the digests of the tensors, as JSON) and `sha256` (of the other
metadata).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from shiftnet.errors import UserError

SUFFIX = ".safetensors"
# What the Hugging Face hub's layout calls a network's file.
HUB_NAME = "model.safetensors"


def to_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], kind: str) -> bytes:
    """Returns the bytes of a file, the same ones for the same contents.

    The library writes the metadata in an order that changes from one call to the next. So its
    header is written anew here, as JSON with sorted keys, padded to a multiple of 8 bytes.

    Args:
      tensors: by name.
      metadata: texts by name.
      kind: the file's `format`.
    """
    texts = {**metadata, "format": kind, "tensors": json.dumps(_digests(tensors))}
    texts["sha256"] = digest_of_text(texts)
    content = safetensors.numpy.save(dict(tensors), texts)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":"))
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + content[start:]


def kind_of(path: Path) -> str | None:
    """Returns the `format` in a file's metadata; None if there is none, or it is no such file."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def read(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a file that `to_bytes` made: its tensors and its metadata.

    Args:
      path: the file.
      kind: the `format` that is expected.

    Raises:
      UserError: if it is not one, or was cut off or changed; the message names the tensor.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:  # perhaps with dtypes that NumPy lacks
                raise UserError(
                    f"{path} is a safetensors file, but not one of shiftnet's; "
                    f"convert it by python -m shiftnet.convert_torch {path}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UserError:
        raise
    except (AttributeError, OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from error
    if metadata.get("sha256") != digest_of_text(metadata):
        raise UserError(f"{path} was changed: its metadata does not have its checksum")
    try:
        digests = dict(json.loads(metadata["tensors"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} has metadata that cannot be read: {error}") from error
    for name in {**digests, **tensors}:
        if name not in tensors or name not in digests or _digest(tensors[name]) != digests[name]:
            raise UserError(f"{path} was changed: tensor {name!r} does not have its checksum")
    return tensors, metadata


def digest_of_text(metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256 of all metadata but the entry `sha256`, in hexadecimal."""
    others = {name: text for name, text in metadata.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _digests(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: _digest(array) for name, array in tensors.items()}


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
