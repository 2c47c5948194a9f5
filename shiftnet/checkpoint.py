"""Checkpoints on disk: Orbax directories that know their own recipe.

A run keeps two series in its working directory: `checkpoints/<step>` to continue from, and
`best/<step>` with the most accurate network. Each checkpoint holds

- `model`: the parameters and running statistics, by their dotted names in the network;
- `optimizer`: the optimiser's state, in `checkpoints/` only;
- `levels`: of networks with low-bit weights, their codes at the end of the last epoch, by layer, so
  that a continued run logs the same changes; in `checkpoints/` only;
- a note (JSON): the recipe, the classes' names, the normalisation, the step, the accuracies, and
  where the reading of files was;
- `digests.json`: the SHA-256 of every other file, written last. Orbax restores an array with a
  flipped bit as other numbers, without a word (0.12.8), so nothing is read before these agree.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
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

from shiftnet.errors import RunFailed, UserError

LATEST, BEST = "checkpoints", "best"
DIGESTS = "digests.json"
# What a note says at least: enough to build the network and to feed it.
NOTED = ("config", "class_names", "mean", "std")

# Orbax also logs the traceback of an error that it raises.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint read for use: its arrays by dotted name, and its note."""

    path: Path
    arrays: Mapping[str, jax.Array]
    note: Mapping[str, Any]


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


class Series:
    """The checkpoints of one kind in one run, the newest few of them.

    A checkpoint is written as `<step>.unsealed`; once all its files, read back from the disk, have
    their digests beside them, it becomes `<step>`. Only then are older ones deleted. In a job of
    several processes all call each method; the first one decides and deletes.

    Args:
      directory: where they go, each under its step.
      keep: how many good ones to keep.
    """

    def __init__(self, directory: Path, keep: int = 1):
        self.directory = directory.absolute()
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if jax.process_index() == 0:
            for unfinished in self.directory.glob("*.unsealed*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def newest_good(self) -> tuple[int | None, list[str]]:
        """The step of the newest good checkpoint, None where there is none, and what was skipped.

        Raises:
          UserError: where there are checkpoints, but all of them are damaged.
        """
        good, skipped = -1, []
        if jax.process_index() == 0:
            for step in sorted(self._steps(), reverse=True):
                reason = flaw(self.path(step))
                if reason is None:
                    good = step
                    break
                skipped.append(f"skipped {self.path(step)}: {reason}")
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
        """Where the checkpoint of a step lies."""
        return self.directory / str(step)

    def save(self, step: int, note: Mapping[str, Any], **parts: Any) -> None:
        """Writes pytrees of arrays (`model=`, `optimizer=`), in the background where it can.

        Not on CPU: there the host's copy of an array may be the array itself, which the next
        training step overwrites. A good checkpoint of this step stays as it is: the same step of
        the same run is the same state.

        Raises:
          RunFailed: where this checkpoint, or the one before, could not be written.
        """
        self.wait()
        if self.has_good(step):
            return
        self._start(step, note, parts)
        if jax.default_backend() == "cpu":
            try:
                self.wait()
            except RunFailed:
                if jax.process_count() > 1:  # the others may have no reason to try again
                    raise
                self._start(step, note, parts)  # Orbax gives up where the clock jumps meanwhile
                self.wait()

    def restore(self, step: int, **like: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Reads parts back in the shapes, dtypes and shardings of `like`, and the note."""
        path = self.path(step)
        return ocp.load_checkpointables(path, like), _note(path)

    def metadata(self, step: int) -> Mapping[str, Any]:
        """Reads the metadata of a checkpoint."""
        return _note(self.path(step))

    def delete(self, *, before: int = 0, after: int | None = None) -> None:
        """Deletes the checkpoints of the steps before one, and of those after another."""
        if jax.process_index() == 0:
            for step in self._steps():
                if step < before or (after is not None and step > after):
                    shutil.rmtree(self.path(step))

    def wait(self) -> None:
        """Waits for what is being written.

        Raises:
          RunFailed: where it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for what is being written; see `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _unsealed(self, step: int) -> Path:
        return self.directory / f"{step}.unsealed"

    def _steps(self) -> list[int]:
        entries = self.directory.glob("[0-9]*")
        return [int(entry.name) for entry in entries if entry.name.isdecimal()]

    def has_good(self, step: int) -> bool:
        """Whether there is a good checkpoint of this step; all processes get the same answer."""
        good = np.bool_(jax.process_index() == 0 and flaw(self.path(step)) is None)
        if jax.process_count() > 1:
            good = multihost_utils.broadcast_one_to_all(good)
        return bool(good)

    def _start(self, step: int, note: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        with self._explained(step):
            response = ocp.save_checkpointables_async(
                self._unsealed(step), dict(parts), overwrite=True, custom_metadata=dict(note)
            )
        self._pending = self._thread.submit(self._seal, step, response)

    def _seal(self, step: int, response: Any) -> None:
        with self._explained(step):
            response.result()
            if jax.process_index() != 0:
                return
            _seal(self._unsealed(step))
            if self.path(step).exists():  # a damaged one
                shutil.rmtree(self.path(step))
            self._unsealed(step).replace(self.path(step))
        older = sorted(other for other in self._steps() if other < step)
        # Those beyond belong to a course that the run went back from.
        beyond = [other for other in self._steps() if other > step]
        for other in [*older[: max(len(older) + 1 - self._keep, 0)], *beyond]:
            shutil.rmtree(self.path(other), ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk comes as whatever the layer that met it raises
            lines = str(error).splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "space" in line), lines[0])
            others = [self.path(other) for other in sorted(self._steps()) if other != step]
            good = [path for path in others if flaw(path) is None]
            last = f"the last good one is {good[-1]}" if good else f"{self.directory} has no other"
            raise RunFailed(
                f"cannot write checkpoint {self.path(step)}: {reason.strip()[:300]}; {last}"
            ) from error


def flaw(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all are as they were written."""
    try:
        digests = json.loads((path / DIGESTS).read_text())
        known = dict(digests["sha256"])
    except FileNotFoundError:
        return f"it has no {DIGESTS}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {DIGESTS} is damaged"
    for name, digest in known.items():
        try:
            if _digest(path / name) != digest:
                return f"its file {name} is damaged: its SHA-256 is not the one in {DIGESTS}"
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror}"
    return None


def _seal(path: Path) -> None:
    """Reads a checkpoint's files back and writes their digests beside them."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != DIGESTS)
    digests = {str(file.relative_to(path)): _digest(file) for file in files}
    temporary = path / f"{DIGESTS}.tmp"
    with temporary.open("w") as file:
        json.dump({"sha256": digests}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / DIGESTS)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _note(path: Path) -> Any:
    return ocp.checkpointables_metadata(path).custom_metadata


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: one itself, or the newest of a run or of a series.

    Raises:
      UserError: where there is none; it says where it looked.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    for directory in (path, path / LATEST):
        if _is_checkpoint(directory):
            return directory
        steps = [entry for entry in directory.glob("[0-9]*") if (entry / DIGESTS).is_file()]
        if steps:
            return max(steps, key=lambda entry: int(entry.name))
    raise UserError(
        f"no checkpoint in {path}: expected a run's working directory, "
        f"its {LATEST}/ or {BEST}/, or one step in those"
    )


def _is_checkpoint(directory: Path) -> bool:
    # ocp.is_orbax_checkpoint also says yes to a directory that holds checkpoints (0.12.8).
    return (directory / "_CHECKPOINT_METADATA").is_file()


def write(directory: str | os.PathLike[str], arrays: Mapping[str, jax.Array], note: Any) -> Path:
    """Writes a checkpoint of a network alone, which no run continues from.

    Args:
      directory: what to make.
      arrays: as `to_arrays` gives them.
      note: as in the other checkpoints.

    Raises:
      UserError: where the directory exists, or cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise UserError(f"{directory} exists; take another place, or remove it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        ocp.save_checkpointables(directory, {"model": dict(arrays)}, custom_metadata=dict(note))
        _seal(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    return directory


def read(path: str | os.PathLike[str], sharding: Sharding | None = None) -> Saved:
    """Reads a checkpoint's network and note.

    Args:
      path: as for `find`.
      sharding: where the arrays go; by default whole onto the first device.

    Raises:
      UserError: where there is no checkpoint, it is not one of ours, or it is damaged.
    """
    path = find(path)
    if (reason := flaw(path)) is not None and (path / DIGESTS).exists():
        raise UserError(f"checkpoint {path} is damaged: {reason}")
    metadata = ocp.checkpointables_metadata(path)
    note = metadata.custom_metadata
    if not isinstance(note, dict) or "model" not in metadata.metadata or {*NOTED} - note.keys():
        raise UserError(f"{path} is an Orbax checkpoint, but not one of shiftnet's")
    if reason is not None:
        raise UserError(f"checkpoint {path} cannot be trusted: {reason}")
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in metadata.metadata["model"].items()
    }
    return Saved(path, ocp.load_checkpointables(path, {"model": like})["model"], note)
