"""Batch norms' running statistics, estimated anew on training images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from shiftnet.config import DataConfig
from shiftnet.data import RGB, Source, Split, Subset, augment
from shiftnet.data.workers import num_workers
from shiftnet.errors import UserError
from shiftnet.kernels.layouts import other_axes, pixels, wide_dtype
from shiftnet.layers.batch_norm import EPSILON, MOMENTUM, BatchNorm
from shiftnet.quantizers import Activation
from shiftnet.training.mesh import batch_sharded, compiled, replicated, shard_batch
from shiftnet.training.optimizer import dotted

# Batches that the statistics of a packed file's network are estimated on.
BATCHES = 20

Estimator = Callable[[nnx.State, nnx.State], nnx.State]


def make_estimator(
    graphdef: nnx.GraphDef,
    part: Split | Source,
    data: DataConfig,
    *,
    mean: RGB,
    std: RGB,
    batch_size: int,
    batches: int,
    mesh: Mesh,
) -> Estimator:
    """Makes `estimator(params, stats)`, which returns running statistics in place of `stats`.

    They are the means of the batches' own, as PyTorch's `update_bn` takes them with a momentum of
    None, over training images that are chosen once and for all, prepared as for evaluation. What is
    no running mean, as a `LearnedStep.unit`, stays.

    Args:
      graphdef: the network, from `nnx.graphdef`.
      part: the training images.
      data: how image files are read.
      mean, std: per channel, for pixels in [0, 1].
      batch_size: images per batch, a multiple of the devices.
      batches: how many, or as many as there are images for.
      mesh: from `make_mesh`.
    """
    count = max(1, min(batches, len(part) // batch_size)) * batch_size
    # RandomState, not Generator: NumPy promises never to change what it draws.
    chosen = np.resize(np.random.RandomState(0).permutation(len(part)), count)

    def step(params: nnx.State, average: nnx.State, number: jax.Array, images: jax.Array):
        images = jax.lax.with_sharding_constraint(images, batch_sharded(mesh))
        # From 0, a running statistic becomes the batch's own times the momentum.
        network = nnx.merge(graphdef, params, average, copy=True)
        nnx.update(network, _zeros(network, average))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            network(augment.normalize(images, mean, std), train=True)
        found = nnx.state(network, nnx.BatchStat)
        return _of_means(
            lambda momentum, old, new: old + (new / momentum - old) / number.astype(old.dtype),
            network,
            average,
            found,
        )

    run = compiled(step, mesh)

    def estimate(params: nnx.State, stats: nnx.State) -> nnx.State:
        stats = _zeros(nnx.merge(graphdef, params, stats, copy=True), stats)
        params, stats = jax.device_put((params, stats), replicated(mesh))
        for number, images in enumerate(_batches(part, chosen, data, batch_size), 1):
            stats = run(params, stats, np.float32(number), shard_batch(images, mesh))
        return stats

    return estimate


def _of_means(function: Callable[..., Any], network: nnx.Module, *stats: nnx.State) -> nnx.State:
    """Returns statistics with `function(momentum, *values)` in place of each running mean.

    Args:
      function: also takes the weight of a batch's own value in that running mean.
      network: of the statistics.
      *stats: what is no running mean is that of the first.
    """
    momenta: dict[str, float] = {}
    for path, module in nnx.iter_modules(network):
        momentum, names = MOMENTUM, ("mean", "var")
        if isinstance(module, nnx.BatchNorm):  # of a network of one's own
            momentum = 1 - module.momentum
        elif isinstance(module, Activation):
            names = ("clipped", "nonzero")
        elif not isinstance(module, BatchNorm):
            continue
        if momentum:
            momenta |= {".".join(map(str, (*path, name))): momentum for name in names}

    def one(path: Sequence[Any], *values: Any) -> Any:
        momentum = momenta.get(dotted(path))
        return values[0] if momentum is None else function(momentum, *values)

    return jax.tree_util.tree_map_with_path(one, *stats)


def _zeros(network: nnx.Module, stats: nnx.State) -> nnx.State:
    """Returns statistics with zeros as running means."""
    return _of_means(lambda _, old: jnp.zeros_like(old), network, stats)


def _batches(
    part: Split | Source, chosen: np.ndarray, data: DataConfig, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields this process's part of each batch, uint8 `[images, H, W, 3]`."""
    index, processes = jax.process_index(), jax.process_count()
    if isinstance(part, Split):
        share = batch_size // processes
        for start in range(index * share, len(chosen), batch_size):
            yield part.images[chosen[start : start + share]]
        return
    from shiftnet.data.stream import EvalStream  # Grain takes seconds to import

    stream = EvalStream(
        Subset(part, chosen),
        size=data.size,
        resize=data.resize or round(data.size * 8 / 7),
        batch_size=batch_size,
        on_corrupt=data.on_corrupt,
        workers=num_workers(data.workers, len(chosen)),
        process_index=index,
        process_count=processes,
    )
    try:
        for batch in stream:
            good = batch.images[batch.labels >= 0]
            if not len(good):
                raise UserError(
                    "batch norm's statistics cannot be estimated: no image of a batch of training "
                    "images can be decoded"
                )
            # Others of the batch stand in for corrupt files, since all batches have one shape.
            yield np.resize(good, batch.images.shape)
    finally:
        stream.close()


def unfold(network: nnx.Module, like: nnx.Module, make: Callable[..., Estimator]) -> None:
    """Gives a network whose batch norms and activations are folded running statistics again.

    It computes the same with them as before, but for rounding, and can be trained. Batch norms with
    `scale` and `bias` get the statistics of what they see on training images; the numbers of those
    without follow from the folded ones alone.

    Args:
      network: changed in place.
      like: the same network with batch norms that are not folded; its numbers are not used.
      make: `make_estimator` but for the graphdef.
    """
    for _, module in nnx.iter_modules(network):
        if isinstance(module, Activation):
            module.unfold()
    measured = nnx.clone(network)
    _replace(measured, _Measured)
    graphdef, *states = nnx.split(measured, nnx.Param, nnx.BatchStat)
    params, stats = states
    found = nnx.merge(graphdef, params, make(graphdef)(params, stats))
    seen = {path: norm for path, norm in nnx.iter_modules(found) if isinstance(norm, BatchNorm)}
    wanted = {path: norm for path, norm in nnx.iter_modules(like) if isinstance(norm, BatchNorm)}
    for path, norm in nnx.iter_modules(network):
        if not isinstance(norm, BatchNorm):
            continue
        assert norm.scale is not None
        assert norm.bias is not None
        scale, bias = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias))
        if wanted[path].scale is None:
            mean, var = -bias / scale, 1 / np.square(scale) - EPSILON
            norm.scale = norm.bias = None
        else:
            mean, var = (np.asarray(v[...], np.float64) for v in (seen[path].mean, seen[path].var))
            deviation = np.sqrt(var + EPSILON)
            norm.scale = nnx.Param(jnp.asarray(scale * deviation, jnp.float32))
            norm.bias = nnx.Param(jnp.asarray(bias + scale * mean, jnp.float32))
        norm.mean = nnx.BatchStat(jnp.asarray(mean, jnp.float32))
        norm.var = nnx.BatchStat(jnp.asarray(var, jnp.float32))


class _Measured(BatchNorm):
    """A folded batch norm that goes on computing the same, and measures what it sees."""

    def __init__(self, folded: BatchNorm):
        super().__init__(folded.features)
        self.scale, self.bias = folded.scale, folded.bias

    def __call__(self, x: jax.Array, *, train: bool = False, **after: Any) -> jax.Array:
        if train:
            wide = x.astype(wide_dtype(x.dtype))
            self.update(wide.mean(other_axes(x)), wide.var(other_axes(x)), pixels(x))
        return super().__call__(x, **after)

    def scale_and_bias(
        self, dtype: jnp.dtype, statistics: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        del statistics
        return self._affine(dtype)


def _replace(network: nnx.Module, make: Callable[[BatchNorm], BatchNorm]) -> None:
    """Puts another batch norm in the place of each one."""
    for _, module in list(nnx.iter_modules(network)):
        inside: Any = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
        for name, value in list(inside):
            if isinstance(value, BatchNorm):
                if isinstance(module, nnx.List):
                    module[name] = make(value)
                else:
                    setattr(module, name, make(value))
