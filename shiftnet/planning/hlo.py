"""Reads a compiled program's traffic from its text: XLA's HLO, as `Compiled.as_text()` gives it.

The compiler's own analysis does not serve: on a TPU it also counts operands that stay in the chip's
own memory, it ignores collectives, and it does not exist for CUDA.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# Bytes that each of n devices sends in a collective around a ring, as a multiple of
# `Collective.nbytes`: in reduce-scatter and all-gather each device sends all parts but one, and an
# all-reduce is a reduce-scatter followed by an all-gather.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

# Operations that run other computations, and the attributes that name those.
_CALLING = ("while", "call", "conditional", "async")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

# Operations that give values names and move nothing.
_NAMING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "add-dependency", "domain"),
)
_NAMING_CALLS = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer|Sharding)"')
_SLICES = ("slice", "dynamic-slice", "gather")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Collective(NamedTuple):
    """An operation in which devices exchange data.

    Attributes:
      kind: XLA's name: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or
        "collective-permute".
      group: number of devices that exchange data with one another.
      nbytes: bytes of its operands on one device; for an all-gather, of its results.
      times: how often the program runs it.
    """

    kind: str
    group: int
    nbytes: int
    times: int

    @property
    def sent(self) -> float:
        """Total bytes that one device sends, around a ring of the group."""
        return self.times * self.nbytes * _SENT[self.kind](self.group)


def collectives(text: str, devices: int) -> list[Collective]:
    """Returns the collectives that a program runs, in order; loops multiply their `times`.

    Args:
      text: the compiled program of one device.
      devices: number of devices that run it.
    """
    found, carried = [], set()
    for op, times, fusion in _executed(text, into_fusions=True):
        if op.name not in _SENT:
            continue
        if fusion:  # the TPU compiler carries one through several fusions, while they compute
            channel = re.search(r"channel_id=\d+", op.attributes)
            if channel and (op.name, channel[0]) in carried:
                continue
            carried.add((op.name, channel and channel[0]))
        kind = "reduce-scatter" if fusion.startswith("all-reduce-scatter") else op.name
        types = [op.result] if kind == "all-gather" else op.operands
        nbytes = sum(map(_nbytes, types))
        found.append(Collective(kind, _group(op.attributes, devices), nbytes, times))
    return found


def memory_traffic(text: str, *, padded: bool = False) -> int:
    """Returns the bytes that a program reads from and writes to its device's memory.

    Counts each operand and each result of each operation once and whole, where a fusion or a kernel
    is one operation; a slice counts only what it reads, an update in place only what it writes.
    Arrays that the TPU compiler placed in the chip's own memory are not counted; data that it
    carries through a fusion for a collective are. A loop of unknown trip count counts as one.

    Args:
      text: the compiled program of one device.
      padded: whether to count the padding of a layout's tiles too, such as that of 16 channels to
        128 lanes.
    """
    return sum(times * _traffic(op, padded) for op, times, _ in _executed(text))


def by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """Returns how often each kind of collective runs, and the total bytes of its operands."""
    totals = {one.kind: (0, 0) for one in found}
    for one in found:
        times, nbytes = totals[one.kind]
        totals[one.kind] = times + one.times, nbytes + one.times * one.nbytes
    return totals


class _Operation(NamedTuple):
    """One operation; the start and done of an asynchronous one count as one.

    Attributes:
      name: XLA's opcode.
      result: the type of its result, as written.
      operands: the types of its operands, each operand once.
      attributes: the rest of the line.
    """

    name: str
    result: str
    operands: Sequence[str]
    attributes: str


def _executed(text: str, *, into_fusions: bool = False) -> Iterator[tuple[_Operation, int, str]]:
    """Yields each operation that runs, how often, and the fusion that contains it, or `""`."""
    computations, entry = _computations(text)
    calling = (*_CALLING, "fusion") if into_fusions else _CALLING

    def run(name: str, times: int, fusion: str) -> Iterator[tuple[_Operation, int, str]]:
        for op in _operations(computations[name]):
            yield op, times, fusion
            if op.name in calling:
                trips = _TRIPS.search(op.attributes)
                repeats = times * int(trips[1]) if trips else times
                for called in _CALLED.findall(op.attributes):
                    for inner in re.findall(r"[\w.-]+", called):
                        yield from run(inner, repeats, inner if op.name == "fusion" else fusion)

    return run(entry, 1, "")


def _computations(text: str) -> tuple[Mapping[str, Sequence[str]], str]:
    """Returns the lines of each computation, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _operations(lines: Sequence[str]) -> Iterator[_Operation]:
    types: dict[str, str] = {}
    started: dict[str, _Operation] = {}
    for line in lines:
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        name = name.lstrip("%")
        types[name], rest = _split(rest, " ")
        opcode, _, rest = rest.partition("(")
        inside, attributes = _split(rest, ")")
        operands = [known for known in dict.fromkeys(_operand_names(inside)) if known in types]
        op = _Operation(opcode, types[name], [types[known] for known in operands], attributes)
        base, _, phase = opcode.rpartition("-")
        if phase == "start":
            started[name] = op._replace(name=base)
        elif phase == "update" and operands[0] in started:
            started[name] = started[operands[0]]
        elif phase == "done" and operands[0] in started:
            yield started[operands[0]]._replace(result=types[name])
        else:
            yield op


def _operand_names(text: str) -> Iterator[str]:
    """Yields a and b for `"f32[2] %a, /*index=1*/%b"`."""
    return (match[1] for match in re.finditer(r"%?([\w.-]+)(?=\s*(?:,|$))", text))


def _split(text: str, stop: str) -> tuple[str, str]:
    """Splits a text at the first `stop` outside of brackets."""
    depth = 0
    for match in re.finditer(rf"[][(){{}}]|{re.escape(stop)}", text):
        if depth == 0 and match[0] == stop:
            return text[: match.start()], text[match.end() :]
        depth += (match[0] in "([{") - (match[0] in ")]}")
    return text, ""


def _arrays(written: str, padded: bool) -> Iterator[tuple[int, bool]]:
    """Yields a type's arrays: bytes, and whether they are in the device's main memory (space 0)."""
    for dtype, shape, layout in _ARRAY.findall(written):
        digits = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0  # token: 0
        sizes = [int(n) for n in shape.split(",") if n]
        size = math.prod(_in_tiles(sizes, layout) if padded else sizes)
        yield -(-size * bits // 8), re.search(r"S\([1-9]", layout) is None


def _in_tiles(sizes: Sequence[int], layout: str) -> list[int]:
    """Rounds an array's sizes up to its layout's tiles; `"0,1:T(8,128)"` has axis 0 innermost."""
    order, _, tiling = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", tiling)
    rounded = list(sizes)
    if tile and order:
        inner = map(int, reversed(tile[1].split(",")))
        for axis, length in zip(map(int, order.split(",")), inner, strict=False):
            rounded[axis] = -(-sizes[axis] // length) * length
    return rounded


def _nbytes(written: str, *, in_memory: bool = False, padded: bool = False) -> int:
    return sum(nbytes for nbytes, main in _arrays(written, padded) if main or not in_memory)


def _traffic(op: _Operation, padded: bool) -> int:
    if op.name in (*_NAMING, *_CALLING) or _NAMING_CALLS.search(op.attributes):
        return 0

    def touched(written: str) -> int:
        return _nbytes(written, in_memory=True, padded=padded)

    if op.name in _SLICES:
        read = _nbytes(op.result, padded=padded) if touched(op.operands[0]) else 0
        return read + touched(op.result)
    if op.name == "dynamic-update-slice":
        written = _nbytes(op.operands[1], padded=padded) if touched(op.result) else 0
        return touched(op.operands[1]) + written
    return sum(map(touched, op.operands)) + touched(op.result)


def _group(attributes: str, devices: int) -> int:
    """Returns the devices per group of a collective, from any form of its `replica_groups`."""
    if named := re.search(r"replica_groups=mesh\[([^]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return devices
