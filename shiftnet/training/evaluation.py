"""Evaluation: every image once, on all devices."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from shiftnet.config import DataConfig
from shiftnet.data import RGB, Source, Split, augment
from shiftnet.data.workers import num_workers
from shiftnet.errors import UserError
from shiftnet.training.data_iterator import gather_names
from shiftnet.training.mesh import batch_sharded, compiled, replicate, replicated, shard_batch

# Steps that may wait on the devices. One keeps them busy while the next batch is prepared. Without
# a bound XLA's CPU client aborts the process when hundreds of steps that communicate between two
# devices are queued.
IN_FLIGHT = 2


# Of the expected calibration error, as Guo et al. (arXiv:1706.04599) have them.
CALIBRATION_BINS = 15


class ClassScores(NamedTuple):
    """How a network does on every class; fractions are NaN where there is nothing to divide by.

    Attributes:
      images: int `[classes]`, how many there are.
      recall: float64 `[classes]`, the part of a class's images that is predicted to be of it, which
        is the class's top-1 accuracy.
      precision: float64 `[classes]`, the part of the images predicted to be of a class that is.
      f1: float64 `[classes]`, the harmonic mean of both; 0 for a class with images of which none is
        predicted right.
    """

    images: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The predictions of a network on a set of images, and their accuracy.

    Attributes:
      loss: mean cross entropy.
      top1: fraction of images whose label has the largest logit.
      top5: fraction whose label is among the five largest.
      predictions: int32 `[images]`, the class of the largest logit.
      labels: int32 `[images]`.
      confidences: float32 `[images]`, the probability that the network gives to its prediction.
      indices: int `[images]`, the place of each image among those it was evaluated on.
      skipped: names of the files that could not be decoded; they count in none of the above.
    """

    loss: float
    top1: float
    top5: float
    predictions: np.ndarray
    labels: np.ndarray
    confidences: np.ndarray
    indices: np.ndarray
    skipped: Sequence[str] = ()

    def metrics(self, name: str) -> dict[str, float]:
        """Loss and accuracies by the names they are logged under, `name` being the images'."""
        metrics = {
            f"{name}_loss": self.loss,
            f"{name}_accuracy": self.top1,
            f"{name}_top5": self.top5,
        }
        return metrics | ({f"{name}_skipped": len(self.skipped)} if self.skipped else {})

    def per_class(self, classes: int) -> ClassScores:
        """Scores every class by itself."""
        images = np.bincount(self.labels, minlength=classes)
        predicted = np.bincount(self.predictions, minlength=classes)
        hits = np.bincount(self.labels[self.predictions == self.labels], minlength=classes)

        def ratio(of: np.ndarray, to: np.ndarray) -> np.ndarray:
            return np.divide(of, to, out=np.full(classes, np.nan), where=to > 0)

        f1 = np.where(images > 0, ratio(2 * hits, images + predicted), np.nan)
        return ClassScores(images, ratio(hits, images), ratio(hits, predicted), f1)

    def calibration_error(self) -> float:
        """The expected calibration error, in `CALIBRATION_BINS` bins of equal width, a fraction.

        The mean over images of the distance, in the bin of an image's confidence, between the
        accuracy and the mean confidence (Guo et al., arXiv:1706.04599); NaN where a confidence is.
        """
        if not np.isfinite(self.confidences).all():
            return math.nan
        hits = (self.predictions == self.labels).astype(np.float64)
        bins = np.ceil(self.confidences.astype(np.float64) * CALIBRATION_BINS).astype(int)
        gaps = np.bincount(bins, hits - self.confidences, minlength=CALIBRATION_BINS + 1)
        return float(np.abs(gaps).sum() / len(hits))

    def confusion(self) -> list[list[int]]:
        """`[label, prediction, images]` of every pair that occurs, in order."""
        pairs = np.stack([self.labels, self.predictions], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        return np.column_stack([found, counts]).tolist()


class Reading(NamedTuple):
    """The settings for reading image files, named as in `config.data`.

    Attributes:
      size: side in pixels of the crop from their middle.
      resize: their shorter side in pixels before that; 0: 8/7 of `size`.
      workers: processes that decode, see `num_workers`.
      on_corrupt: `"error"` or `"skip"`.
    """

    size: int
    resize: int
    workers: int
    on_corrupt: str


class Evaluator(Protocol):
    """Evaluates networks on one set of images: `evaluator(params, stats)`."""

    def __call__(self, params: nnx.State, stats: nnx.State) -> Evaluation: ...


def make_evaluator(
    graphdef: nnx.GraphDef,
    part: Split | Source,
    data: DataConfig | Reading,
    *,
    mean: RGB,
    std: RGB,
    batch_size: int,
    mesh: Mesh,
) -> Evaluator:
    """Makes the evaluator of some images.

    Args:
      graphdef: the network, from `nnx.graphdef`.
      part: the images.
      data: a recipe's `config.data`, or `Reading`: how image files are read.
      mean: per channel, for pixels in [0, 1].
      std: likewise.
      batch_size: images per step; rounded up to a multiple of the devices.
      mesh: from `make_mesh`.
    """
    scorer = _Scorer(graphdef, mean, std, mesh)
    batch_size = -(-min(batch_size, len(part)) // mesh.size) * mesh.size
    if isinstance(part, Split):
        return ResidentEvaluator(scorer, part, batch_size, mesh)
    return FileEvaluator(scorer, part, data, batch_size, mesh)


class _Scorer:
    """Scores a batch: uint8 images and labels to losses, predictions, ranks and confidences."""

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
        confidences = jax.nn.softmax(logits).max(-1)
        predictions = logits.argmax(-1).astype(jnp.int32)
        return losses, predictions, _rank(logits, known), confidences, labels


def _evaluation(results: Iterable[Sequence[jax.Array]]) -> Evaluation:
    """Joins what a scorer gives for each batch, without the places that hold no image.

    Args:
      results: an iterator that starts a step each time it is asked.

    Raises:
      UserError: if there is no image at all, as where all files are corrupt.
    """
    columns = zip(*_fetched(results), strict=True)
    losses, predictions, ranks, confidences, labels = map(np.concatenate, columns)
    real = labels >= 0
    if not real.any():
        raise UserError("none of the images to evaluate on can be decoded")
    return Evaluation(
        loss=float(losses[real].mean(dtype=np.float64)),
        top1=float((ranks[real] < 1).mean()),
        top5=float((ranks[real] < 5).mean()),
        predictions=predictions[real],
        labels=labels[real],
        confidences=confidences[real],
        indices=np.flatnonzero(real),
    )


def _fetched(results: Iterable[Sequence[jax.Array]]) -> Iterator[Sequence[np.ndarray]]:
    """Yields results on the host, in order, while at most `IN_FLIGHT` steps are not done."""
    waiting: collections.deque[Sequence[jax.Array]] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == IN_FLIGHT:
            yield jax.device_get(waiting.popleft())
    while waiting:
        yield jax.device_get(waiting.popleft())


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
        return _evaluation(
            self._step(params, stats, self._images, self._labels, np.int32(start))
            for start in starts
        )


class FileEvaluator:
    """Evaluates on images that worker processes decode."""

    def __init__(
        self,
        scorer: _Scorer,
        source: Source,
        data: DataConfig | Reading,
        batch_size: int,
        mesh: Mesh,
    ):
        from shiftnet.data.stream import EvalStream  # Grain takes seconds to import

        self._mesh = mesh
        self._stream = EvalStream(
            source,
            size=data.size,
            resize=data.resize or round(data.size * 8 / 7),
            batch_size=batch_size,
            on_corrupt=data.on_corrupt,
            workers=num_workers(data.workers, len(source)),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._step = compiled(scorer, mesh)

    def __call__(self, params: nnx.State, stats: nnx.State) -> Evaluation:
        """Evaluates a network with these parameters and running statistics."""
        params, stats = jax.device_put((params, stats), replicated(self._mesh))
        skipped: list[str] = []

        def results() -> Iterator[Sequence[jax.Array]]:
            for batch in self._stream:
                skipped.extend(batch.skipped)
                images, labels = (shard_batch(a, self._mesh) for a in (batch.images, batch.labels))
                yield self._step(params, stats, images, labels)

        return dataclasses.replace(_evaluation(results()), skipped=gather_names(skipped))


def _rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Counts the classes that come before the label, int32 `[N]`; ties by index, as in argmax.

    A label whose logit is not a number comes last.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    before = ~(logits <= own) | ((logits == own) & earlier)
    return before.sum(1, dtype=jnp.int32)
