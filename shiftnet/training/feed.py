"""Where a run's batches come from: data that lies on the devices, or images read from files."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from shiftnet.data import Source, Split
from shiftnet.data.workers import num_workers
from shiftnet.training.mesh import replicate, shard_batch
from shiftnet.training.step import Program, StackedProgram, TrainState, steps_per_dispatch
from shiftnet.training.times import Times

# A state, and for each step taken its loss and number of correctly classified images.
Taken = tuple[TrainState, jax.Array, jax.Array]


class Feed(Protocol):
    """Takes a run's steps, one call of the device after the other."""

    def advance(self, state: TrainState, step: int) -> Taken:
        """Takes the next steps from `step`, none beyond the end of its epoch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Where the feed is, for a checkpoint's note."""
        ...

    def skipped(self) -> list[str]:
        """The corrupt files that were met since the last call, by any process of the job."""
        ...

    def close(self) -> None: ...


def make_feed(
    config: Any,
    program: Program,
    part: Split | Source,
    *,
    steps_per_epoch: int,
    mesh: Mesh,
    state: Mapping[str, Any],
    times: Times,
) -> Feed:
    """The feed of a run's training images, from where `state` (of `get_state`) says on.

    What it waits for is counted in `times`.
    """
    if isinstance(part, Split):
        return ResidentFeed(np.uint32(config.seed), program, part, steps_per_epoch, mesh)
    return FileFeed(config, program, part, steps_per_epoch, mesh, state, times)


class ResidentFeed:
    """Batches drawn on the devices, which hold all images; see `Program.steps`.

    Args:
      seed: uint32 []; or `[runs]`, for a stacked program.
      program: what trains.
      part: the training set.
      steps_per_epoch: full batches in it.
      mesh: from `make_mesh`.
    """

    def __init__(
        self,
        seed: np.ndarray | np.uint32,
        program: Program | StackedProgram,
        part: Split,
        steps_per_epoch: int,
        mesh: Mesh,
    ):
        self._seed = seed
        self._program = program
        self._images = replicate(part.images, mesh)
        self._labels = replicate(part.labels, mesh)
        self._steps_per_epoch = steps_per_epoch
        self._chunk = steps_per_dispatch(steps_per_epoch, jax.default_backend())
        self._order: tuple[int, jax.Array] | None = None

    def advance(self, state: TrainState, step: int) -> Taken:
        epoch, within = divmod(step, self._steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._program.order(self._seed, epoch, len(self._labels))
        return self._program.train(
            state,
            self._seed,
            self._images,
            self._labels,
            self._order[1],
            length=min(self._chunk, self._steps_per_epoch - within),
        )

    def get_state(self) -> dict[str, Any]:
        return {}  # all follows from the step

    def skipped(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class FileFeed:
    """Batches that worker processes decode; one a call. See `shiftnet.data.stream`."""

    def __init__(
        self,
        config: Any,
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
            on_corrupt=config.data.on_corrupt,
            workers=num_workers(
                config.data.workers, config.epochs * steps_per_epoch * config.batch_size
            ),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if state:
            self._stream.set_state(dict(state))
        self._skipped: list[str] = list(state.get("skipped", ()))

    def advance(self, state: TrainState, step: int) -> Taken:
        del step  # the stream knows
        with self._times.on("input"):
            batch = next(self._stream)
        self._skipped += batch.skipped
        images, labels = (shard_batch(a, self._mesh) for a in (batch.images, batch.labels))
        state, loss, correct = self._program.train_batch(state, self._seed, images, labels)
        return state, loss[None], correct[None]

    def get_state(self) -> dict[str, Any]:
        return {**self._stream.get_state(), "skipped": self._skipped}

    def skipped(self) -> list[str]:
        mine, self._skipped = self._skipped, []
        return gather_names(mine)

    def close(self) -> None:
        self._stream.close()


def gather_names(mine: list[str]) -> list[str]:
    """The names of all processes of the job, in the order of the processes."""
    if jax.process_count() == 1:
        return mine
    text = "\n".join(mine).encode()
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(length, b"\n"), np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), -1)
    return [name for row in rows for name in row.tobytes().decode().split("\n") if name]
