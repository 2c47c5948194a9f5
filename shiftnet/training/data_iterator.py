"""Where a run's batches come from: data on the devices, or image files."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from shiftnet.config import Config
from shiftnet.data import Source, Split
from shiftnet.data.order import balanced
from shiftnet.data.workers import num_workers
from shiftnet.training.mesh import replicate, shard_batch
from shiftnet.training.step import Program, StackedProgram, TrainState, steps_per_dispatch
from shiftnet.training.times import Times

# A state, and for each step taken its loss and number of correctly classified images.
Taken = tuple[TrainState, jax.Array, jax.Array]


class DataIterator(Protocol):
    """Iterates over a run's batches, and takes the steps on them."""

    def advance(self, state: TrainState, step: int) -> Taken:
        """Takes the next steps from `step`, in one call, none beyond the end of its epoch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the iterator's position, for a checkpoint's metadata."""
        ...

    def skipped(self) -> list[str]:
        """Returns the corrupt files met since the last call, by any process of the job."""
        ...

    def close(self) -> None: ...


def make_data_iterator(
    config: Config,
    program: Program | StackedProgram,
    seed: np.uint32 | np.ndarray,
    part: Split | Source,
    *,
    steps_per_epoch: int,
    mesh: Mesh,
    state: Mapping[str, Any],
    times: Times,
) -> DataIterator:
    """Makes the iterator over a run's training images, from the position `state` on.

    Args:
      config: the recipe; of several runs, the first one's.
      program: what trains.
      seed: uint32 []; or `[runs]`, for a stacked program.
      part: the training set; of files, for one run only.
      steps_per_epoch: full batches in it.
      mesh: from `make_mesh`.
      state: from `get_state`, or empty.
      times: counts what the iterator waits for.
    """
    if isinstance(part, Split):
        balance = config.data.balance
        return ResidentData(seed, program, part, steps_per_epoch, mesh, balance=balance)
    assert isinstance(program, Program)
    return FileData(config, program, part, steps_per_epoch, mesh, state, times)


class ResidentData:
    """Batches drawn on the devices, which hold all images; see `Program.steps`.

    Args:
      seed: uint32 []; or `[runs]`, for a stacked program.
      program: what trains.
      part: the training set.
      steps_per_epoch: full batches in it.
      mesh: from `make_mesh`.
      balance: whether every class comes equally often, see `order.balanced`.
    """

    def __init__(
        self,
        seed: np.ndarray | np.uint32,
        program: Program | StackedProgram,
        part: Split,
        steps_per_epoch: int,
        mesh: Mesh,
        *,
        balance: bool = False,
    ):
        self._seed = seed
        self._program = program
        self._images = replicate(part.images, mesh)
        self._labels = replicate(part.labels, mesh)
        self._balanced_labels = part.labels if balance else None
        self._mesh = mesh
        self._steps_per_epoch = steps_per_epoch
        self._chunk = steps_per_dispatch(steps_per_epoch, jax.default_backend())
        self._order: tuple[int, jax.Array] | None = None

    def advance(self, state: TrainState, step: int) -> Taken:
        epoch, within = divmod(step, self._steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._epoch_order(epoch)
        return self._program.train(
            state,
            self._seed,
            self._images,
            self._labels,
            self._order[1],
            self._program.teacher,
            length=min(self._chunk - within % self._chunk, self._steps_per_epoch - within),
        )

    def _epoch_order(self, epoch: int) -> jax.Array:
        labels = self._balanced_labels
        if labels is None:
            return self._program.order(self._seed, epoch, len(self._labels))
        orders = [balanced(int(seed), epoch, labels) for seed in np.ravel(self._seed)]
        return replicate(np.stack(orders) if np.ndim(self._seed) else orders[0], self._mesh)

    def get_state(self) -> dict[str, Any]:
        return {}  # all follows from the step

    def skipped(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class FileData:
    """Batches that worker processes decode; one a call. See `shiftnet.data.stream`."""

    def __init__(
        self,
        config: Config,
        program: Program,
        source: Source,
        steps_per_epoch: int,
        mesh: Mesh,
        state: Mapping[str, Any],
        times: Times,
    ):
        from shiftnet.data.stream import TrainStream  # Grain takes seconds to import

        self._seed = np.uint32(config.seed)
        self._program = program
        self._mesh = mesh
        self._times = times
        self._stream = TrainStream(
            source,
            size=config.data.size,
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=config.epochs * steps_per_epoch,
            seed=config.seed,
            flip=config.data.flip,
            in_turns=config.data.flip_by == "turns",
            scale=config.data.crop_scale,
            ratio=config.data.crop_ratio,
            on_corrupt=config.data.on_corrupt,
            balance=config.data.balance,
            workers=num_workers(
                config.data.workers, config.epochs * steps_per_epoch * config.batch_size
            ),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if state:
            self._stream.set_state(dict(state))
        is_first = jax.process_index() == 0
        # The checkpoint has those of all processes.
        self._skipped: list[str] = list(state.get("skipped", ()) if is_first else ())

    def advance(self, state: TrainState, step: int) -> Taken:
        del step  # the stream knows
        with self._times.on("input"):
            batch = next(self._stream)
        self._skipped += batch.skipped
        images, labels = (shard_batch(a, self._mesh) for a in (batch.images, batch.labels))
        state, loss, correct = self._program.train_batch(
            state, self._seed, images, labels, self._program.teacher
        )
        return state, loss[None], correct[None]

    def get_state(self) -> dict[str, Any]:
        return {**self._stream.get_state(), "skipped": gather_names(self._skipped)}

    def skipped(self) -> list[str]:
        mine, self._skipped = self._skipped, []
        return gather_names(mine)

    def close(self) -> None:
        self._stream.close()


def gather_names(mine: list[str]) -> list[str]:
    """Returns the names of all processes of the job, in the order of the processes."""
    if jax.process_count() == 1:
        return mine
    text = "\n".join(mine).encode()
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(length, b"\n"), np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), -1)
    return [name for row in rows for name in row.tobytes().decode().split("\n") if name]
