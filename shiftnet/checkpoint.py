"""Checkpoints on disk: Orbax directories that contain their own recipe.

A run keeps up to three kinds in its working directory: `checkpoints/<step>` to continue from,
`best/<step>` with the most accurate network, and `ema/<step>` with the averaged network, where a
run averages; what reads the run then takes that one. Each checkpoint holds

- `model`: the parameters and running statistics, by their dotted names in the network;
- `optimizer`: the optimiser's state, in `checkpoints/` only;
- `ema`: the averages of parameters and running statistics, in `checkpoints/` of a run with them;
- `levels`: the codes of low-bit weights at the end of the last epoch, by layer, so that a continued
  run logs the same changes; in `checkpoints/` only;
- metadata (JSON): the recipe, the classes' names, the normalisation, the step, the accuracies, and
  the position of the data iterator;
- `digests.json`: the SHA-256 of every other file, written last. Orbax restores an array with a
  flipped bit as other numbers, without an error (0.12.8), so these are compared before reading.

A network alone can also lie in one `.safetensors` file (`write_file`), with the same names and
metadata, from which a run can start as from any other checkpoint.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from shiftnet import tensor_file
from shiftnet.errors import RunFailed, UserError
from shiftnet.files import path_of, sha256_of, write_atomically

LATEST, BEST, AVERAGED = "checkpoints", "best", "ema"
DIGESTS = "digests.json"
FILE_FORMAT = "shiftnet checkpoint 1"  # of a network in one file
UNSEALED = ".unsealed"
# The metadata that a network cannot be built or fed without.
REQUIRED = ("config", "class_names", "mean", "std")
# Orbax takes these for a pattern or a URL (etils 1.15), TensorStore a backslash for a slash, and
# names that are not UTF-8 for an error (0.1.86).
UNSAFE = re.compile(r"[*?\[\]\\\udc80-\udcff]|:(/|$)")
# A run that is training may replace its checkpoints this often while one is read.
ATTEMPTS = 20

# Orbax also logs the traceback of an error that it raises.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
      path: its directory.
      arrays: the network's parameters and running statistics by dotted name.
      metadata: what else it holds, see the module's description.
    """

    path: Path
    arrays: Mapping[str, jax.Array]
    metadata: Mapping[str, Any]


def to_arrays(*states: nnx.State) -> dict[str, jax.Array]:
    """Joins states into one flat dictionary by dotted name, for example `"layer1.0.bn1.scale"`."""
    return {
        ".".join(map(str, path)): leaf.get_value()
        for state in states
        for path, leaf in nnx.to_flat_state(state)
    }


def from_arrays(state: nnx.State, arrays: Mapping[str, jax.Array], source: Any) -> nnx.State:
    """A copy of `state` with its values taken from `arrays`; `source` is named in errors.

    Raises:
      UserError: where an array is missing or has another shape.
    """
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name not in arrays:
            raise UserError(f"{source}: the network needs {name!r}, which the checkpoint lacks")
        if arrays[name].shape != leaf.shape:
            raise UserError(
                f"{source}: {name!r} has shape {arrays[name].shape} in the checkpoint, "
                f"the network needs {leaf.shape}"
            )
        leaves.append((path, leaf.replace(arrays[name])))
    return nnx.from_flat_state(leaves)


class CheckpointManager:
    """The newest checkpoints of one kind in one run.

    A checkpoint is written as `<step>.unsealed`. Once its arrays were opened, and all its files,
    read back from the disk, have their digests beside them, it is renamed to `<step>`; only then
    are older ones deleted. In a job of several processes all call each method; the first one
    decides and deletes.

    Args:
      directory: the parent of all steps' directories.
      keep: how many good ones to keep.

    Raises:
      UserError: if a job of several processes cannot write there.
    """

    def __init__(self, directory: Path, keep: int = 1):
        self.directory = directory.absolute()
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if jax.process_count() > 1 and (found := UNSAFE.search(str(self.directory))):
            raise UserError(
                f"the path {str(self.directory)!r} contains {found.group()!r}: "
                "several processes cannot write checkpoints there"
            )
        if jax.process_index() == 0:
            for unfinished in self.directory.glob(f"*{UNSEALED}*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def newest_good(self) -> tuple[int | None, list[str]]:
        """Finds the newest checkpoint that is not damaged.

        Returns:
          Its step, None if there is no checkpoint, and a sentence on each that was skipped.

        Raises:
          UserError: if there are checkpoints, but all of them are damaged.
        """
        good, skipped = -1, []
        if jax.process_index() == 0:
            for path in _steps(self.directory):
                reason = verify(path)
                if reason is None:
                    good = int(path.name)
                    break
                skipped.append(f"skipped {path}: {reason}")
            if good < 0 and skipped:
                good = -2
        if jax.process_count() > 1:
            good = int(multihost_utils.broadcast_one_to_all(np.int32(good)))
        if good == -2:
            raise UserError(
                f"no checkpoint in {self.directory} can be continued from ({'; '.join(skipped)}): "
                "remove the directory to start anew"
            )
        return None if good < 0 else good, skipped

    def path(self, step: int) -> Path:
        """Returns the directory of a step's checkpoint."""
        return self.directory / str(step)

    def save(self, step: int, metadata: Mapping[str, Any], **parts: Any) -> None:
        """Writes pytrees of arrays (`model=`, `optimizer=`), in the background if possible.

        On CPU it waits: there the host's copy of an array may be the array itself, which the next
        training step overwrites. A good checkpoint of this step stays as it is: the same step of
        the same run is the same state.

        Raises:
          RunFailed: if this checkpoint, or the one before, could not be written.
        """
        self.wait()
        if self.has_good(step):
            return
        self._start(step, metadata, parts)
        if jax.default_backend() == "cpu":
            try:
                self.wait()
            except RunFailed:
                if jax.process_count() > 1:  # the others may have no reason to try again
                    raise
                self._start(step, metadata, parts)  # Orbax gives up if the clock jumps meanwhile
                self.wait()

    def restore(self, step: int, **like: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Reads parts in the shapes, dtypes and shardings of `like`, and the metadata."""
        with _safe(self.path(step)) as path:
            parts = ocp.load_checkpointables(path, like)
        return parts, self.metadata(step)

    def metadata(self, step: int) -> Mapping[str, Any]:
        """Reads the metadata of a step's checkpoint."""
        return read_metadata(self.path(step))

    def delete(self, *, before: int = 0, after: int | None = None) -> None:
        """Deletes the checkpoints of the steps before one, and of those after another."""
        if jax.process_index() == 0:
            for path in _steps(self.directory):
                if int(path.name) < before or (after is not None and int(path.name) > after):
                    _remove(path)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is sealed.

        Raises:
          RunFailed: if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread that writes."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def has_good(self, step: int) -> bool:
        """Whether there is a good checkpoint of a step; all processes get the same answer."""
        good = np.bool_(jax.process_index() == 0 and verify(self.path(step)) is None)
        if jax.process_count() > 1:
            good = multihost_utils.broadcast_one_to_all(good)
        return bool(good)

    def _start(self, step: int, metadata: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        with self._explained(step), contextlib.ExitStack() as stack:
            self.directory.mkdir(parents=True, exist_ok=True)
            directory = stack.enter_context(_safe(self.directory))
            response = ocp.save_checkpointables_async(
                directory / f"{step}{UNSEALED}",
                dict(parts),
                overwrite=True,
                custom_metadata=dict(metadata),
            )
            arrays = {name: _arrays(part) for name, part in parts.items()}
            until_sealed = stack.pop_all()
        self._pending = self._thread.submit(self._seal, step, response, arrays, until_sealed)

    def _seal(
        self,
        step: int,
        response: Any,
        arrays: Mapping[str, Any],
        until_sealed: contextlib.ExitStack,
    ) -> None:
        with self._explained(step), until_sealed:
            response.result()
            if jax.process_index() != 0:
                return
            unsealed = self.directory / f"{step}{UNSEALED}"
            _seal(unsealed, arrays)
            if self.path(step).exists():  # a damaged one
                _remove(self.path(step))
            unsealed.replace(self.path(step))
        steps = _steps(self.directory)
        older = [path for path in steps if int(path.name) < step]
        # Those beyond are of a future that the run went back from.
        beyond = [path for path in steps if int(path.name) > step]
        for path in [*older[max(self._keep - 1, 0) :], *beyond]:
            _remove(path)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            others = [path for path in _steps(self.directory) if path != self.path(step)]
            good = next((path for path in others if verify(path) is None), None)
            last = f"the last good one is {good}" if good else f"{self.directory} has no other"
            raise RunFailed(
                f"cannot write checkpoint {self.path(step)}: {_reason(error)}; {last}"
            ) from error


def verify(path: Path) -> str | None:
    """Compares a checkpoint's files with their digests.

    Returns:
      What is wrong with them, None if all are as they were written.
    """
    try:
        digests = json.loads((path / DIGESTS).read_text())
        known = dict(digests["sha256"])
    except FileNotFoundError:
        return f"it has no {DIGESTS}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {DIGESTS} is damaged"
    for name, digest in known.items():
        try:
            if sha256_of(path / name) != digest:
                return f"its file {name} is damaged: its SHA-256 is not the one in {DIGESTS}"
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror}"
    return None


def find(path: str | os.PathLike[str]) -> Path:
    """Finds the newest sealed checkpoint.

    Args:
      path: a checkpoint, a run's working directory, or a directory of checkpoints.

    Raises:
      UserError: if there is none; it says where it looked.
    """
    found = _newest_first(path)
    return next((each for each in found if (each / DIGESTS).is_file()), found[0])


def read(path: str | os.PathLike[str], sharding: Sharding | None = None) -> Saved:
    """Reads the newest checkpoint that is not damaged; it logs which ones it skipped.

    A run may write and delete checkpoints meanwhile.

    Args:
      path: as for `find`, or a file that `write_file` wrote.
      sharding: of the arrays; by default each is whole on the first device.

    Raises:
      UserError: if there is no checkpoint, all are damaged, or they are not shiftnet's.
    """
    file = path_of(path, "the checkpoint")
    if file.is_file() and (kind := tensor_file.kind_of(file)) and kind.startswith("shiftnet"):
        return _read_file(file.absolute(), kind, sharding)
    for _ in range(ATTEMPTS):
        skipped: list[str] = []
        for candidate in _newest_first(path):
            try:
                saved = _read(candidate, sharding)
            except UserError as error:
                skipped.append(str(error))
            except Exception:
                if candidate.exists():
                    raise
            else:
                for sentence in skipped:
                    logging.getLogger("shiftnet").warning("%s; reading %s", sentence, candidate)
                return saved
            if not candidate.exists():  # its run has written a newer one
                break
        else:
            raise UserError("; ".join(skipped))
    raise UserError(f"the checkpoints in {path} are replaced faster than they can be read")


def read_metadata(path: Path) -> Mapping[str, Any]:
    """Reads the metadata of a checkpoint, as `find` returns it, without checking its files."""
    with _safe(path) as readable:
        return ocp.checkpointables_metadata(readable).custom_metadata


def write(
    directory: str | os.PathLike[str], arrays: Mapping[str, jax.Array], metadata: Mapping[str, Any]
) -> Path:
    """Writes a checkpoint of a network alone, which no run continues from.

    Args:
      directory: the checkpoint to make.
      arrays: as `to_arrays` returns them.
      metadata: as in the other checkpoints.

    Returns:
      The absolute path.

    Raises:
      UserError: if the directory exists, or cannot be written.
    """
    directory = path_of(directory, "the checkpoint").absolute()
    if directory.exists():
        raise UserError(f"{directory} exists; take another place, or remove it")
    unsealed = directory.with_name(f"{uuid.uuid4().hex}{UNSEALED}")  # which `_safe` keeps
    model = dict(arrays)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _safe(directory.parent) as parent:
            ocp.save_checkpointables(
                parent / unsealed.name,
                {"model": model},
                custom_metadata=dict(metadata),
            )
        _seal(unsealed, {"model": _arrays(model)})
        unsealed.replace(directory)
    except Exception as error:
        shutil.rmtree(unsealed, ignore_errors=True)
        raise UserError(f"cannot write {directory}: {_reason(error)}") from error
    return directory


def write_file(path: Path, arrays: Mapping[str, jax.Array], metadata: Mapping[str, Any]) -> None:
    """Writes a checkpoint of a network alone as one `.safetensors` file, in one step.

    Args:
      path: the file, in a directory that exists.
      arrays: as `to_arrays` returns them.
      metadata: as in the other checkpoints.

    Raises:
      UserError: if it cannot be written.
    """
    tensors = {name: np.asarray(array) for name, array in arrays.items()}
    texts = {"metadata": json.dumps(dict(metadata))}
    write_atomically(path, tensor_file.to_bytes(tensors, texts, FILE_FORMAT))


def foreign_file(path: Path) -> UserError:
    """Returns the error for a file in place of a checkpoint."""
    return UserError(
        f"{path} is a file, not a checkpoint of shiftnet's; "
        f"convert one of other code by python -m shiftnet.convert_torch {path}"
    )


def _read_file(path: Path, kind: str, sharding: Sharding | None) -> Saved:
    if kind != FILE_FORMAT:
        raise UserError(
            f"{path} is a packed network, whose batch norms are folded: it can be used, not trained"
        )
    tensors, texts = tensor_file.read(path, FILE_FORMAT)
    try:
        metadata = json.loads(texts["metadata"])
        if {*REQUIRED} - metadata.keys():
            raise ValueError("it is not a network's")
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has metadata that cannot be read: {error}") from error
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    arrays = {name: jax.device_put(array, sharding) for name, array in tensors.items()}
    return Saved(path, arrays, metadata)


def _read(path: Path, sharding: Sharding | None) -> Saved:
    if (reason := verify(path)) is not None and (path / DIGESTS).exists():
        raise UserError(f"checkpoint {path} is damaged: {reason}")
    with _safe(path) as readable:
        found = ocp.checkpointables_metadata(readable)
        metadata = found.custom_metadata
        if (
            not isinstance(metadata, dict)
            or not found.metadata.get("model")
            or {*REQUIRED} - metadata.keys()
        ):
            raise UserError(f"{path} is an Orbax checkpoint, but not one of shiftnet's")
        if reason is not None:
            raise UserError(f"checkpoint {path} cannot be trusted: {reason}")
        sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
        like = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in found.metadata["model"].items()
        }
        arrays = ocp.load_checkpointables(readable, {"model": like})["model"]
    return Saved(path, arrays, metadata)


def _newest_first(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the checkpoints that a path stands for, at least one."""
    path = path_of(path, "the checkpoint").absolute()
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if path.is_file():
        raise foreign_file(path)
    for directory in (path, path / AVERAGED, path / LATEST):
        # ocp.is_orbax_checkpoint also says yes to a directory that holds checkpoints (0.12.8).
        if (directory / "_CHECKPOINT_METADATA").is_file():
            return [directory]
        if steps := _steps(directory):
            return steps
    raise UserError(
        f"no checkpoint in {path}: expected a run's working directory, "
        f"its {LATEST}/ or {BEST}/, or one step in those"
    )


def _steps(directory: Path) -> list[Path]:
    """Returns the checkpoints in a directory, the newest first."""
    found = [entry for entry in directory.glob("[0-9]*") if entry.name.isdecimal()]
    return sorted(found, key=lambda entry: int(entry.name), reverse=True)


def _remove(path: Path) -> None:
    """Deletes a checkpoint, which no reader sees in parts."""
    removed = path.with_name(f"{path.name}{UNSEALED}.removed")
    with contextlib.suppress(OSError):
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def _safe(directory: Path) -> Iterator[Path]:
    """Gives a directory another name if Orbax cannot take its own."""
    if not UNSAFE.search(str(directory)):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="shiftnet-") as folder:
        link = Path(folder) / "checkpoint"
        link.symlink_to(directory, target_is_directory=True)
        yield link


def _arrays(part: Any) -> list[tuple[tuple[int, ...], str]]:
    """Returns the shapes and dtypes of a pytree's arrays, in an order that containers leave."""
    return sorted((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(part))


def _seal(path: Path, arrays: Mapping[str, Any]) -> None:
    """Opens a checkpoint's arrays, reads its files back and writes their digests beside them."""
    with _safe(path) as readable:
        found = ocp.checkpointables_metadata(readable).metadata
    for name, expected in arrays.items():
        if _arrays(found.get(name)) != expected:
            raise OSError(f"the arrays of {name} cannot be opened after they were written")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != DIGESTS)
    digests = {str(file.relative_to(path)): sha256_of(file) for file in files}
    write_atomically(path / DIGESTS, json.dumps({"sha256": digests}, indent=1))


def _reason(error: Exception) -> str:
    """Returns the line of an error that says why a checkpoint cannot be written."""
    # A full disk comes as whatever the layer that met it raises.
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "space" in line), lines[0]).strip()[:300]
