"""Where in a pickled checkpoint the network lies, and what it and its surroundings say."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeGuard, TypeVar

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
from shiftnet.interchange.pickles import Inert, Record
from shiftnet.interchange.tensors import Tensor, array

# Modules that hold the network as their only child, by its name in them.
_WRAPPING = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}

# What stands before every name in the state dict of those, and of a network that is an attribute of
# a larger module, such as Lightning's.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "ema_model.")
_MOST_PREFIXES = 4  # one inside the other

# What a network may be stored under, the first that is there. Averages of the weights come last.
PLACES = (
    *("net", "state_dict", "model", "model_state_dict", "model_state", "network", "module"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
)

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
        if isinstance(value, Inert):
            raise Refusal(f"{short(full)} in its network is a {value.type_name}")
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


def find(top: object, entry: str | None = None) -> tuple[Network, dict]:
    """The network in what a file holds, and the entries beside it.

    Args:
      top: the pickled object.
      entry: where the network lies, if not in one of the usual places.

    Raises:
      Refusal: where there is none.
    """
    found: object = top
    rest: dict = {}
    places = PLACES if entry is None else (entry,)
    if entry is not None and not (isinstance(top, dict) and is_network(top.get(entry))):
        raise Refusal(f"it has no network under {short(entry)}, found {_describe(top)}")
    if isinstance(top, dict):
        for place in places:
            if is_network(top.get(place)):
                found, rest = top[place], {name: top[name] for name in top if name != place}
                break
        else:  # an accuracy may be a tensor too, so that here all must be
            if not all(isinstance(value, Tensor) for value in top.values()):
                found = None
    network = Network()
    if _is_module(found):
        inner = (found.fields or {})["_modules"]
        child = _WRAPPING.get(found.type_name)
        if child and isinstance(inner, dict):
            found = inner.get(child)
        if not _is_module(found):
            raise Refusal("its wrapper holds no module")
        network.walk(found)
    elif _is_state_dict(found):
        for name, value in found.items():
            network.add("", name, value)
    if not network.tensors:
        raise Refusal(
            f"expected a network under {' or '.join(map(repr, PLACES[:4]))}, or a state dict or "
            f"module, found {_describe(top)}"
        )
    return network, rest


def is_network(value: object) -> bool:
    """Whether this is a module or a state dict."""
    return _is_module(value) or _is_state_dict(value)


Value = TypeVar("Value")


def without_prefix(state: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """A state dict without the prefixes of what wraps its network.

    Returns:
      What is left of the names where more of them start with such a prefix than with any other
      word; and the names of what lies beside the network in its wrapper.
    """
    left_out: list[str] = []
    kept = dict(state)
    for _ in range(_MOST_PREFIXES):
        counts = collections.Counter(name.partition(".")[0] + "." for name in kept)
        prefix = max(_PREFIXES, key=counts.__getitem__)
        others = [count for word, count in counts.items() if word not in _PREFIXES]
        if counts[prefix] <= max(others, default=0):
            break
        left_out += [name for name in kept if not name.startswith(prefix)]
        kept = {n.removeprefix(prefix): v for n, v in kept.items() if n.startswith(prefix)}
    return kept, left_out


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
