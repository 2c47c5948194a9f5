"""Networks that were trained before, from a checkpoint or a packed file."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from flax import nnx

from shiftnet import checkpoint, models, packing, tensor_file
from shiftnet.checkpoint import Saved, from_arrays
from shiftnet.config import from_json
from shiftnet.data import RGB
from shiftnet.files import path_of


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      path: where it was read.
      metadata: the checkpoint's.
      saved: its arrays by name, in the form of a checkpoint; None for a packed file, whose batch
        norms are folded.
      packed: the network of a packed file.
    """

    path: Path
    metadata: Mapping[str, Any]
    saved: Saved | None
    packed: nnx.Module | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.metadata["class_names"])

    @property
    def mean(self) -> RGB:
        red, green, blue = self.metadata["mean"]
        return red, green, blue

    @property
    def std(self) -> RGB:
        red, green, blue = self.metadata["std"]
        return red, green, blue

    def network(self) -> nnx.Module:
        """Builds the network, with its numbers.

        Raises:
          UserError: where the checkpoint does not have all of them.
        """
        if self.saved is None:
            assert self.packed is not None
            return nnx.clone(self.packed)
        model, classes = from_json(self.metadata["config"]).model, len(self.class_names)
        shape = nnx.eval_shape(lambda: models.build(model, classes, rngs=nnx.Rngs(0)))
        graphdef, *states = nnx.split(shape, nnx.Param, nnx.BatchStat)
        filled = [from_arrays(state, self.saved.arrays, self.path) for state in states]
        return nnx.merge(graphdef, *filled)


def read(path: str | PathLike[str], option: str) -> Trained:
    """Reads a checkpoint, a run's newest one, or a packed file.

    Args:
      path: what `shiftnet.load` takes.
      option: the name of the option that gives it, for errors.

    Raises:
      UserError: where there is none, or it is damaged.
    """
    place = path_of(path, option)
    is_tensors = place.is_file() and place.suffix == tensor_file.SUFFIX
    if is_tensors and tensor_file.kind_of(place) != checkpoint.FILE_FORMAT:
        network, metadata = packing.read(place)
        return Trained(place.absolute(), metadata, None, network)
    saved = checkpoint.read(place)
    return Trained(saved.path, saved.metadata, saved)
