"""The state of a run, and the compiled functions that start and advance it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from shiftnet import models, quantizers
from shiftnet.data import RGB, augment
from shiftnet.kernels.implementations import only_xla, over
from shiftnet.training.mesh import (
    BATCH_AXIS,
    batch_sharded,
    compiled,
    compiled_quickly,
    parameters_sharded,
    replicated,
)
from shiftnet.training.optimizer import make_optimizer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "stats", "opt_state"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training carries from one step to the next.

    Random numbers and the place in the data follow from the recipe's seed and `step` alone.
    """

    step: jax.Array  # int32 []: steps taken
    params: nnx.State
    stats: nnx.State  # batch norm's running statistics
    opt_state: optax.OptState


class Program:
    """A recipe's training as compiled functions over a mesh.

    Args:
      config: a validated recipe.
      num_classes: length of the logits.
      mean: per channel, for pixels in [0, 1].
      std: likewise.
      steps_per_epoch: full batches in the training set.
      mesh: from `make_mesh`.

    Attributes:
      mesh: as given.
      shardings: where each array of a `TrainState` goes: a tree like it.
      graphdef: the network without its numbers; `nnx.merge(graphdef, params, stats)` joins them.
      order: `order(seed, epoch, num_examples)`, the epoch's order of the training set; see
        `augment.epoch_order`.
      init: `draw`, compiled.
      train: `steps`, compiled; donates the state.
      train_batch: `train_batch(state, seed, images, labels)` takes one step on a batch; see
        `_train_batch`. Donates the state.
    """

    def __init__(
        self,
        config: Any,
        *,
        num_classes: int,
        mean: RGB,
        std: RGB,
        steps_per_epoch: int,
        mesh: Mesh,
    ):
        self._config = config
        self._num_classes = num_classes
        self._mean, self._std = mean, std
        self._steps_per_epoch = steps_per_epoch
        self.mesh = mesh
        self._optimizer = make_optimizer(config, steps_per_epoch)
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._build(0)))
        everywhere = replicated(mesh)
        state = jax.eval_shape(self.draw, np.uint32(0))
        self.shardings = (
            parameters_sharded(state, mesh)
            if config.parallel.fsdp
            else jax.tree.map(lambda _: everywhere, state)
        )
        self.order = compiled_quickly(
            augment.epoch_order, mesh, static_argnums=2, out_shardings=everywhere
        )
        self.init = compiled_quickly(self.draw, mesh, out_shardings=self.shardings)
        step = functools.partial(
            compiled,
            mesh=mesh,
            out_shardings=(self.shardings, everywhere, everywhere),
            donate_argnums=0,
        )
        self.train = step(self.steps, static_argnames="length")
        self.train_batch = step(self._train_batch)

    def _build(self, seed: jax.Array | int) -> nnx.Module:
        return models.build(
            self._config.model, self._num_classes, rngs=nnx.Rngs(jax.random.key(seed))
        )

    def draw(self, seed: jax.Array) -> TrainState:
        """The state that training starts from; `seed` is uint32 []."""
        _, *states = nnx.split(self._build(seed), nnx.Param, nnx.BatchStat)
        params, stats = states
        return TrainState(jnp.zeros((), jnp.int32), params, stats, self._optimizer.init(params))

    def update(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        """One step of gradient descent on one batch.

        Args:
          state: where to start from.
          images: normalised `[N, H, W, 3]`.
          labels: int32 `[N]`.

        Returns:
          The next state, the mean cross entropy before the step (without the weights' regulariser,
          though its gradient is taken too), and how many images of the batch
          were classified correctly (int32).
        """

        per_device = self._config.parallel.batch_norm == "per_device" and self.mesh.size > 1

        def loss_of(params, stats, images, labels):
            # Gathered for the products, whatever XLA might prefer; `shard_map` does so by itself.
            if self._config.parallel.fsdp and not per_device:
                params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
            model = nnx.merge(self.graphdef, params, stats, copy=True)
            logits = model(images, train=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            total = loss + self._config.optimizer.regularizer * quantizers.regularizer(model)
            return total, (loss, nnx.state(model, nnx.BatchStat), logits)

        gradient = _gradient(loss_of)
        with contextlib.nullcontext() if per_device else over(self.mesh):
            gradient = _on_each_device(gradient, self.mesh) if per_device else gradient
            grads, (loss, stats, logits) = gradient(state.params, state.stats, images, labels)
        grads = jax.lax.with_sharding_constraint(grads, self.shardings.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        predictions = logits.argmax(-1).astype(labels.dtype)
        correct = (predictions == labels).sum(dtype=jnp.int32)
        return TrainState(state.step + 1, params, stats, opt_state), loss, correct

    def _train_batch(
        self, state: TrainState, seed: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        """Takes one step on a batch that is cropped and mirrored already.

        Args:
          state: where to start from.
          seed: uint32 [], the recipe's.
          images: uint8 `[N, H, W, 3]`.
          labels: int32 `[N]`.

        Returns:
          As `update`.
        """
        dtype = jax.tree.leaves(state.params)[0].dtype
        key = augment.cutout_key(seed, state.step)
        images = augment.cutout(key, images, self._config.data.cutout)
        return self.update(state, augment.normalize(images, self._mean, self._std, dtype), labels)

    def steps(
        self,
        state: TrainState,
        seed: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        *,
        length: int,
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        """Takes `length` steps within one epoch, drawing and augmenting the batches on the device.

        Args:
          state: where to start from.
          seed: uint32 [], the recipe's.
          images: uint8 `[examples, H, W, 3]`, the whole training set.
          labels: int32 `[examples]`.
          order: int32 `[examples]`, the epoch's, from `order`.
          length: number of steps.

        Returns:
          The state after them, and for each step its loss `[length]` and its number of correctly
          classified images, int32 `[length]`.
        """
        data = self._config.data

        def one(state: TrainState, _):
            batch_size = self._config.batch_size
            start = state.step % self._steps_per_epoch * batch_size
            chosen = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
            chosen = jax.lax.with_sharding_constraint(chosen, batch_sharded(self.mesh))
            batch = augment.crop_flip(
                augment.augment_key(seed, state.step),
                images[chosen],
                pad=data.pad,
                pad_mode=data.pad_mode,
                flip=data.flip,
            )
            state, loss, correct = self._train_batch(state, seed, batch, labels[chosen])
            return state, (loss, correct)

        if length == 1:  # no loop at all: XLA's CPU backend runs convolutions in loops very slowly
            state, (loss, correct) = one(state, None)
            return state, loss[None], correct[None]
        state, (losses, corrects) = jax.lax.scan(one, state, length=length)
        return state, losses, corrects


class StackedProgram:
    """A program over several runs at once, of one recipe and different seeds.

    All arrays of their states have a first axis, the runs. Run for run the numbers are those that
    the program gives alone: for one run to the bit, for several up to the rounding of sums, since
    XLA then computes with other shapes. Several take no kernel of ours, which know one network.

    Args:
      program: of the recipe, on one device.
      runs: how many.

    Attributes:
      mesh: the program's.
      init: `init(seeds)`, uint32 `[runs]`, draws the states.
      order: `order(seeds, epoch, num_examples)`, int32 `[runs, num_examples]`.
      train: `train(states, seeds, images, labels, orders, length=n)`, see `Program.steps`; losses
        and numbers of correctly classified images are `[runs, n]`. Donates the states.
    """

    def __init__(self, program: Program, runs: int):
        self.mesh = program.mesh
        everywhere = replicated(self.mesh)
        if runs == 1:  # the program itself, as XLA compiles it alone
            self.init = _alone(program.init, "r")
            self.order = _alone(program.order, "r--")
            self.train = _alone(program.train, "rr--r")
            return

        def steps(states, seeds, images, labels, orders, *, length):
            with only_xla():
                take = jax.vmap(
                    functools.partial(program.steps, length=length), in_axes=(0, 0, None, None, 0)
                )
                return take(states, seeds, images, labels, orders)

        order = jax.vmap(augment.epoch_order, in_axes=(0, None, None))
        self.init = compiled_quickly(jax.vmap(program.draw), self.mesh, out_shardings=everywhere)
        self.order = compiled_quickly(order, self.mesh, static_argnums=2, out_shardings=everywhere)
        self.train = compiled(steps, self.mesh, donate_argnums=0, static_argnames="length")


def _gradient(loss_of: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.grad(loss_of, has_aux=True)`, which `jax.vmap` turns around.

    Of several runs it is the gradient of the sum of their losses. Then the gradients of grouped
    convolutions are what a GPU's library knows as such; the vmapped gradients of convolutions are
    forward convolutions to XLA, whose windows are as large as the images.
    """

    @jax.custom_batching.custom_vmap
    def gradient(*operands: Any) -> Any:
        return jax.grad(loss_of, has_aux=True)(*operands)

    @gradient.def_vmap
    def of_several(runs: int, batched: Any, params: Any, *rest: Any) -> Any:
        del runs
        axes = tuple(jax.tree.map(lambda has_axis: 0 if has_axis else None, batched))

        def total(params: Any) -> Any:
            totals, others = jax.vmap(loss_of, in_axes=axes)(params, *rest)
            return totals.sum(), others

        results = jax.grad(total, has_aux=True)(params)
        return results, jax.tree.map(lambda _: True, results)

    return gradient


def _on_each_device(gradient: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns the gradient with every device normalising its part of the batch by itself.

    As in PyTorch's `DataParallel`: gradients and losses are averaged, and the first device's
    running statistics are kept.
    """

    def on_one(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        grads, (loss, stats, logits) = gradient(params, stats, images, labels)
        is_first = jax.lax.axis_index(BATCH_AXIS) == 0
        first = jax.tree.map(lambda stat: jnp.where(is_first, stat, 0), stats)
        grads, loss = jax.lax.pmean((grads, loss), BATCH_AXIS)
        return grads, (loss, jax.lax.psum(first, BATCH_AXIS), logits)

    everywhere, divided = PartitionSpec(), PartitionSpec(BATCH_AXIS)
    return jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(everywhere, everywhere, divided, divided),
        out_specs=(everywhere, (everywhere, everywhere, divided)),
        check_vma=False,
    )


def _alone(function: Callable[..., Any], axes: str) -> Callable[..., Any]:
    """The function of one run with a first axis: of those arguments that `axes` has an r for."""

    def alone(*arguments: Any, **options: Any) -> Any:
        pairs = zip(axes, arguments, strict=True)
        own = [_first(value) if axis == "r" else value for axis, value in pairs]
        return _stack(function(*own, **options))

    return alone


def run_of(stacked: Any, run: int | jax.Array) -> Any:
    """One run's arrays of a tree of stacked ones."""
    return jax.tree.map(lambda leaf: leaf[run], stacked)


_first = jax.jit(functools.partial(run_of, run=0))
_stack = jax.jit(functools.partial(jax.tree.map, lambda leaf: leaf[None]))


def steps_per_dispatch(steps_per_epoch: int, platform: str) -> int:
    """How many steps one call to `Program.train` takes.

    One on CPU, where a compiled loop slows convolutions down by an order of magnitude. Elsewhere
    the largest divisor of `steps_per_epoch` up to 50, so that launching costs little and every call
    is the same program; it depends on nothing that changes when a run is resumed.
    """
    if platform == "cpu":
        return 1
    return max(n for n in range(1, min(50, steps_per_epoch) + 1) if steps_per_epoch % n == 0)
