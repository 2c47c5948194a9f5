"""Evaluation: every image once, on all devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from shiftnet.data import RGB, augment
from shiftnet.training.mesh import batch_sharded, replicate, replicated


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network made of a set of images.

    Attributes:
      loss: mean cross entropy.
      top1: fraction of images whose label has the largest logit.
      top5: fraction whose label is among the five largest.
      predictions: int32 `[images]`, the class of the largest logit.
      labels: int32 `[images]`.
    """

    loss: float
    top1: float
    top5: float
    predictions: np.ndarray
    labels: np.ndarray

    def metrics(self, name: str) -> dict[str, float]:
        """Loss and accuracies by the names they are logged under, `name` being the images'."""
        return {
            f"{name}_loss": self.loss,
            f"{name}_accuracy": self.top1,
            f"{name}_top5": self.top5,
        }

    def per_class(self, classes: int) -> np.ndarray:
        """Top-1 accuracy of each class, float64 `[classes]`; NaN for a class without images."""
        counts = np.bincount(self.labels, minlength=classes)
        hits = np.bincount(self.labels[self.predictions == self.labels], minlength=classes)
        return np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)


class Evaluator:
    """Evaluates on one set of images, which it keeps on the devices.

    Args:
      graphdef: the network, from `nnx.graphdef`.
      images: uint8 `[examples, H, W, 3]`, on the host.
      labels: int32 `[examples]`.
      mean: per channel, for pixels in [0, 1].
      std: likewise.
      batch_size: images a step; rounded up to a multiple of the devices.
      mesh: from `make_mesh`.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        mean: RGB,
        std: RGB,
        batch_size: int,
        mesh: Mesh,
    ):
        devices = mesh.size
        self._batch_size = -(-min(batch_size, len(images)) // devices) * devices
        # The last batch is filled up; what was added is cut off again below.
        fill = -len(images) % self._batch_size
        self._images = replicate(np.pad(images, [(0, fill)] + [(0, 0)] * 3), mesh)
        self._padded_labels = replicate(np.pad(labels, (0, fill)), mesh)
        self._labels = labels
        self._graphdef = graphdef
        self._mean, self._std = mean, std
        self._mesh = mesh
        self._step = jax.jit(self._evaluate_batch, out_shardings=replicated(mesh))

    def __call__(self, params: nnx.State, stats: nnx.State) -> Evaluation:
        """Evaluates a network with these parameters and running statistics."""
        params, stats = jax.device_put((params, stats), replicated(self._mesh))
        starts = range(0, len(self._images), self._batch_size)
        results = [
            self._step(params, stats, self._images, self._padded_labels, np.int32(start))
            for start in starts
        ]
        count = len(self._labels)
        losses, predictions, ranks = (
            np.concatenate(column)[:count] for column in zip(*jax.device_get(results), strict=True)
        )
        return Evaluation(
            loss=float(losses.mean(dtype=np.float64)),
            top1=float((ranks < 1).mean()),
            top5=float((ranks < 5).mean()),
            predictions=predictions,
            labels=self._labels,
        )

    def _evaluate_batch(self, params, stats, images, labels, start):
        images = jax.lax.dynamic_slice_in_dim(images, start, self._batch_size)
        labels = jax.lax.dynamic_slice_in_dim(labels, start, self._batch_size)
        images = jax.lax.with_sharding_constraint(images, batch_sharded(self._mesh))
        logits = nnx.merge(self._graphdef, params, stats)(
            augment.normalize(images, self._mean, self._std)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, logits.argmax(-1).astype(jnp.int32), _rank(logits, labels)


def _rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes come before the label, int32 `[N]`; ties by index, as argmax breaks them.

    A label whose logit is not a number comes last.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    before = ~(logits <= own) | ((logits == own) & earlier)
    return before.sum(1, dtype=jnp.int32)
