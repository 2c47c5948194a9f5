"""A pickle interpreter that can build data and nothing else.

A pickle is a program for a stack machine. Python's own `pickle` imports whatever it names and
calls it, so that opening a file may run any command. This machine has no import and no call of
anything that a file names: a name becomes a `Global`, which is text. Only these become more:

- REDUCE of a name in the table of `calls` runs our own function of that table;
- a new instance without arguments (NEWOBJ, or copyreg's functions) of a class from outside the
  standard library becomes a `Record`, and BUILD gives it its fields;
- a persistent id goes to our own function `persistent`.

All else is refused with the name that was asked for, and so is every name of the standard library
that no checkpoint needs, even where nothing calls it.

The opcodes are those of the standard library's `pickletools`, which documents each.
"""

import dataclasses
import pickletools
import struct
import sys
from collections.abc import Callable, Mapping

from shiftnet.interchange.limits import (
    MAX_MARKS,
    MAX_PICKLE,
    MAX_STACK,
    MAX_STEPS,
    Clock,
    Refusal,
    short,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle gives to a class or function, for example `models.resnet.ResNet`."""

    name: str


@dataclasses.dataclass(slots=True)
class Record:
    """What is left of an instance: the name of its class, and its attributes."""

    type_name: str
    fields: dict[str, object] | None = None  # None until BUILD


@dataclasses.dataclass(slots=True)
class Inert:
    """An instance of a class that no network consists of, such as a date: its class, by name.

    `state` is what BUILD gave it.
    """

    type_name: str
    state: object = None


Call = Callable[[tuple], object]

# Names of the standard library that stand in checkpoints as values, uncalled: of the base class of
# an instance, of the class of the command line's options, of what a defaultdict makes.
_INERT = {f"builtins.{name}" for name in ("object", "dict", "list", "int", "float")}
_INERT |= {"argparse.Namespace"}

# How Python 2 called them; Python 3 writes these names too in the protocol that PyTorch uses.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_STANDARD = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands", "popen2", "os2"}

_MAX_INTEGER = 128  # bits; PyTorch's magic number has 77, and sizes have 64


class Machine:
    """Reads the pickles that follow each other in `data`, from the byte `at` on.

    Args:
      data: the file, or the member of a file.
      at: where the first pickle starts; after `load`, where the next one does.
      calls: what REDUCE of a name does. A function gets the tuple of arguments, which may hold
        anything that a pickle can build.
      persistent: what a persistent id stands for; without it there may be none.
      clock: shared by all that reads one file.

    Attributes:
      byte_strings: whether there were byte strings (decoded as Latin-1), as Python 2 writes them.
    """

    def __init__(
        self,
        data: bytes,
        at: int,
        calls: Mapping[str, Call],
        persistent: Callable[[object], object] | None,
        clock: Clock,
    ) -> None:
        self.at = at
        self.byte_strings = False
        self._data = data
        self._calls = calls
        self._persistent = persistent
        self._clock = clock

    def load(self) -> object:
        """The object of the next pickle.

        Raises:
          Refusal: where it asks for what this machine has not, or is broken, or over a limit.
        """
        self._end = min(len(self._data), self.at + MAX_PICKLE)
        self._steps = 0
        self._stack: list = []
        self._marks: list[list] = []  # the stacks below each open mark
        self._memo: dict[int, object] = {}
        while True:
            code = self._take(1)[0]
            if code == _STOP:
                return self._pop()
            act = _ACTIONS.get(code)
            if act is None:
                raise Refusal(f"its pickle holds {_opcode(code)}")
            self._count(1)
            act(self)

    # What the file holds: every length is checked before anything is taken.

    def _take(self, count: int) -> bytes:
        if count > self._end - self.at:
            if self._end < len(self._data):
                raise Refusal(f"its pickle is longer than {MAX_PICKLE} bytes")
            raise Refusal(
                f"its pickle ends too early: expected {count} bytes more at byte {self.at}, "
                f"found {self._end - self.at}"
            )
        self.at += count
        return self._data[self.at - count : self.at]

    def _number(self, layout: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, min(self._end, self.at + 1000))
        if end < 0:
            raise Refusal(f"its pickle has no end of line after byte {self.at}, where one must be")
        return self._take(end + 1 - self.at)[:-1].decode("latin-1")

    def _text(self, count: int) -> str:
        try:
            return self._take(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Refusal(
                f"its pickle holds text before byte {self.at} that is not UTF-8"
            ) from None

    def _byte_string(self, count: int) -> str:
        self.byte_strings = True
        return self._take(count).decode("latin-1")

    def _integer(self, count: int) -> int:
        if count * 8 > _MAX_INTEGER:
            raise Refusal(f"its pickle holds an integer of {count} bytes")
        return int.from_bytes(self._take(count), "little", signed=True)

    # The stack.

    def _count(self, steps: int) -> None:
        before = self._steps
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise Refusal(f"its pickle takes more than {MAX_STEPS} steps")
        if before // 256 != self._steps // 256:
            self._clock.check()

    def _push(self, value: object) -> None:
        if len(self._stack) >= MAX_STACK:
            raise Refusal(f"its pickle piles up more than {MAX_STACK} values")
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise Refusal(f"its pickle takes a value from an empty stack at byte {self.at}")
        return self._stack.pop()

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def _mark(self) -> None:
        if len(self._marks) >= MAX_MARKS:
            raise Refusal(f"its pickle nests more than {MAX_MARKS} levels")
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list:
        if not self._marks:
            raise Refusal(f"its pickle closes what it never opened, at byte {self.at}")
        values, self._stack = self._stack, self._marks.pop()
        return values

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    # The memo. Indices must be small: picklers count them up, and chosen ones could make a
    # dictionary of integers slow.

    def _put(self, index: int) -> None:
        if index > self._steps:
            raise Refusal(f"its pickle keeps a value under the number {index}, out of order")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise Refusal(f"its pickle refers to value {index}, which it never kept")
        self._push(self._memo[index])

    # Containers.

    def _extend(self, values: list) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise Refusal(f"its pickle appends to {_what(target)}")
        target.extend(values)

    def _set_items(self, values: list) -> None:
        target = self._top()
        if not isinstance(target, dict):
            raise Refusal(f"its pickle sets entries of {_what(target)}")
        self._fill(target, values)

    def _fill(self, target: dict, values: list) -> dict:
        """Sets entries from keys and values in turn."""
        if len(values) % 2:
            raise Refusal("its pickle holds a key without a value")
        for i in range(0, len(values), 2):
            self._count(1)
            target[_key(values[i])] = values[i + 1]
        return target

    def _add_items(self, values: list) -> None:
        target = self._top()
        if not isinstance(target, set):
            raise Refusal(f"its pickle adds elements to {_what(target)}")
        target.update(map(_element, values))

    # Names, instances and calls.

    def _global(self, module: str, name: str) -> None:
        package, dot, rest = module.partition(".")
        full = f"{_RENAMED.get(package, package)}{dot}{rest}.{name}"
        known = full in _INERT or full in _MACHINE_CALLS or full in self._calls
        if package in _STANDARD and not known:
            raise Refusal(f"it asks to run {_plain(full)}")
        self._push(Global(full))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Refusal(f"its pickle names something by {_what(module)} and {_what(name)}")
        self._global(module, name)

    def _inst(self) -> None:
        """Protocol 0's "instance of a class with arguments", which may be a function's call."""
        raise Refusal(f"it asks to run {_plain(f'{self._line()}.{self._line()}')}")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global):
            raise Refusal(f"it asks to run {_what(function)}")
        if not isinstance(arguments, tuple):
            raise Refusal(f"it asks to run {_plain(function.name)} with {_what(arguments)}")
        if function.name in _MACHINE_CALLS:
            self._push(_MACHINE_CALLS[function.name](self, arguments))
        elif function.name in self._calls:
            self._push(self._calls[function.name](arguments))
        else:
            raise Refusal(f"it asks to run {_plain(function.name)}")

    def _new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise Refusal(f"its pickle makes an instance with {_what(arguments)}")
        self._push(self._instance((kind, *arguments)))

    def _instance(self, arguments: tuple) -> object:
        """A new instance of the class that comes first, with the arguments that follow."""
        if not arguments or not isinstance(arguments[0], Global):
            raise Refusal("its pickle makes an instance of no class")
        name = arguments[0].name
        if name in self._calls:
            return self._calls[name](arguments[1:])
        if name == "collections.OrderedDict":
            return self._ordered_dict(arguments[1:])
        if len(arguments) > 1 or name.startswith(("builtins.", "collections.", "copyreg.")):
            raise Refusal(f"it asks to run {_plain(name)}")
        return Record(name)

    def _reconstructor(self, arguments: tuple) -> object:
        """`copyreg._reconstructor(class, object, None)`, which protocols 0 and 1 use."""
        if len(arguments) != 3 or arguments[1:] != (Global("builtins.object"), None):
            raise Refusal("it asks to run copyreg._reconstructor with a base class")
        return self._instance(arguments[:1])

    def _ordered_dict(self, arguments: tuple) -> dict:
        """`collections.OrderedDict()`, or with a list of pairs; dictionaries keep their order."""
        items = arguments[0] if arguments else []
        if len(arguments) > 1 or not isinstance(items, list):
            raise Refusal("it makes a collections.OrderedDict of something else than pairs")
        self._count(len(items))  # the list may come from the memo, any number of times
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in items):
            raise Refusal("it makes a collections.OrderedDict of something else than pairs")
        return self._fill({}, [value for pair in items for value in pair])

    def _set(self, arguments: tuple) -> set:
        """`set()`, or with a list of elements."""
        items = arguments[0] if arguments else []
        if len(arguments) > 1 or not isinstance(items, list):
            raise Refusal("it makes a set of something else than a list")
        self._count(len(items))
        return set(map(_element, items))

    def _counted_dict(self, arguments: tuple) -> dict:
        """`collections.Counter` or `defaultdict`, which schedulers use; an argument is not kept."""
        return {}

    def _build(self) -> None:
        """Gives attributes to the instance below; other kinds have none that matter here."""
        state, target = self._pop(), self._top()
        if isinstance(target, Inert):
            target.state = state
            return
        if not isinstance(target, Record):
            if isinstance(target, (list, str, int, float, Global)) or target is None:
                raise Refusal(f"its pickle gives attributes to {_what(target)}")
            return  # the `_metadata` of a state dict; `requires_grad` and hooks of a Parameter
        if target.fields is not None:
            raise Refusal(f"its pickle gives attributes to {_plain(target.type_name)} twice")
        if not isinstance(state, dict):
            raise Refusal(
                f"its pickle gives {_plain(target.type_name)} {_what(state)} as attributes"
            )
        target.fields = state

    def _persistent_id(self) -> None:
        identity = self._pop()
        if self._persistent is None:
            raise Refusal("its pickle refers to something outside it where nothing can be")
        self._push(self._persistent(identity))

    def _string(self) -> None:
        """Protocol 0's text. PyTorch does not write it; it lets a refusal name what comes after."""
        self._push(self._line().strip("'\""))


def _key(value: object) -> object:
    """A key of a dictionary, of a kind that is quick to hash.

    Tuples are not: hashing one that holds another twice, and so on, takes time without end. Large
    integers can be chosen so that all have one hash; those of optimizers are counts or addresses.
    """
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    raise Refusal(f"its pickle uses {_what(value)} as a key")


def _element(value: object) -> str:
    """An element of a set: modules keep names in them."""
    if not isinstance(value, str):
        raise Refusal(f"its pickle puts {_what(value)} into a set")
    return value


def _what(value: object) -> str:
    """A value in a message."""
    if isinstance(value, Global):
        return _plain(value.name)
    if isinstance(value, Inert):
        return f"a {_plain(value.type_name)}"
    return f"a value of type {type(value).__name__}"


def _plain(name: str) -> str:
    """A name in a message, without quotes where it is an ordinary one."""
    return name if len(name) <= 100 and name.replace(".", "").isidentifier() else short(name)


def _opcode(code: int) -> str:
    for name, known in _CODES.items():
        if known == code:
            return f"the opcode {name}, which no checkpoint needs"
    return f"the byte {code}, where an opcode must be"


# Calls that need the machine, for its counts. `copyreg.__newobj__(class, ...)` is NEWOBJ spelled
# as a call.
_MACHINE_CALLS: dict[str, Callable[[Machine, tuple], object]] = {
    "collections.OrderedDict": Machine._ordered_dict,
    "collections.Counter": Machine._counted_dict,
    "collections.defaultdict": Machine._counted_dict,
    "builtins.set": Machine._set,
    "copyreg.__newobj__": Machine._instance,
    "copyreg._reconstructor": Machine._reconstructor,
}

_BY_NAME: dict[str, Callable[[Machine], object]] = {
    # Numbers, texts, and the three constants.
    "NONE": lambda m: m._push(None),
    "NEWTRUE": lambda m: m._push(True),
    "NEWFALSE": lambda m: m._push(False),
    "BININT": lambda m: m._push(m._number("<i")),
    "BININT1": lambda m: m._push(m._number("<B")),
    "BININT2": lambda m: m._push(m._number("<H")),
    "LONG1": lambda m: m._push(m._integer(m._number("<B"))),
    "LONG4": lambda m: m._push(m._integer(m._number("<I"))),
    "BINFLOAT": lambda m: m._push(m._number(">d")),
    "STRING": Machine._string,
    "SHORT_BINSTRING": lambda m: m._push(m._byte_string(m._number("<B"))),
    "BINSTRING": lambda m: m._push(m._byte_string(m._number("<I"))),
    "SHORT_BINUNICODE": lambda m: m._push(m._text(m._number("<B"))),
    "BINUNICODE": lambda m: m._push(m._text(m._number("<I"))),
    "BINUNICODE8": lambda m: m._push(m._text(m._number("<Q"))),
    "SHORT_BINBYTES": lambda m: m._push(m._take(m._number("<B"))),
    "BINBYTES": lambda m: m._push(m._take(m._number("<I"))),
    "BINBYTES8": lambda m: m._push(m._take(m._number("<Q"))),
    "BYTEARRAY8": lambda m: m._push(m._take(m._number("<Q"))),
    # Containers.
    "MARK": Machine._mark,
    "EMPTY_TUPLE": lambda m: m._tuple(0),
    "TUPLE1": lambda m: m._tuple(1),
    "TUPLE2": lambda m: m._tuple(2),
    "TUPLE3": lambda m: m._tuple(3),
    "TUPLE": lambda m: m._push(tuple(m._since_mark())),
    "EMPTY_LIST": lambda m: m._push([]),
    "APPEND": lambda m: m._extend([m._pop()]),
    "APPENDS": lambda m: m._extend(m._since_mark()),
    "LIST": lambda m: m._push(m._since_mark()),
    "EMPTY_DICT": lambda m: m._push({}),
    "SETITEM": lambda m: m._set_items([m._pop(), m._pop()][::-1]),
    "SETITEMS": lambda m: m._set_items(m._since_mark()),
    "DICT": lambda m: m._push(m._fill({}, m._since_mark())),
    "EMPTY_SET": lambda m: m._push(set()),
    "ADDITEMS": lambda m: m._add_items(m._since_mark()),
    # The stack and the memo.
    "POP": Machine._pop,
    "POP_MARK": Machine._since_mark,
    "DUP": lambda m: m._push(m._top()),
    "BINPUT": lambda m: m._put(m._number("<B")),
    "LONG_BINPUT": lambda m: m._put(m._number("<I")),
    "MEMOIZE": lambda m: m._put(len(m._memo)),
    "BINGET": lambda m: m._get(m._number("<B")),
    "LONG_BINGET": lambda m: m._get(m._number("<I")),
    # What only tells how the rest is written.
    "PROTO": lambda m: m._take(1),
    "FRAME": lambda m: m._take(8),
    # Names, instances and calls.
    "GLOBAL": lambda m: m._global(m._line(), m._line()),
    "STACK_GLOBAL": Machine._stack_global,
    "INST": Machine._inst,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._new,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent_id,
}
_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_ACTIONS = {_CODES[name]: act for name, act in _BY_NAME.items()}
_STOP = _CODES["STOP"]
