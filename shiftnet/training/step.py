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
from shiftnet.config import Config
from shiftnet.data import RGB, augment
from shiftnet.data.mixing import erase, mix
from shiftnet.data.policies import rand_augment, trivial_augment
from shiftnet.errors import UserError
from shiftnet.kernels.implementations import only_xla, platform
from shiftnet.layers.learned_shift import shift_penalty
from shiftnet.models.drop_path import count_branches, dropping
from shiftnet.models.network import Network
from shiftnet.training.averaging import moving_average
from shiftnet.training.distillation import Arrays, Teacher
from shiftnet.training.losses import loss_of_recipe
from shiftnet.training.mesh import (
    BATCH_AXIS,
    batch_sharded,
    compiled,
    compiled_quickly,
    parameters_sharded,
    replicated,
)
from shiftnet.training.optimizer import keep_frozen, make_optimizer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "stats", "opt_state", "ema"],
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
    ema: tuple[nnx.State, nnx.State] | None = None  # params and stats averaged, with `ema.decay`


class Program:
    """A recipe's training as compiled functions over a mesh.

    Args:
      config: a validated recipe.
      num_classes: length of the logits.
      mean: per channel, for pixels in [0, 1].
      std: likewise.
      steps_per_epoch: full batches in the training set.
      mesh: from `make_mesh`.
      teacher: that of `config.distill`, or None.
      class_weights: as of `losses.cross_entropy`.

    Attributes:
      mesh: as given.
      runs: 1.
      teacher: the teacher's arrays, whole on every device, which `train` and `train_batch` take as
        their last argument; None without a teacher.
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
        config: Config,
        *,
        num_classes: int,
        mean: RGB,
        std: RGB,
        steps_per_epoch: int,
        mesh: Mesh,
        teacher: Teacher | None = None,
        class_weights: np.ndarray | None = None,
    ):
        self._class_weights = class_weights
        self._teacher = teacher
        self.teacher = teacher and teacher.on(mesh)
        self._config = config
        self._num_classes = num_classes
        self._mean, self._std = mean, std
        self._steps_per_epoch = steps_per_epoch
        self.mesh = mesh
        self.runs = 1
        network = nnx.eval_shape(lambda: self._build(0))
        self.graphdef = nnx.graphdef(network)
        self._branches = count_branches(network) if config.model.drop_path else 0
        if config.model.drop_path and not self._branches:
            raise UserError(
                f"model.drop_path={config.model.drop_path:g} would be ignored: "
                f"{config.model.arch} has no residual branch that can be left out"
            )
        self._optimizer = make_optimizer(
            config, steps_per_epoch, first_and_last=network.first_and_last
        )
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

    def _build(self, seed: jax.Array | int) -> Network:
        return models.build(
            self._config.model, self._num_classes, rngs=nnx.Rngs(jax.random.key(seed))
        )

    def draw(self, seed: jax.Array) -> TrainState:
        """The state that training starts from; `seed` is uint32 []."""
        _, *states = nnx.split(self._build(seed), nnx.Param, nnx.BatchStat)
        params, stats = states
        # The first step sets it.
        ema = jax.tree.map(jnp.zeros_like, (params, stats)) if self._config.ema.decay else None
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, stats, self._optimizer.init(params), ema)

    @staticmethod
    def of(tree: Any, run: int) -> Any:
        """Returns the arrays of a run, as `StackedProgram.of` does; there is one run."""
        del run
        return tree

    def update(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        targets: jax.Array | None = None,
        guidance: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        """One step of gradient descent on one batch.

        Args:
          state: where to start from.
          images: normalised `[N, H, W, 3]`.
          labels: int32 `[N]`.
          targets: `[N, num_classes]` that the loss takes in place of labels, for mixed images.
          guidance: `[N, num_classes]`, the teacher's logits.
          keys: random keys `[N]`, for the paths that are dropped.

        Returns:
          The next state, the mean loss before the step (without the weights' regulariser,
          though its gradient is taken too), and how many images of the batch
          were classified correctly (int32).
        """

        per_device = self._config.parallel.batch_norm == "per_device" and self.mesh.size > 1

        def loss_of(params, stats, images, labels, targets, guidance, keys):
            # Gathered for the products, whatever XLA might prefer; `shard_map` does so by itself.
            if self._config.parallel.fsdp and not per_device:
                params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
            model = nnx.merge(self.graphdef, params, stats, copy=True)
            with dropping(keys, self._config.model.drop_path, self._branches):
                logits = model(images, train=True)
            loss = loss_of_recipe(
                self._config, logits, labels, targets, guidance, self._class_weights
            )
            total = loss + self._config.optimizer.regularizer * quantizers.regularizer(model)
            if self._config.model.shift == "sparse":
                total += self._config.optimizer.shift_penalty * shift_penalty(model)
            return total, (loss, nnx.state(model, nnx.BatchStat), logits)

        gradient = _gradient(loss_of)
        divided = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with contextlib.nullcontext() if per_device else divided:
            gradient = _on_each_device(gradient, self.mesh) if per_device else gradient
            batch = (images, labels, targets, guidance, keys)
            grads, (loss, stats, logits) = gradient(state.params, state.stats, *batch)
        stats = keep_frozen(state.stats, stats, self._config.optimizer.freeze)
        grads = jax.lax.with_sharding_constraint(grads, self.shardings.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        predictions = logits.argmax(-1).astype(labels.dtype)
        correct = (predictions == labels).sum(dtype=jnp.int32)
        ema = state.ema and moving_average(
            state.ema,
            (params, stats),
            state.step,
            decay=self._config.ema.decay,
            every=self._config.optimizer.accumulate,
        )
        return TrainState(state.step + 1, params, stats, opt_state, ema), loss, correct

    def _train_batch(
        self,
        state: TrainState,
        seed: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        teacher: Arrays | None = None,
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        """Takes one step on a batch that is cropped and mirrored already.

        Args:
          state: where to start from.
          seed: uint32 [], the recipe's.
          images: uint8 `[N, H, W, 3]`.
          labels: int32 `[N]`.
          teacher: `self.teacher`.

        Returns:
          As `update`.
        """
        data = self._config.data
        dtype = jax.tree.leaves(state.params)[0].dtype
        if data.policy != "none":
            policy = {"trivial": trivial_augment, "rand": rand_augment}[data.policy]
            images = policy(augment.policy_key(seed, state.step), images)
        images = augment.cutout(augment.cutout_key(seed, state.step), images, data.cutout)
        images = augment.normalize(images, self._mean, self._std, dtype)
        images = erase(augment.erasing_key(seed, state.step), images, data.erase)
        targets = None
        if data.mixup or data.cutmix:
            targets = jax.nn.one_hot(labels, self._num_classes, dtype=dtype)
            key = augment.mixing_key(seed, state.step)
            images, targets = mix(key, images, targets, mixup=data.mixup, cutmix=data.cutmix)
        guidance = None
        if self._teacher is not None and teacher is not None:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                guidance = self._teacher.logits(teacher, images, self._mean, self._std)
        keys = None
        if self._config.model.drop_path:
            keys = augment.path_keys(seed, state.step, len(images))
        return self.update(state, images, labels, targets, guidance, keys)

    def steps(
        self,
        state: TrainState,
        seed: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        teacher: Arrays | None = None,
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
          teacher: `self.teacher`.
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
                flip=data.flip and data.flip_by == "chance",
            )
            if data.flip and data.flip_by == "turns":
                epoch = state.step // self._steps_per_epoch
                batch = augment.flip_in_turns(seed, epoch, chosen, batch)
            state, loss, correct = self._train_batch(state, seed, batch, labels[chosen], teacher)
            return state, (loss, correct)

        if length == 1:  # no loop at all: XLA's CPU backend runs convolutions in loops very slowly
            state, (loss, correct) = one(state, None)
            return state, loss[None], correct[None]
        state, (losses, corrects) = jax.lax.scan(one, state, length=length)
        return state, losses, corrects


class StackedProgram:
    """A program over several runs at once, of one recipe and different seeds.

    All arrays of their states have a first axis, the runs. Run for run the numbers are those that
    the program gives alone, up to the rounding of sums, since XLA then computes with other shapes.
    On a GPU the kernels run with a grid over the runs; elsewhere all is plain XLA.

    Args:
      program: the recipe's, on one device.
      runs: how many, at least 2.

    Attributes:
      mesh: the program's.
      runs: as given.
      graphdef: the program's.
      teacher: the program's.
      init: `init(seeds)`, uint32 `[runs]`, gives the states that training starts from.
      order: `order(seeds, epoch, num_examples)`, int32 `[runs, num_examples]`.
      train: `train(states, seeds, images, labels, orders, teacher, length=n)`, see `Program.steps`;
        losses and numbers of correctly classified images are `[runs, n]`. Donates the states.
    """

    def __init__(self, program: Program, runs: int):
        def steps(states, seeds, images, labels, orders, teacher=None, *, length):
            with contextlib.nullcontext() if platform() == "gpu" else only_xla():
                take = jax.vmap(
                    functools.partial(program.steps, length=length),
                    in_axes=(0, 0, None, None, 0, None),
                )
                return take(states, seeds, images, labels, orders, teacher)

        self.mesh = program.mesh
        self.runs = runs
        self.graphdef = program.graphdef
        self.teacher = program.teacher
        everywhere = replicated(self.mesh)
        order = jax.vmap(augment.epoch_order, in_axes=(0, None, None))
        self.init = compiled_quickly(jax.vmap(program.draw), self.mesh, out_shardings=everywhere)
        self.order = compiled_quickly(order, self.mesh, static_argnums=2, out_shardings=everywhere)
        self.train = compiled(steps, self.mesh, donate_argnums=0, static_argnames="length")

    @staticmethod
    def of(tree: Any, run: int) -> Any:
        """Returns one run's arrays of a tree of stacked ones."""
        return jax.tree.map(lambda leaf: leaf[run], tree)


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

    def on_one(params: Any, stats: Any, *batch: jax.Array) -> Any:
        grads, (loss, stats, logits) = gradient(params, stats, *batch)
        is_first = jax.lax.axis_index(BATCH_AXIS) == 0
        first = jax.tree.map(lambda stat: jnp.where(is_first, stat, 0), stats)
        grads, loss = jax.lax.pmean((grads, loss), BATCH_AXIS)
        return grads, (loss, jax.lax.psum(first, BATCH_AXIS), logits)

    everywhere, divided = PartitionSpec(), PartitionSpec(BATCH_AXIS)

    def on_all(params: Any, stats: Any, *batch: jax.Array) -> Any:
        return jax.shard_map(
            on_one,
            mesh=mesh,
            in_specs=(everywhere, everywhere, *[divided] * len(batch)),
            out_specs=(everywhere, (everywhere, everywhere, divided)),
            check_vma=False,
        )(params, stats, *batch)

    return on_all


def steps_per_dispatch(steps_per_epoch: int, platform: str) -> int:
    """Returns how many steps one call of `Program.train` takes, but for an epoch's last call.

    One on CPU, where a compiled loop slows convolutions down by an order of magnitude. Elsewhere up
    to 50, so that launching costs little: a divisor of `steps_per_epoch` if there is one from 25 to
    50, so that every call is the same program, or else 50, and the epoch's last call is a program
    of its own. It depends on nothing that changes when a run is resumed.
    """
    if platform == "cpu":
        return 1
    most = min(50, steps_per_epoch)
    divisors = [n for n in range((most + 1) // 2, most + 1) if steps_per_epoch % n == 0]
    return max(divisors, default=most)
