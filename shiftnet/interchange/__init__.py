"""Networks to and from other codes: reads PyTorch's files, .safetensors and .npz without PyTorch,
and writes arrays under the originals' names and programs that run elsewhere.

A file is data here, never a program: `pickles.py` says how, and `limits.py` what it may ask for.

| file | what it is |
|---|---|
| `limits.py` | limits, and how a file is refused |
| `pickles.py` | the pickle interpreter |
| `tensors.py` | what PyTorch's pickles may build: storages and tensors |
| `beside.py` | what else they may hold: dates, paths, NumPy's numbers |
| `zips.py` | zip files |
| `containers.py` | PyTorch's two file formats |
| `plain.py` | .npz and .safetensors |
| `networks.py` | where the network lies in a checkpoint |
| `recognition.py` | which network it is |
| `torch_names.py` | the originals' names and layouts |
| `convert.py` | a file of others becomes a network with its metadata |
| `originals.py` | and back: a network's arrays under the originals' names |
| `stablehlo.py`, `onnx.py` | a network as a program |
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from shiftnet.errors import UserError
from shiftnet.interchange.containers import Pickled, read_legacy, read_zip
from shiftnet.interchange.limits import MAX_FILE, Clock, Refusal, short
from shiftnet.interchange.networks import (
    PLACES,
    Copies,
    facts,
    find,
    is_network,
    without_prefix,
)
from shiftnet.interchange.plain import comment, read_npz, read_safetensors
from shiftnet.interchange.zips import Zip

# How a message of the net at the bottom of `read` ends; the fuzz run counts those.
UNFORESEEN = "which this reader did not foresee"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a file holds.

    Attributes:
      arrays: the network's tensors by their names in a state dict, in the file's order, without
        the `module.`, `_orig_mod.` or `model.` of what wraps a network. In the type of the file,
        but bfloat16 as float32. Two names of one tensor share one array.
      facts: what stands beside the network as a plain value, such as `acc`, `epoch` and `arch`.
        Of a .safetensors file its metadata, of an .npz file those in its comment.
      modules: where a whole module was pickled, the class of every module by its path; that of
        the root is `""`.
      fields: the plain attributes of those modules, such as `stride` and `in_channels`: numbers,
        texts, and tuples of them.
      ignored: the names of what else stands beside the network, such as `optimizer`.
      networks: those of them that hold another network, such as an average of the weights.
      format: what the file is, for people.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, object]
    modules: Mapping[str, str]
    fields: Mapping[str, Mapping[str, object]]
    ignored: tuple[str, ...]
    networks: tuple[str, ...]
    format: str


def read(path: str | PathLike[str], entry: str | None = None) -> Foreign:
    """Reads a file of weights; its format is found from its content.

    Nothing that the file holds is run, and nothing is written. Memory and time are bounded, see
    `limits.py`.

    Args:
      path: a PyTorch file (a checkpoint with the network under `net`, `state_dict`, `model` and
        the like, a state dict, or a whole pickled module; zip or the older format; written by
        Python 2 or 3), a .safetensors file, or an .npz file.
      entry: the entry of a PyTorch checkpoint that holds the network; None looks for it.

    Raises:
      UserError: where it is none of these, is broken or over a limit, or asks for more than data.
    """
    try:
        return _read(Path(path), entry)
    except Refusal as refusal:
        raise UserError(f"{path}: refused, {refusal}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from None
    # A net below the checks, so that no file can choose what a caller must catch. It is meant to
    # hold nothing (a machine without memory left apart): the fuzz run fails if anything falls in.
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{path}: refused, it led to {kind}, {UNFORESEEN}") from error


def _read(path: Path, entry: str | None) -> Foreign:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise Refusal("expected a file, found a folder or device")
    if path.stat().st_size > MAX_FILE:
        raise Refusal(f"it has more than {MAX_FILE} bytes")
    data = path.read_bytes()
    if not data:
        raise Refusal("it is empty")

    clock = Clock()
    if data.startswith(b"PK\x03\x04"):
        archive = Zip(data)
        if any(name.endswith(".npy") for name in archive.sizes):
            return _arrays(read_npz(archive), comment(archive), "NumPy .npz", entry)
        return _network(read_zip(archive, clock), "zip", clock, entry)
    # First, since it starts with a length, which may look like a pickle.
    if data[8:9] == b"{":
        return _arrays(*read_safetensors(path, data), "safetensors", entry)
    if data.startswith(b"\x80"):
        return _network(read_legacy(data, clock), "legacy", clock, entry)
    for kind, found in (("gzip", data[:2] == b"\x1f\x8b"), ("tar", data[257:262] == b"ustar")):
        if found:
            raise Refusal(f"it is a {kind} archive; unpack it and name the checkpoint inside")
    raise Refusal(
        "expected a file of PyTorch, .safetensors or .npz, found one that starts with "
        f"{short(data[:24].decode('latin-1'))}"
    )


def _arrays(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, object], kind: str, entry: str | None
) -> Foreign:
    if entry is not None:
        raise Refusal(f"it has no network under {short(entry)}; it holds one network alone")
    kept, left_out = without_prefix(arrays)
    return Foreign(kept, facts, {}, {}, _few(left_out), (), kind)


def _network(file: Pickled, container: str, clock: Clock, entry: str | None) -> Foreign:
    network, rest = find(file.top, entry)
    tensors, left_out = without_prefix(network.tensors)
    copies = Copies(file.unpacked, file.data, clock)
    plain, ignored = facts(rest, copies)
    kind = "module pickle" if network.modules else "state dict"
    return Foreign(
        arrays={name: copies.array(tensor) for name, tensor in tensors.items()},
        facts=plain,
        modules=network.modules,
        fields=network.fields,
        ignored=(*_few(left_out), *ignored),
        networks=tuple(n for n in ignored if n in PLACES and is_network(rest[n])),
        format=f"PyTorch {container} {kind}{', Python 2' if file.python2 else ''}",
    )


def _few(names: Sequence[str]) -> tuple[str, ...]:
    """Names, those of one module as one."""
    counts = collections.Counter(name.partition(".")[0] for name in names)
    return tuple(
        dict.fromkeys(
            f"{first}.* ({counts[first]} arrays)" if counts[first] > 3 else name
            for name in names
            for first in (name.partition(".")[0],)
        )
    )
