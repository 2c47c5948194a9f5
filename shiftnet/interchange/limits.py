"""What a foreign file may ask of this process, and how it is refused when it asks for more.

Together the limits bound the memory that reading takes: at most 4 × the file's size (the file, its
unpacked members, and copies of up to twice that), plus a constant for what compression and the
pickle's own structures may add, about 330 MiB at worst.
"""

import time

MiB = 2**20

# A wide ResNet-20-10 with momentum takes about 220 MB, the largest ResNet of ImageNet under 1 GB.
MAX_FILE = 2048 * MiB

# Tensors lie outside the pickle: that of a whole module with the sources of its classes is a few
# hundred kB. Text in it may take 4 bytes a character once it is decoded.
MAX_PICKLE = 8 * MiB

# One opcode of one byte can make an object of 64 bytes, so the opcodes are counted apart from the
# bytes. A ResNet-20 pickled as a module takes 15,000, a ResNet-152 some 150,000.
MAX_STEPS = 500_000

# Picklers write containers in batches of 1,000, on a few levels at once.
MAX_STACK = 100_000

# Open marks: three for each level of modules inside modules, and networks have four such levels.
MAX_MARKS = 200

# Modules inside modules.
MAX_DEPTH = 60

# Modules, and attributes of modules, that are looked at; the same object may hang in many places,
# so that few opcodes can build a tree without end.
MAX_MODULES = 10_000
MAX_ATTRIBUTES = 500_000

# Tensors in a network: a ResNet-152 has 932.
MAX_TENSORS = 20_000

# Characters in the full name of a tensor or module: names get joined, and are shown to people.
MAX_NAME = 300

# NumPy takes 64; weights have 4.
MAX_DIMS = 8

# The JSON at the start of a .safetensors file has about 100 bytes a tensor.
MAX_HEADER = 2 * MiB

# Members of a zip: one for each tensor, and for optimizers two more.
MAX_MEMBERS = 3 * MAX_TENSORS

# Seconds for all that a file makes this module compute; an ordinary checkpoint takes under one.
MAX_SECONDS = 30.0


def max_unpacked(size: int) -> int:
    """The bytes that the members of a zip of `size` bytes may unpack to.

    Trained floats deflate to nine tenths, weights of few levels to a tenth or twentieth, and zeros
    alone to a thousandth, which is what compression bombs are made of. The last term keeps
    the promise of the module's docstring for large files.
    """
    return min(50 * size + MiB, size + 64 * MiB)


def max_copied(unpacked: int) -> int:
    """The bytes of all arrays of a file whose tensors take `unpacked` bytes.

    Twice, because bfloat16 becomes float32; tensors that overlap each other count in full.
    """
    return 2 * unpacked + MiB


class Refusal(Exception):
    """Why a file is not read: a clause without the file's name, which `read` puts before it."""


class Clock:
    """Refuses what takes too long."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise Refusal(f"it takes more than {MAX_SECONDS:g} seconds to read")


def short(value: object) -> str:
    """A name from a file as it may stand in a message: quoted, one line, not long."""
    text = value if isinstance(value, str) else f"<{type(value).__name__}>"
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def joined(path: str, name: object) -> str:
    """The name of a thing inside `path`.

    Raises:
      Refusal: where that is no text that can be shown.
    """
    if not isinstance(name, str) or not name.isprintable():
        raise Refusal(f"it has a name that is no printable text, {short(name)}")
    full = f"{path}.{name}" if path else name
    if len(full) > MAX_NAME:
        raise Refusal(f"the name {short(full)} has more than {MAX_NAME} characters")
    return full
