"""The files that PyTorch's pickles come in: zip (from 1.6 on), and before that one after the other.

Sources: `torch/serialization.py` of PyTorch 0.3, 1.0 and 2.x.
"""

import dataclasses
import functools
from collections.abc import Callable

from shiftnet.interchange import beside, tensors
from shiftnet.interchange.limits import Clock, Refusal, short
from shiftnet.interchange.pickles import Global, Machine
from shiftnet.interchange.tensors import Storage, storage
from shiftnet.interchange.zips import Zip

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_CALLS = {**tensors.CALLS, **beside.CALLS}


@dataclasses.dataclass(frozen=True, slots=True)
class Pickled:
    """What a PyTorch file holds.

    Attributes:
      top: the pickled object.
      unpacked: bytes of all storages.
      data: the bytes of a whole storage, by its key.
      python2: whether Python 2 wrote it.
    """

    top: object
    unpacked: int
    data: Callable[[str], memoryview]
    python2: bool


class _Storages:
    """Collects the storages that a pickle refers to; its methods are the persistent ids."""

    def __init__(self, check: Callable[[Storage], None] = lambda whole: None) -> None:
        self.by_key: dict[str, Storage] = {}
        self._check = check

    def __call__(self, identity: object) -> Storage | Global:
        """`("storage", ...)`, or `("module", class, file, source)`, which stands for the class."""
        parts = identity if isinstance(identity, tuple) else ()
        if parts[:1] == ("storage",):
            return storage(parts, self._add)
        if parts[:1] == ("module",) and len(parts) == 4 and isinstance(parts[1], Global):
            return parts[1]
        raise Refusal("its pickle refers to something outside it that is no storage and no class")

    def _add(self, whole: Storage) -> None:
        if self.by_key.setdefault(whole.key, whole) != whole:
            raise Refusal(f"it describes storage {short(whole.key)} in two ways")
        self._check(whole)


def read_zip(archive: Zip, clock: Clock) -> Pickled:
    """Reads PyTorch's zip: `NAME/data.pkl`, and `NAME/data/KEY` for each storage.

    Raises:
      Refusal: for anything but data within the limits.
    """
    pickles = [n for n in archive.sizes if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickles) != 1:
        names = [name for name in archive.sizes if not name.startswith("__MACOSX/")]
        listed = ", ".join(map(short, names[:3])) + (", …" if len(names) > 3 else "")
        raise Refusal(
            f"expected a zip with one NAME/data.pkl or .npy files, found {len(pickles)}; it is a "
            f"zip of {listed or 'nothing'}: if a checkpoint is among them, unzip it and name that"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.sizes:
        raise Refusal("it is a TorchScript program, expected a checkpoint")
    order = f"{folder}byteorder"
    if order in archive.sizes and archive.read(order) != b"little":
        raise Refusal("it was written on a big-endian machine, expected little-endian")

    def check(whole: Storage) -> None:
        size = archive.sizes.get(f"{folder}data/{whole.key}")
        if size is None:
            raise Refusal(f"storage {short(whole.key)} has no record in the zip")
        if size != whole.bytes:
            raise Refusal(
                f"storage {short(whole.key)} must have {whole.count} elements of {whole.kind}, "
                f"{whole.bytes} bytes, but its record has {size}"
            )

    storages = _Storages(check)
    machine = Machine(archive.read(pickles[0]), 0, _CALLS, storages, clock)
    top = machine.load()
    return Pickled(
        top,
        sum(whole.bytes for whole in storages.by_key.values()),
        # Kept, because many tensors may lie in one storage.
        functools.cache(lambda key: memoryview(archive.read(f"{folder}data/{key}"))),
        machine.byte_strings,
    )


def read_legacy(data: bytes, clock: Clock) -> Pickled:
    """Reads the format from before PyTorch 1.6.

    Five pickles: a magic number, the protocol's version, the writer's sizes of types, the object,
    and the list of storages' keys; then, in the order of that list, each storage: its count of
    elements in 8 bytes, and the elements.

    Raises:
      Refusal: for anything but data within the limits.
    """
    machine = Machine(data, 0, {}, None, clock)
    magic = machine.load()
    if magic != _MAGIC:
        raise Refusal("expected a PyTorch file, found a pickle without PyTorch's magic number")
    protocol = machine.load()
    if protocol != _PROTOCOL:
        raise Refusal(f"expected version {_PROTOCOL} of PyTorch's format, found another")
    machine.load()

    storages = _Storages()
    objects = Machine(data, machine.at, _CALLS, storages, clock)
    top = objects.load()
    listing = Machine(data, objects.at, {}, None, clock)
    keys = listing.load()

    at = listing.at
    found: dict[str, memoryview] = {}
    for key in keys if isinstance(keys, list) else []:
        whole = storages.by_key.get(key) if isinstance(key, str) else None
        if whole is None or key in found:
            raise Refusal(f"its list of storages names {short(key)} twice, or without need")
        count = int.from_bytes(data[at : at + 8], "little")
        found[key] = memoryview(data)[at + 8 : at + 8 + whole.bytes]
        if len(found[key]) < whole.bytes:
            raise Refusal(
                f"it ends too early: storage {short(key)} must have {whole.count} elements of "
                f"{whole.kind}, {whole.bytes} bytes, and {len(found[key])} are left"
            )
        if count != whole.count:
            raise Refusal(
                f"storage {short(key)} must have {whole.count} elements, found {count} written"
            )
        at += 8 + whole.bytes
    for key in storages.by_key:
        if key not in found:
            raise Refusal(f"storage {short(key)} is not in the list of storages")
    return Pickled(top, at - listing.at, found.__getitem__, objects.byte_strings)
