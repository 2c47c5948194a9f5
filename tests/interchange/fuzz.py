"""Reads many damaged files: none may crash, hang, take much memory, or leave a file behind.

    make fuzz

The seeds are the originals' valid files where those are present (`tests/oracle.py`), and in any
case the small ones of `files.py`, whose few bytes are nearly all structure: checkpoints of each
container, with prefixes, averages, descriptions and all that stands beside networks. Each damaged
file follows from its number alone. A file passes if `read` gives arrays, in which a network is
then looked for, or a `UserError` from one of its checks; the net below them counts as a failure.
How memory is watched:

- the peak that `tracemalloc` sees must be below 4 × the file's size + ALLOWED. Reading takes four
  times as long while it looks, so it looks at every TRACED-th file, and at each that made the
  process's resident memory grow by a quarter of that;
- for what it cannot see, each worker has a limit on its address space (RLIMIT_AS). That counts
  also what the allocator keeps and what `tracemalloc` itself takes, hence SLACK; what asks for
  more meets a MemoryError, which falls into the net.

The originals' files are a hundred times as large as the small ones, and take a hundred times as
long: `--originals` is their share, low for many files.

Exits with 1 if any file failed.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pickletools
import random
import re
import resource
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from shiftnet.errors import UserError
from shiftnet.interchange import UNFORESEEN, originals, read
from shiftnet.interchange.recognition import recognise
from tests import oracle
from tests.interchange import files
from tests.limit import Hang, limit

HANG = 2.0  # seconds of CPU
ALLOWED = 32 * 2**20  # bytes beyond 4 × the file's size
SLACK = 4 * ALLOWED
TRACED = 20
PART = 25_000  # files that a worker reads before it reports
SMALL = 400_000  # bytes; of larger originals there is one, which would take half of the time

PAYLOADS = [
    files.code(files.Call(files.Name(module, name), ("touch PWNED",)))
    for module, name in (("os", "system"), ("builtins", "eval"), ("__builtin__", "getattr"))
] + [b"(S'touch PWNED'\nios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93\x8c\x05PWNED\x85R"]
VALUES = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
SMALL_SEEDS = sorted(files.honest())
OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


def seeds() -> dict[str, bytes]:
    found = files.honest()
    if oracle.FOLDER.is_dir():
        manifest = json.loads((oracle.FOLDER / "manifest.json").read_text())
        for entry in manifest["checkpoints"]:
            if entry["expect"].startswith("valid") and entry["bytes"] <= SMALL:
                path = oracle.FOLDER / entry["file"]
                found[path.name] = path.read_bytes()
    return found


class Seed:
    """A valid file, and where its structure lies."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.members: dict[str, bytes] = {}
        pickle = b""
        if data.startswith(b"PK"):
            with zipfile.ZipFile(BytesIO(data)) as archive:
                self.members = {name: archive.read(name) for name in archive.namelist()}
            pickles = [name for name in self.members if name.endswith("data.pkl")]
            self.main = pickles[0] if pickles else next(iter(self.members))
            pickle = self.members[self.main] if pickles else b""
            self.structure = [match.start() for match in re.finditer(rb"PK[\1\3\5\6]", data)]
        else:
            self.main = ""
            pickle = data if data.startswith(b"\x80") else b""
            self.structure = [0]
        # Where opcodes start, in the file or in the zip's pickle.
        self.opcodes: list[int] = []
        stream = BytesIO(pickle)
        for _ in range(0 if not pickle else 1 if self.main else 5):
            self.opcodes += [at for _, _, at in pickletools.genops(stream)]
        self.end = stream.tell() if self.opcodes else min(len(data), 600)

    def rebuilt(self, main: bytes) -> bytes:
        """The file with another pickle, or another first array, and all checksums right."""
        if not self.main:
            return main + self.data[self.end :]
        return files.zipped([*{**self.members, self.main: main}.items()])

    @property
    def body(self) -> bytes:
        return self.members[self.main] if self.main else self.data[: self.end]


# Each takes a piece of a file and gives it damaged.


def flip(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def length(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    width = draw.choice([1, 2, 4, 8])
    at = draw.randrange(len(data))
    value = (draw.choice(VALUES) + draw.choice([0, 0, 1, -1])) % 2 ** (8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def splice(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    start, end, at = (draw.randrange(len(data) + 1) for _ in range(3))
    end = min(end, start + draw.choice([4, 64, 1024, len(data)]))
    return data[:at] + data[start:end] + data[at + draw.choice([0, max(0, end - start)]) :]


def remove(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice([1, 1, 2, 8, 100]) :]


def truncate(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    return data[: draw.randrange(len(data))]


def payload(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    at = draw.choice([at for at in seed.opcodes if at < len(data)] or [draw.randrange(len(data))])
    return data[:at] + draw.choice(PAYLOADS) + data[at:]


def opcode(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    places = [at for at in seed.opcodes if at < len(data)] or list(range(len(data)))
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4])):
        changed[draw.choice(places)] = draw.choice(OPCODES)
    return bytes(changed)


def repeat(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    """One opcode many times."""
    places = [at for at in seed.opcodes if at < len(data)] or [draw.randrange(len(data))]
    at = draw.choice(places)
    times = draw.choices([10, 300, 10_000, 200_000], [8, 8, 3, 1])[0]
    return data[:at] + bytes([draw.choice(OPCODES)]) * times + data[at:]


def header(draw: random.Random, data: bytes, seed: Seed) -> bytes:
    """A field of a zip's header, directory or end."""
    at = draw.choice(seed.structure) + draw.randrange(46)
    changed = data[:at] + bytes([draw.choice([0, 1, 8, 0x7F, 0xFF, draw.randrange(256)])])
    return changed + data[at + 1 :]


PIECE = [flip, length, splice, remove, truncate, payload, opcode, opcode, repeat]
WHOLE = [flip, length, splice, remove, truncate, header]


def damaged(number: int, found: dict[str, Seed], share: float = 0.4) -> tuple[str, str, bytes]:
    """The seed's name, the damage's, and the file; `share` is of those with any seed."""
    draw = random.Random(number)
    names = sorted(found) if draw.random() < share else SMALL_SEEDS
    name = draw.choice(names)
    seed = found[name]
    kind = draw.random()
    if kind < 0.1:
        other = draw.choice(names)
        return name, "concatenate", seed.data + found[other].data
    if kind < 0.4:
        act: Callable = draw.choice(WHOLE)
        return name, f"whole {act.__name__}", act(draw, seed.data, seed)
    act = draw.choice(PIECE)
    body = seed.body
    for _ in range(draw.choice([1, 1, 2, 3])):
        body = act(draw, body, seed) if body else body
    return name, f"piece {act.__name__}", seed.rebuilt(body)


def resident(reset: bool = False) -> int:
    """The process's largest resident memory since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def work(first: int, stop: int, share: float) -> dict:
    """Reads the damaged files from `first` until before `stop`, and returns what was seen."""
    found = {name: Seed(data) for name, data in seeds().items()}
    limit = 4 * 2 * max(len(seed.data) for seed in found.values()) + ALLOWED + SLACK
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + limit, resource.RLIM_INFINITY))
    seen: dict = {
        "outcomes": collections.Counter(),
        "kinds": collections.Counter(),
        "slowest": (0.0, ""),
        "largest": (-1e9, ""),
        "bytes": 0,
        "traced": 0,
        "failures": [],
    }
    with tempfile.TemporaryDirectory() as here:
        path = Path(here) / "file"
        os.chdir(here)
        for number in range(first, stop):
            name, kind, data = damaged(number, found, share)
            path.write_bytes(data)
            label = f"{number} ({kind} of {name}, {len(data)} bytes)"
            before = resident(reset=True)
            outcome, failure, took = attempt(path)
            if failure:
                seen["failures"].append(f"{failure}: {label}")
            allowed = 4 * len(data) + ALLOWED
            if number % TRACED == 0 or resident() - before > allowed / 4:
                tracemalloc.start()
                attempt(path)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                over = (peak - 4 * len(data)) / 2**20
                seen["traced"] += 1
                seen["largest"] = max(seen["largest"], (over, label))
                if peak > allowed:
                    seen["failures"].append(f"memory, {over:.1f} MiB beyond 4 x: {label}")
            if took > HANG:
                seen["failures"].append(f"{took:.1f} s: {label}")
            if os.listdir(here) != ["file"]:
                seen["failures"].append(f"made {os.listdir(here)}: {label}")
                break
            seen["outcomes"][outcome] += 1
            seen["kinds"][kind] += 1
            seen["bytes"] += len(data)
            seen["slowest"] = max(seen["slowest"], (took, label))
    return seen


def attempt(path: Path) -> tuple[str, str, float]:
    """Reads a file: what came of it, what of that must not be, and the seconds of CPU it took."""
    failure = ""
    begun = time.process_time()
    try:
        with limit(2 * HANG):
            file = read(path)
            outcome = "accepted"
            if any(array.dtype.hasobject for array in file.arrays.values()):
                failure = "holds objects"
            with contextlib.suppress(UserError):  # which network it is, before any is built
                if (found := originals.described(file.facts)) is None:
                    recognise(file.arrays)
                else:
                    originals.recognise_described(file.arrays, found)
    except UserError as error:
        outcome = reason(str(error))
        if UNFORESEEN in str(error):
            failure = f"{error} {error.__cause__}"
    except Hang:
        outcome = failure = "hang"
    except BaseException as error:  # what `read` must never let out
        outcome = failure = f"escaped: {type(error).__name__} {error}"
    return outcome, failure, time.process_time() - begun


def reason(message: str) -> str:
    """The message without what differs from file to file."""
    text = message.partition(": ")[2].removeprefix("refused, ")
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", "'…'", text)
    text = re.sub(
        r"(to run|(appends|attributes|elements) to|entries of|uses|opcode) .*", r"\1 …", text
    )
    return re.sub(r"\d+", "N", text)[:110]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=22_000, help="how many damaged files")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="where to begin")
    parser.add_argument("--originals", type=float, default=0.4, metavar="SHARE")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    begun = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    size, stop = min(PART, -(-options.files // options.workers)), options.first + options.files
    results: list[dict] = []
    with concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        parts = [
            pool.submit(work, number, min(number + size, stop), options.originals)
            for number in range(options.first, stop, size)
        ]
        for part in concurrent.futures.as_completed(parts):
            results.append(part.result())
            done = sum(r["outcomes"].total() for r in results)
            failed = [failure for r in results for failure in r["failures"]]
            took = time.perf_counter() - begun
            print(f"{done} files in {took:.0f} s, failures {len(failed)}", *failed[:5], flush=True)
    outcomes: collections.Counter = sum((r["outcomes"] for r in results), collections.Counter())
    kinds: collections.Counter = sum((r["kinds"] for r in results), collections.Counter())
    failures = [failure for r in results for failure in r["failures"]]
    slowest = max(r["slowest"] for r in results)
    largest = max(r["largest"] for r in results)
    count = sum(outcomes.values())
    size = sum(r["bytes"] for r in results) / 2**30
    print(f"damaged files    {count} from {len(seeds())} seeds, {size:.2f} GiB")
    print(f"time             {time.perf_counter() - begun:.0f} s with {options.workers} workers")
    print(f"accepted         {outcomes['accepted']}")
    print(f"refused          {count - outcomes['accepted']}")
    print(f"slowest          {slowest[0]:.3f} s: {slowest[1]}")
    print(f"largest memory   4 x size {largest[0]:+.2f} MiB: {largest[1]}")
    print(f"traced           {sum(r['traced'] for r in results)}")
    print("damage           " + ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())))
    print("reasons")
    for outcome, n in outcomes.most_common(45):
        print(f"{n:8d}  {outcome}")
    rest = outcomes.most_common()[45:]
    print(f"{sum(n for _, n in rest):8d}  {len(rest)} other reasons")
    print(f"failures         {len(failures)}")
    for failure in failures[:20]:
        print(f"  {failure}")
    return 1 if failures or count < options.files else 0


if __name__ == "__main__":
    sys.exit(main())
