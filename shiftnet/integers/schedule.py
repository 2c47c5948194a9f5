"""Where a program keeps its tensors: blocks row by row, in as few bytes as their rows need.

Layers are computed in segments, which end where a tensor is read by more than one layer, as blocks
do. Such a tensor is kept whole. Within a segment a layer computes a row only when the next one
needs it, into a ring of the rows that are still needed. The order is

    for each row of the segment's last layer:
        count back which rows of the other layers it needs
        for each layer, first to last: compute its rows up to there

`plan` runs through that order once, sees which rows live how long, and gives each buffer a place. A
segment's result takes the place of its input where each row is written after the last use of what
it overwrites.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from shiftnet.integers.graph import Add, Conv, Depthwise, Graph, Layer, Pool


@dataclasses.dataclass(frozen=True)
class Window:
    """The rows that a layer reads for row r: `r * stride - padding` and those after it."""

    rows: int
    stride: int
    padding: int


def window(layer: Layer) -> Window:
    """Returns the rows that a layer reads of its inputs."""
    if isinstance(layer, Conv) and layer.shift is not None:
        kernel_size, dilation = layer.shift
        return Window(dilation * (kernel_size - 1) + 1, layer.stride, dilation * (kernel_size // 2))
    if isinstance(layer, Conv | Depthwise):
        size = layer.weights.shape[0]
        return Window(size, layer.stride, size // 2)
    if isinstance(layer, Pool):
        return Window(layer.window[0], layer.stride, layer.padding)
    return Window(1, 1, 0)


@dataclasses.dataclass
class Buffer:
    """The place of a layer's output.

    Attributes:
      row_bytes: of one row.
      rows: how many rows it holds, one after the other and then from the start again.
      base: where it starts, in bytes.
    """

    row_bytes: int
    rows: int
    base: int = 0

    @property
    def bytes(self) -> int:
        return self.row_bytes * self.rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """Segments and buffers.

    Attributes:
      segments: the number of the last layer of each segment.
      buffers: of each layer; the last layer's result is the caller's and takes no memory.
      memory: bytes of all buffers.
    """

    segments: tuple[int, ...]
    buffers: tuple[Buffer, ...]
    memory: int


def plan(graph: Graph) -> Plan:
    """Plans the memory of a program."""
    layers = graph.layers
    number = {layer.name: i for i, layer in enumerate(layers)}
    readers: list[list[int]] = [[] for _ in layers]
    for i, layer in enumerate(layers):
        for name in layer.inputs:
            readers[number[name]].append(i)
    last = len(layers) - 1
    ends = [
        i
        for i, layer in enumerate(layers)
        if i == last or isinstance(layer, Add) or len(readers[i]) > 1
    ]
    itemsizes = [np.dtype(layer.output.dtype).itemsize for layer in layers]
    buffers = [
        Buffer(layer.output.width * layer.output.channels * itemsizes[i], layer.output.height)
        for i, layer in enumerate(layers)
    ]
    # The first and the last segment in which each buffer is used; those in place of another.
    lives: dict[int, tuple[int, int]] = {}
    place: dict[int, int] = {}
    first = 0
    for segment, end in enumerate(ends):
        events = list(_events(layers, number, first, end))
        reads = _last_reads(layers, number, events)
        for i in range(first, end):
            buffers[i].rows = _ring(i, events, reads[i])
            lives[i] = (segment, segment)
        uses = [segment] + [
            next(s for s, e in enumerate(ends) if reader <= e) for reader in readers[end]
        ]
        if end != last:
            lives[end] = (segment, max(uses))
            for before in {number[n] for layer in layers[first : end + 1] for n in layer.inputs}:
                dies = before < first and lives[before][1] == segment
                if (
                    dies
                    and before not in place.values()
                    and _fits_in_place(
                        layers, buffers, itemsizes, before, end, events, reads[before]
                    )
                ):
                    place[end] = before
                    break
        first = end + 1
    memory = _place(buffers, lives, place)
    return Plan(tuple(ends), tuple(buffers), memory)


def _events(
    layers: Sequence[Layer], number: dict[str, int], first: int, end: int
) -> Iterator[tuple[int, int]]:
    """Yields layer and row in the order in which a segment computes them."""
    done = dict.fromkeys(range(first, end + 1), 0)
    for row in range(layers[end].output.height):
        target = dict.fromkeys(done, 0) | {end: row + 1}
        for i in range(end, first - 1, -1):
            if target[i] <= done[i]:
                continue
            reads = window(layers[i])
            for j in (number[name] for name in layers[i].inputs):
                if j >= first:
                    needed = (target[i] - 1) * reads.stride - reads.padding + reads.rows
                    target[j] = max(target[j], min(needed, layers[j].output.height))
        for i in done:
            while done[i] < target[i]:
                yield i, done[i]
                done[i] += 1


def _last_reads(
    layers: Sequence[Layer], number: dict[str, int], events: Sequence[tuple[int, int]]
) -> list[dict[int, int]]:
    """Returns for each layer and each of its rows the event that reads it last."""
    reads: list[dict[int, int]] = [{} for _ in layers]
    for event, (i, row) in enumerate(events):
        at = window(layers[i])
        start = row * at.stride - at.padding
        for name in layers[i].inputs:
            j = number[name]
            for read in range(max(start, 0), min(start + at.rows, layers[j].output.height)):
                reads[j][read] = event
    return reads


def _ring(layer: int, events: Sequence[tuple[int, int]], reads: dict[int, int]) -> int:
    """Returns how many rows of a layer must be kept at the same time."""
    most, oldest = 1, 0
    for event, (i, row) in enumerate(events):
        if i == layer:
            while oldest < row and reads.get(oldest, -1) < event:
                oldest += 1
            most = max(most, row - oldest + 1)
    return most


def _fits_in_place(
    layers: Sequence[Layer],
    buffers: Sequence[Buffer],
    itemsizes: Sequence[int],
    before: int,
    end: int,
    events: Sequence[tuple[int, int]],
    reads: dict[int, int],
) -> bool:
    """Tells whether a segment's result can be written over its input."""
    read, written = buffers[before].row_bytes, buffers[end].row_bytes
    # A sum reads each number before it writes to its place.
    same = read == written and itemsizes[before] == itemsizes[end] and isinstance(layers[end], Add)
    for event, (i, row) in enumerate(events):
        if i != end:
            continue
        for old in range(row * written // read, -(-(row + 1) * written // read)):
            used = reads.get(old, -1)
            if used > event or (used == event and not (same and old == row)):
                return False
    return True


def _place(
    buffers: Sequence[Buffer], lives: dict[int, tuple[int, int]], place: dict[int, int]
) -> int:
    """Sets the base of each buffer, the largest first, and returns the bytes of all."""

    def origin(i: int) -> int:
        return origin(place[i]) if i in place else i

    groups: dict[int, list[int]] = {}
    for i in lives:
        groups.setdefault(origin(i), []).append(i)
    placed: list[tuple[int, int, int, int]] = []  # from byte, to byte, from segment, to segment
    sizes = {g: -(-max(buffers[i].bytes for i in group) // 4) * 4 for g, group in groups.items()}
    for g in sorted(groups, key=lambda g: (-sizes[g], g)):
        begin = min(lives[i][0] for i in groups[g])
        finish = max(lives[i][1] for i in groups[g])
        base = 0
        for start, stop, born, died in sorted(placed):
            if born <= finish and begin <= died and base < stop and start < base + sizes[g]:
                base = stop
        placed.append((base, base + sizes[g], begin, finish))
        for i in groups[g]:
            buffers[i].base = base
    return max((stop for _, stop, _, _ in placed), default=0)
