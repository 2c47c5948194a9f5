"""Evaluation: every image once, on all devices."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from shiftnet.data import RGB, Source, Split, augment
from shiftnet.training.feed import gather_names, num_workers
from shiftnet.training.mesh import batch_sharded, compiled, replicate, replicated, shard_batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network made of a set of images.

    Attributes:
      loss: mean cross entropy.
      top1: fraction of images whose label has the largest logit.
      top5: fraction whose label is among the five largest.
      predictions: int32 `[images]`, the class of the largest logit.
      labels: int32 `[images]`.
      skipped: names of the files that could not be decoded; they count in none of the above.
    """

    loss: float
    top1: float
    top5: float
    predictions: np.ndarray
    labels: np.ndarray
    skipped: Sequence[str] = ()

    def metrics(self, name: str) -> dict[str, float]:
        """Loss and accuracies by the names they are logged under, `name` being the images'."""
        metrics = {
            f"{name}_loss": self.loss,
            f"{name}_accuracy": self.top1,
            f"{name}_top5": self.top5,
        }
        return metrics | ({f"{name}_skipped": len(self.skipped)} if self.skipped else {})

    def per_class(self, classes: int) -> np.ndarray:
        """Top-1 accuracy of each class, float64 `[classes]`; NaN for a class without images."""
        counts = np.bincount(self.labels, minlength=classes)
        hits = np.bincount(self.labels[self.predictions == self.labels], minlength=classes)
        return np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)

    def confusion(self) -> list[list[int]]:
        """`[label, prediction, images]` of every pair that occurs, in order."""
        pairs = np.stack([self.labels, self.predictions], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        return np.column_stack([found, counts]).tolist()


class Evaluator(Protocol):
    """Evaluates networks on one set of images: `evaluator(params, stats)`."""

    def __call__(self, params: nnx.State, stats: nnx.State) -> Evaluation: ...


def make_evaluator(
    graphdef: nnx.GraphDef,
    part: Split | Source,
    data: Any,
    *,
    mean: RGB,
    std: RGB,
    batch_size: int,
    mesh: Mesh,
) -> Evaluator:
    """The evaluator of some images.

    Args:
      graphdef: the network, from `nnx.graphdef`.
      part: the images.
      data: a recipe's `config.data`; of image files it says how they are read.
      mean: per channel, for pixels in [0, 1].
      std: likewise.
      batch_size: images a step; rounded up to a multiple of the devices.
      mesh: from `make_mesh`.
    """
    scorer = _Scorer(graphdef, mean, std, mesh)
    batch_size = -(-min(batch_size, len(part)) // mesh.size) * mesh.size
    if isinstance(part, Split):
        return ResidentEvaluator(scorer, part, batch_size, mesh)
    return FileEvaluator(scorer, part, data, batch_size, mesh)


class _Scorer:
    """What both evaluators do with a batch: uint8 images and labels to losses, classes, ranks."""

    def __init__(self, graphdef: nnx.GraphDef, mean: RGB, std: RGB, mesh: Mesh):
        self._graphdef = graphdef
        self._mean, self._std = mean, std
        self._mesh = mesh

    def __call__(self, params, stats, images, labels):
        images = jax.lax.with_sharding_constraint(images, batch_sharded(self._mesh))
        network = nnx.merge(self._graphdef, params, stats)
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            logits = network(augment.normalize(images, self._mean, self._std))
        known = jnp.maximum(labels, 0)  # -1 stands for no image; its numbers are left out later
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, known)
        return losses, logits.argmax(-1).astype(jnp.int32), _rank(logits, known), labels


def _evaluation(columns: Iterable[Sequence[np.ndarray]]) -> Evaluation:
    """Joins what a scorer gave for each batch, without the places that hold no image."""
    losses, predictions, ranks, labels = map(np.concatenate, zip(*columns, strict=True))
    real = labels >= 0
    return Evaluation(
        loss=float(losses[real].mean(dtype=np.float64)),
        top1=float((ranks[real] < 1).mean()),
        top5=float((ranks[real] < 5).mean()),
        predictions=predictions[real],
        labels=labels[real],
    )


class ResidentEvaluator:
    """Evaluates on images that it keeps on the devices."""

    def __init__(self, scorer: _Scorer, part: Split, batch_size: int, mesh: Mesh):
        self._batch_size = batch_size
        self._mesh = mesh
        fill = -len(part) % batch_size
        self._images = replicate(np.pad(part.images, [(0, fill)] + [(0, 0)] * 3), mesh)
        self._labels = replicate(np.pad(part.labels, (0, fill), constant_values=-1), mesh)

        def step(params, stats, images, labels, start):
            images, labels = (
                jax.lax.dynamic_slice_in_dim(array, start, batch_size) for array in (images, labels)
            )
            return scorer(params, stats, images, labels)

        self._step = compiled(step, mesh)

    def __call__(self, params: nnx.State, stats: nnx.State) -> Evaluation:
        """Evaluates a network with these parameters and running statistics."""
        params, stats = jax.device_put((params, stats), replicated(self._mesh))
        starts = range(0, len(self._images), self._batch_size)
        results = [
            self._step(params, stats, self._images, self._labels, np.int32(start))
            for start in starts
        ]
        return _evaluation(jax.device_get(results))


class FileEvaluator:
    """Evaluates on images that worker processes decode."""

    def __init__(self, scorer: _Scorer, source: Source, data: Any, batch_size: int, mesh: Mesh):
        from shiftnet.data.stream import EvalStream  # Grain takes seconds to import

        self._mesh = mesh
        self._stream = EvalStream(
            source,
            size=data.size,
            resize=data.resize or round(data.size * 8 / 7),
            batch_size=batch_size,
            on_corrupt=data.on_corrupt,
            workers=num_workers(data.workers),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._step = compiled(scorer, mesh)

    def __call__(self, params: nnx.State, stats: nnx.State) -> Evaluation:
        """Evaluates a network with these parameters and running statistics."""
        params, stats = jax.device_put((params, stats), replicated(self._mesh))
        columns: list[Sequence[np.ndarray]] = []
        skipped: list[str] = []
        ahead = None  # one batch on the device while the next is fetched, and no more
        for batch in self._stream:
            skipped += batch.skipped
            images, labels = (shard_batch(a, self._mesh) for a in (batch.images, batch.labels))
            result = self._step(params, stats, images, labels)
            if ahead is not None:
                columns.append(jax.device_get(ahead))
            ahead = result
        columns.append(jax.device_get(ahead))
        return dataclasses.replace(_evaluation(columns), skipped=gather_names(skipped))


def _rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes come before the label, int32 `[N]`; ties by index, as argmax breaks them.

    A label whose logit is not a number comes last.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    before = ~(logits <= own) | ((logits == own) & earlier)
    return before.sum(1, dtype=jnp.int32)
