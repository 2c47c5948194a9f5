"""Checkpoints on disk: Orbax directories that know their own recipe.

A run keeps two series in its working directory: `checkpoints/<step>` to continue from, and
`best/<step>` with the most accurate network. Each checkpoint holds

- `model`: the parameters and running statistics, by their dotted names in the network;
- `optimizer`: the optimiser's state, in `checkpoints/` only;
- `levels`: of networks with low-bit weights, their codes at the end of the last epoch, by layer, so
  that a continued run logs the same changes; in `checkpoints/` only;
- a note (JSON): the recipe, the classes' names, the normalisation, the step, the accuracies, and
  where the reading of files was.
"""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from shiftnet.errors import UserError

LATEST, BEST = "checkpoints", "best"


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
    """The checkpoints of one kind in one run; keeps the newest.

    A checkpoint appears under its step only once it is complete, and the one before is deleted
    after that.
    """

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(1),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / str(step)

    def save(self, step: int, note: Mapping[str, Any], **parts: Any) -> None:
        """Writes pytrees of arrays (`model=`, `optimizer=`), in the background where it can.

        Not on CPU: there the host's copy of an array may be the array itself, which the next
        training step overwrites.
        """
        self._checkpointer.save_checkpointables_async(
            step, parts, overwrite=True, custom_metadata=dict(note)
        )
        if jax.default_backend() == "cpu":
            self._checkpointer.wait()

    def restore(self, step: int, **like: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Reads parts back in the shapes, dtypes and shardings of `like`, and the note."""
        parts = self._checkpointer.load_checkpointables(step, like)
        return parts, self._checkpointer.checkpointables_metadata(step).custom_metadata

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def find(path: str | PathLike[str]) -> Path:
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
        steps = [entry for entry in directory.glob("[0-9]*") if _is_checkpoint(entry)]
        if steps:
            return max(steps, key=lambda entry: int(entry.name))
    raise UserError(
        f"no checkpoint in {path}: expected a run's working directory, "
        f"its {LATEST}/ or {BEST}/, or one step in those"
    )


def _is_checkpoint(directory: Path) -> bool:
    # ocp.is_orbax_checkpoint also says yes to a directory that holds checkpoints (0.12.8).
    return (directory / "_CHECKPOINT_METADATA").is_file()


def write(directory: str | PathLike[str], arrays: Mapping[str, jax.Array], note: Any) -> Path:
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
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    return directory


def read(path: str | PathLike[str], sharding: Sharding | None = None) -> Saved:
    """Reads a checkpoint's network and note.

    Args:
      path: as for `find`.
      sharding: where the arrays go; by default whole onto the first device.

    Raises:
      UserError: where there is no checkpoint, or it is not one of ours.
    """
    path = find(path)
    metadata = ocp.checkpointables_metadata(path)
    note = metadata.custom_metadata
    if not isinstance(note, dict) or "config" not in note or "model" not in metadata.metadata:
        raise UserError(f"{path} is an Orbax checkpoint, but not one of shiftnet's")
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in metadata.metadata["model"].items()
    }
    return Saved(path, ocp.load_checkpointables(path, {"model": like})["model"], note)
