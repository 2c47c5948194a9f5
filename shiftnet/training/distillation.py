"""The trained network whose logits another one learns from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from shiftnet.config import from_json
from shiftnet.data import RGB
from shiftnet.errors import UserError
from shiftnet.layers.folding import fix_weights
from shiftnet.models import own
from shiftnet.training.mesh import replicate
from shiftnet.training.trained import Trained

Arrays = nnx.State  # all of a teacher's numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A network that is not trained any more, for images that are normalised for another one.

    Attributes:
      graphdef: it without its numbers.
      arrays: its numbers.
      mean, std: what its images are normalised by.
      columns: where it has the logit of each class of the other network.
      digest: SHA-256 of its numbers.
    """

    graphdef: nnx.GraphDef
    arrays: Arrays
    mean: RGB
    std: RGB
    columns: np.ndarray
    digest: str

    @classmethod
    def of(cls, trained: Trained, class_names: Sequence[str], arch: str) -> "Teacher":
        """Makes a teacher of classes from a network that knows them, perhaps in another order.

        Args:
          trained: the network.
          class_names: of the network that learns.
          arch: of the network that learns.

        Raises:
          UserError: where it does not know one of the classes, or is of a class of the user's own
            that is not `arch`.
        """
        own_arch = from_json(trained.metadata["config"]).model.arch
        if own.is_own(own_arch) and own_arch != arch:
            raise UserError(
                f"distill.teacher {trained.path} is {own_arch}, whose code is run only where that "
                f"is the network that learns, found model.arch={arch}"
            )
        known = {name: place for place, name in enumerate(trained.class_names)}
        if missing := [name for name in class_names if name not in known]:
            raise UserError(
                f"distill.teacher {trained.path} does not know {len(missing)} of the "
                f"{len(class_names)} classes, such as {missing[0]!r}"
            )
        network = trained.network()
        fix_weights(network)
        graphdef, arrays = nnx.split(network)
        columns = np.array([known[name] for name in class_names])
        return cls(graphdef, arrays, trained.mean, trained.std, columns, _digest(arrays))

    def on(self, mesh: Mesh) -> Arrays:
        """Returns its numbers, whole on every device."""
        return jax.tree.map(lambda array: replicate(np.asarray(array), mesh), self.arrays)

    def logits(self, arrays: Arrays, images: jax.Array, mean: RGB, std: RGB) -> jax.Array:
        """Computes its logits, `[N, num_classes]` in the images' dtype.

        Args:
          arrays: from `on`.
          images: floating `[N, H, W, 3]`, normalised by `mean` and `std`.
          mean, std: of the network that learns.
        """
        if (mean, std) != (self.mean, self.std):
            scale = np.divide(std, self.std)
            shift = np.subtract(mean, self.mean) / self.std
            images = images * jnp.asarray(scale, images.dtype) + jnp.asarray(shift, images.dtype)
        return nnx.merge(self.graphdef, arrays)(images)[:, self.columns]


def _digest(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
