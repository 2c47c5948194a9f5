"""Where in a pickled checkpoint the network lies, and what it and its surroundings say."""

import dataclasses
from collections.abc import Callable
from typing import TypeGuard

import numpy as np

from shiftnet.interchange.limits import (
    MAX_ATTRIBUTES,
    MAX_DEPTH,
    MAX_MODULES,
    MAX_TENSORS,
    Clock,
    Refusal,
    joined,
    max_copied,
    short,
)
from shiftnet.interchange.pickles import Record
from shiftnet.interchange.tensors import Tensor, array

_PARALLEL = (
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
)
_PREFIX = "module."  # of all names in a state dict of those

# What a network may be stored under, beside the accuracy and the epoch.
_PLACES = ("net", "state_dict")

_SCALARS = (bool, int, float, str)
_LONGEST = 16  # of the tuples among a module's attributes


@dataclasses.dataclass
class Network:
    """Tensors by their names in a state dict; for a pickled module also what it consists of."""

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    fields: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)
    _seen: int = 0

    def add(self, path: str, name: object, value: object) -> None:
        """Adds a tensor.

        Raises:
          Refusal: where it is none, or the name is taken.
        """
        full = joined(path, name)
        if not isinstance(value, Tensor):
            raise Refusal(f"{short(full)} in its network is not a tensor")
        if full in self.tensors:
            raise Refusal(f"it has two tensors named {short(full)}")
        if len(self.tensors) >= MAX_TENSORS:
            raise Refusal(f"its network has more than {MAX_TENSORS} tensors")
        self.tensors[full] = value

    def walk(self, module: Record, path: str = "", depth: int = 0) -> None:
        """Adds a module and all inside it, in the order in which PyTorch's `state_dict` goes."""
        if depth > MAX_DEPTH or len(self.modules) >= MAX_MODULES:
            raise Refusal(f"its network has more than {MAX_DEPTH} levels or {MAX_MODULES} modules")
        if path in self.modules:
            raise Refusal(f"it has two modules named {short(path)}")
        self.modules[path] = joined("", module.type_name)
        self.fields[path] = {
            name: value
            for name, value in self._items(module.fields or {}).items()
            if isinstance(name, str) and not name.startswith("_") and _is_plain(value)
        }
        hidden = self._group(module, "_non_persistent_buffers_set")
        for name, value in self._group(module, "_parameters").items():
            if value is not None:
                self.add(path, name, value)
        for name, value in self._group(module, "_buffers").items():
            if value is not None and name not in hidden:
                self.add(path, name, value)
        for name, value in self._group(module, "_modules").items():
            if value is not None:
                if not isinstance(value, Record):
                    raise Refusal(f"{short(joined(path, name))} in its network is not a module")
                self.walk(value, joined(path, name), depth + 1)

    def _group(self, module: Record, group: str) -> dict:
        members = (module.fields or {}).get(group, {})
        if isinstance(members, set):
            members = dict.fromkeys(members)
        if not isinstance(members, dict):
            raise Refusal(f"{short(group)} of a {short(module.type_name)} is not a dictionary")
        return self._items(members)

    def _items(self, members: dict) -> dict:
        self._seen += len(members)
        if self._seen > MAX_ATTRIBUTES:
            raise Refusal(f"its modules have more than {MAX_ATTRIBUTES} attributes")
        return members


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) <= _LONGEST and all(isinstance(part, _SCALARS) for part in value)
    return isinstance(value, _SCALARS)


def _is_module(value: object) -> TypeGuard[Record]:
    return isinstance(value, Record) and "_modules" in (value.fields or {})


def _is_state_dict(value: object) -> TypeGuard[dict]:
    """Whether this is a dictionary with tensors; what else is in it is for `Network.add`."""
    return isinstance(value, dict) and any(isinstance(part, Tensor) for part in value.values())


def find(top: object) -> tuple[Network, dict]:
    """The network in what a file holds, and the entries beside it.

    Raises:
      Refusal: where there is none.
    """
    found: object = top
    rest: dict = {}
    if isinstance(top, dict):
        for place in _PLACES:
            if _is_module(top.get(place)) or _is_state_dict(top.get(place)):
                found, rest = top[place], {name: top[name] for name in top if name != place}
                break
        else:  # an accuracy may be a tensor too, so that here all must be
            if not all(isinstance(value, Tensor) for value in top.values()):
                found = None
    network = Network()
    if _is_module(found):
        inner = (found.fields or {})["_modules"]
        if found.type_name in _PARALLEL and isinstance(inner, dict):
            found = inner.get("module")
        if not _is_module(found):
            raise Refusal("its parallel wrapper holds no module")
        network.walk(found)
    elif _is_state_dict(found):
        for name, value in without_prefix(found).items():
            network.add("", name, value)
    if not network.tensors:
        raise Refusal(
            "expected a network under 'net' or 'state_dict', or a state dict or module, "
            f"found {_describe(top)}"
        )
    return network, rest


def without_prefix(state: dict) -> dict:
    """A state dict without the prefix of parallel wrappers, where all of its names have it."""
    if not all(isinstance(name, str) and name.startswith(_PREFIX) for name in state):
        return state
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def _describe(top: object) -> str:
    if isinstance(top, dict):
        names = ", ".join(short(name) for name in list(top)[:5])
        return f"a dictionary of {names}" if top else "an empty dictionary"
    return f"a {short(top.type_name)}" if isinstance(top, Record) else f"a {type(top).__name__}"


class Copies:
    """Makes arrays of tensors, within the memory that a file may take."""

    def __init__(self, unpacked: int, data: Callable[[str], memoryview], clock: Clock) -> None:
        self._left = self._most = max_copied(unpacked)
        self._data = data
        self._clock = clock
        self._made: dict[Tensor, np.ndarray] = {}

    def array(self, tensor: Tensor) -> np.ndarray:
        """The tensor's array; the same one for a tensor that is equal in storage and view."""
        if tensor not in self._made:
            self._clock.check()
            self._left -= tensor.bytes
            if self._left < 0:
                raise Refusal(f"its tensors overlap, and would take more than {self._most} bytes")
            self._made[tensor] = array(tensor, self._data(tensor.storage.key))
        return self._made[tensor]


def facts(rest: dict, copies: Copies) -> tuple[dict[str, object], tuple[str, ...]]:
    """What stands beside a network: plain values by name, and the names of all else.

    A tensor of one element is a plain value, as accuracies often are.
    """
    plain: dict[str, object] = {}
    ignored = []
    for name, value in rest.items():
        key = joined("", name if isinstance(name, str) else short(name))
        if isinstance(value, Tensor) and value.bytes and set(value.shape) <= {1}:
            plain[key] = copies.array(value).item()
        elif isinstance(value, _SCALARS):
            plain[key] = value
        else:
            ignored.append(key)
    return plain, tuple(ignored)
