"""Batches of decoded images on the host, by Grain: worker processes, prefetch, batching.

What a batch holds follows from its arguments, the seed and the number of the step alone, so the
number of worker processes, the number of processes of the job, and where a run was interrupted do
not change a bit of it. (As long as NumPy stays the same: its generators may draw other numbers in
another version.)

Grain starts its workers by spawning. They import neither the script that is run nor JAX (see
`shiftnet.data.worker_start`). A stream keeps its workers from epoch to epoch, and evaluation has a
stream of its own, whose workers wait through the training between. Batches come through POSIX
shared memory (/dev/shm on Linux), up to four per worker.
"""

import functools
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from shiftnet import errors
from shiftnet.data import images, worker_start
from shiftnet.data.classes import listed
from shiftnet.data.images import CorruptImage
from shiftnet.data.order import balanced, generator, shuffled
from shiftnet.data.parts import Source, Split
from shiftnet.data.workers import (
    AHEAD,
    SHARED_MEMORY,
    fit_shared_memory,
    keep_freed_memory,
    num_workers,
)
from shiftnet.errors import RunFailed, UserError

ON_CORRUPT = ("error", "skip")

# Grain 0.2.18 reads this flag of its own without regard to programs that parse no Abseil flags, and
# fails (github.com/google/grain/issues/1355). A flag that is marked as given has its default value.
_UNPARSED = "grain_enable_multiprocess_worker_profiling"
if _UNPARSED in flags.FLAGS:
    flags.FLAGS[_UNPARSED].present = 1


class Batch(NamedTuple):
    """Some decoded images.

    Attributes:
      images: uint8 [N, size, size, 3].
      labels: int32 [N]; -1 where there is no image.
      skipped: the names of the corrupt files that belong here and are not here.
    """

    images: np.ndarray
    labels: np.ndarray
    skipped: tuple[str, ...]


class _Example(NamedTuple):
    image: np.ndarray  # uint8 [size, size, 3]
    label: int
    skipped: tuple[str, ...]


class TrainStream:
    """A run's training batches, from its first step to its last, for one process of a job.

    Step s belongs to epoch s // steps_per_epoch. An epoch's order is a permutation of the whole
    source, or what `order.balanced` draws. Step s takes the `batch_size` positions of it from
    (s % steps_per_epoch) * batch_size.
    Process k of n takes the k-th n-th of these. The permutation is drawn by Philox with the seed
    and the epoch as its key and a counter from 0; the crop and flip of example i (its index in the
    source) with the same key and a counter from (i + 1) * 2^128.

    Under `on_corrupt="skip"`, a file that cannot be read or decoded is replaced by the example at
    the next position of the epoch's order whose file can be (after the last position comes the
    first), cut as it is everywhere in that epoch; so that one is seen twice. The batch names each
    file that is replaced in it; those passed over on the way are named where they belong.

    Args:
      source: the training images.
      size: side of the images, in pixels.
      batch_size: images per step, over all processes.
      steps_per_epoch: at most `len(source) // batch_size`.
      total_steps: of the run.
      seed: of the run, 0 to 2^64 - 1.
      flip: whether half of the images are mirrored.
      in_turns: whether each image is mirrored in every second epoch, and not by chance.
      scale, ratio: of crops, see `images.crop_box`.
      on_corrupt: `"error"` or `"skip"`.
      workers: processes that decode; 0 decodes in this one, when a batch is asked for.
      balance: whether every class comes equally often, see `order.balanced`; the source must have
        `labels`.
      process_index, process_count: which process of the job this is.

    Raises:
      UserError: for an unknown `on_corrupt`, a `batch_size` that the processes cannot share evenly,
        or more steps per epoch than there are images for.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        batch_size: int,
        steps_per_epoch: int,
        total_steps: int,
        seed: int,
        flip: bool,
        on_corrupt: str,
        workers: int,
        balance: bool = False,
        in_turns: bool = False,
        scale: Sequence[float] = images.SCALE,
        ratio: Sequence[float] = images.RATIO,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        share = _Share(batch_size, process_index, process_count, on_corrupt)
        if steps_per_epoch * batch_size > len(source):
            raise UserError(
                f"an epoch of {steps_per_epoch} steps of {batch_size} images is more than the "
                f"{len(source)} training images"
            )
        labels = getattr(source, "labels", None) if balance else None
        if balance and labels is None:
            raise UserError("data.balance needs the classes of all images, which a folder has")
        self._example = _TrainExample(
            source,
            share,
            size,
            steps_per_epoch,
            seed,
            flip,
            in_turns,
            tuple(scale),
            tuple(ratio),
            labels,
        )
        self._share = share
        self._total_steps = total_steps
        self._workers = workers
        self._step = 0
        self._running: list[grain.DatasetIterator] = []  # one, from the first batch to `close`
        weakref.finalize(self, _close, self._running)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        """Returns the next step's batch.

        Raises:
          StopIteration: after the last step.
          UserError: for a file that cannot be read or decoded, under `on_corrupt="error"`.
          RunFailed: if a worker process was killed.
        """
        if self._step >= self._total_steps:
            self.close()
            raise StopIteration
        if not self._running:
            first, stop = self._step, self._total_steps
            self._running.append(_batches(self._example, first, stop, self._workers))
        try:
            batch = _next(self._running)
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the stream is: what `set_state` takes, now or in another run; JSON can hold it."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where a stream with the same arguments was; `workers` may be another."""
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the worker processes. Asked for another batch, the stream starts new ones."""
        _close(self._running)


class EvalStream:
    """Every image of a source once and in order, for one process of a job; may be iterated again.

    The worker processes are kept from one time to the next, in which they make the first batches.

    Batch b has the images from b * batch_size on, and process k of n the k-th n-th of these. The
    last batch is filled up with black images and the label -1, so that all processes get the same
    number of batches. Under `on_corrupt="skip"`, a file that cannot be read or decoded becomes such
    an image.

    Args:
      source: the images.
      size: side of the images, in pixels.
      resize: the shorter side before the crop, in pixels.
      batch_size: images per batch, over all processes.
      on_corrupt: `"error"` or `"skip"`.
      workers: processes that decode; 0 decodes in this one.
      process_index, process_count: which process of the job this is.

    Raises:
      UserError: for an unknown `on_corrupt`, or a `batch_size` that the processes cannot share
        evenly; while iterating, for a file that cannot be read or decoded, under "error".
      RunFailed: while iterating, if a worker process was killed.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        resize: int,
        batch_size: int,
        on_corrupt: str,
        workers: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self._share = _Share(batch_size, process_index, process_count, on_corrupt)
        self._example = _EvalExample(source, self._share, size, resize)
        self._length = -(-len(source) // batch_size)
        self._workers = workers
        self._running: list[grain.DatasetIterator] = []  # one, while the workers are kept
        weakref.finalize(self, _close, self._running)

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if not self._running:
            self._running.append(
                _batches(self._example, 0, self._length, self._workers, again=True)
            )
        finished = False
        try:
            for _ in range(self._length):
                yield _next(self._running)
            finished = True
        finally:
            if not finished:  # the next batch is not the first one
                self.close()

    def close(self) -> None:
        """Ends the worker processes. Iterated again, the stream starts new ones."""
        _close(self._running)


def read_all(
    source: Source, *, size: int, resize: int, workers: int, on_corrupt: str
) -> tuple[Split, tuple[str, ...]]:
    """Reads all images of a source, as `EvalStream` makes them, into memory.

    Args:
      source: the images.
      size, resize, on_corrupt: as for `EvalStream`.
      workers: as for `num_workers`.

    Returns:
      The images that can be decoded, uint8 [N, size, size, 3], in order; the names of the others.

    Raises:
      UserError: for a file that cannot be decoded, under `on_corrupt="error"`, or if none can.
    """
    stream = EvalStream(
        source,
        size=size,
        resize=resize,
        batch_size=min(500, len(source)),
        on_corrupt=on_corrupt,
        workers=num_workers(workers, len(source)),
    )
    batches = list(stream)
    stream.close()
    labels = np.concatenate([batch.labels for batch in batches])
    skipped = tuple(name for batch in batches for name in batch.skipped)
    if (labels < 0).all():
        raise UserError(f"none of the {len(source)} images can be decoded: {listed(skipped)}")
    images = np.concatenate([batch.images for batch in batches])
    return Split(images[labels >= 0], labels[labels >= 0]), skipped


@dataclass(frozen=True)
class _Share:
    """The part of every batch that this process makes, and its policy on corrupt files."""

    batch_size: int
    process_index: int
    process_count: int
    on_corrupt: str

    def __post_init__(self) -> None:
        if self.on_corrupt not in ON_CORRUPT:
            raise errors.unknown("on_corrupt", self.on_corrupt, ON_CORRUPT)
        if self.batch_size % self.process_count:
            raise UserError(
                f"batch_size is {self.batch_size}; expected a multiple of {self.process_count}, "
                f"the number of processes"
            )

    @property
    def size(self) -> int:
        return self.batch_size // self.process_count

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the batch of this process's `number`-th image, and its place in that batch."""
        batch, place = divmod(number, self.size)
        return batch, self.process_index * self.size + place


@dataclass(frozen=True)
class _TrainExample:
    """Makes this process's images of the run, by number; sent to the workers."""

    source: Source
    share: _Share
    size: int
    steps_per_epoch: int
    seed: int
    flip: bool
    in_turns: bool
    scale: tuple[float, ...]
    ratio: tuple[float, ...]
    labels: np.ndarray | None  # of all images, where classes are balanced
    orders: dict[int, np.ndarray] = field(default_factory=dict)  # of the latest epoch

    def __call__(self, number: int) -> _Example:
        step, place = self.share.locate(number)
        epoch, step = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        position = step * self.share.batch_size + place
        skipped: tuple[str, ...] = ()
        for candidate in range(position, position + len(order)):
            at = candidate % len(order)
            index = int(order[at])
            # Where classes are balanced an image comes several times, each time changed otherwise.
            rng = generator(self.seed, epoch, (index if self.labels is None else at) + 1)
            try:
                data, label, name, exif = self.source[index]
                image = images.for_training(
                    data,
                    size=self.size,
                    flip=self.flip and not self.in_turns,
                    rng=rng,
                    name=name,
                    exif=exif,
                    scale=self.scale,
                    ratio=self.ratio,
                )
                if self.flip and self.in_turns and _is_first(self.seed, index) == (epoch % 2 == 0):
                    image = image[:, ::-1]
            except CorruptImage as error:
                if self.share.on_corrupt == "error":
                    raise _stopped_by(error) from error
                skipped = skipped or (error.name,)
            else:
                return _Example(image, label, skipped)
        raise UserError(f"none of the {len(order)} training images can be decoded")

    def _order(self, epoch: int) -> np.ndarray:
        if self.labels is None:
            return shuffled(self.seed, epoch, len(self.source))
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = balanced(self.seed, epoch, self.labels)
        return self.orders[epoch]


@dataclass(frozen=True)
class _EvalExample:
    """Makes this process's images, by number; sent to the workers."""

    source: Source
    share: _Share
    size: int
    resize: int

    def __call__(self, number: int) -> _Example:
        batch, place = self.share.locate(number)
        index = batch * self.share.batch_size + place
        skipped: tuple[str, ...] = ()
        if index < len(self.source):
            try:
                data, label, name, exif = self.source[index]
                image = images.for_evaluation(
                    data, size=self.size, resize=self.resize, name=name, exif=exif
                )
                return _Example(image, label, skipped)
            except CorruptImage as error:
                if self.share.on_corrupt == "error":
                    raise _stopped_by(error) from error
                skipped = (error.name,)
        return _Example(np.zeros((self.size, self.size, 3), np.uint8), -1, skipped)


def _stopped_by(error: CorruptImage) -> UserError:
    return UserError(
        f"{error}; to leave such files out: --config.data.on_corrupt=skip, or evaluate "
        "--on-corrupt=skip"
    )


def _is_first(seed: int, index: int) -> bool:
    """Whether an image is mirrored in the first epoch, of those that are in every second one."""
    return bool(generator(seed, 2**64 - 1, index + 1).random() < 0.5)  # no epoch has that number


def _batches(
    example: _TrainExample | _EvalExample,
    first: int,
    stop: int,
    workers: int,
    *,
    again: bool = False,
) -> grain.DatasetIterator:
    """Returns an iterator over this process's part of the batches `first` to `stop` - 1.

    Args:
      example: makes an image.
      first, stop: which batches.
      workers: processes that do.
      again: whether it begins again after the last one, for ever.
    """
    size = example.share.size
    ahead = AHEAD
    if workers:
        workers, ahead, message = fit_shared_memory(workers, size * 3 * example.size**2)
        _print_once(message)
    numbers = grain.MapDataset.range(first * size, stop * size)
    # Batched before it is split among the workers, each makes whole batches, and which images are
    # in a batch does not depend on how many they are. Each works for itself, without threads.
    made = numbers.map(example).batch(size, batch_fn=functools.partial(_stack, shared=workers > 0))
    batches = (made.repeat() if again else made).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    if workers:
        worker_start.install()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(batches)


@functools.cache
def _print_once(message: str) -> None:
    if message:
        print(message, file=sys.stderr, flush=True)


def _stack(examples: Sequence[_Example], *, shared: bool) -> Batch:
    """Makes a batch, in shared memory where it leaves the process: Grain would copy it there."""
    shape = (len(examples), *examples[0].image.shape)
    out = SharedMemoryArray(shape, np.dtype(np.uint8)) if shared else None
    return Batch(
        np.stack([example.image for example in examples], out=out),
        np.array([example.label for example in examples], np.int32),
        tuple(name for example in examples for name in example.skipped),
    )


def _next(running: list[grain.DatasetIterator]) -> Batch:
    try:
        batch = next(running[0])
    except UserError as error:
        # Without the frames of Grain and a worker, and a note about them that Grain adds.
        raise UserError(str(error)) from None
    except RuntimeError as error:
        killed = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))
        if killed is None:
            raise
        raise RunFailed(_killed(int(killed[1]))) from error
    # Out of a worker come arrays of Grain's own class in shared memory; a copy lets go of that at
    # once, and Grain complains at the interpreter's exit about one that is still held then.
    return Batch(np.array(batch.images), np.array(batch.labels), batch.skipped)


def _killed(number: int) -> str:
    """Returns the sentence for a worker process that a signal ended."""
    name = signal.Signals(number).name
    if number == signal.SIGBUS:
        return (
            f"a process that decodes images was killed ({name}), as when {SHARED_MEMORY} is full: "
            "set data.workers lower, or give the container more shared memory "
            "(docker run --shm-size=2g)"
        )
    return (
        f"a process that decodes images was killed ({name}), as when the machine's memory is full: "
        "set data.workers lower, or 0 to decode in the run's own process"
    )


def _close(running: list[grain.DatasetIterator]) -> None:
    """Ends the workers of the iterator in `running`, if there is one, and drops it.

    Called by `weakref.finalize`, so also at the interpreter's exit, where Grain alone is too late.
    Nothing else may hold the iterator.
    """
    if not running:
        return
    running.pop().close()
    # An exhausted iterator of Grain 0.2.18 keeps its last batch in a cycle with the traceback of
    # its StopIteration, and a thread of Grain's frees what is let go of. Left for the exit, Python
    # would report a leak of shared memory.
    gc.collect()
    if (pool := getattr(SharedMemoryArray, "_del_thread_pool", None)) is not None:
        pool.apply(int)  # returns when the thread has done all that was asked of it before


def _start_worker(index: int, count: int) -> None:
    del index, count
    keep_freed_memory()
    # Ctrl-C reaches every process of the terminal, and SLURM's SIGTERM every one of the job; the
    # parent decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A parent that is killed cannot end them, and Grain's workers would wait for it for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
