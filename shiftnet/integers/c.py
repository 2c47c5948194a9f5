"""Writes an integer network as a C99 program without multiplications.

The program is `program.c`, the same for all networks, behind tables with the network's layers.
Every weight is added as the signed powers of two that it is the sum of, and so are the multipliers
of requantization, unless these may be any integer (`--requantize multiplier`). Where the compiler
has vector instructions, `simd.c` takes the place of that arithmetic, multiplies, and gives the same
integers.
"""

import dataclasses
import importlib.resources
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shiftnet.errors import UserError
from shiftnet.files import write_atomically
from shiftnet.integers import schedule
from shiftnet.integers.graph import (
    Add,
    Conv,
    Depthwise,
    Graph,
    Layer,
    Pool,
    Table,
)
from shiftnet.quantizers import bits as packing
from shiftnet.quantizers.quantized import bits_of

MARK = "Written by shiftnet export"
MOST_LAYERS = 255  # their numbers are bytes
TYPES = {"int8": "INT8", "uint8": "UINT8", "int16": "INT16", "int32": "INT32"}
INT32_MIN = "(-2147483647 - 1)"  # C has no negative literals


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a program's data.

    Attributes:
      weights: of all layers, at their true width.
      requantization: multipliers, biases and shifts.
      tables: the codes of pixels, and where taps read.
      activations: all tensors in memory at their largest.
    """

    weights: int
    requantization: int
    tables: int
    activations: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A program's files by name, and its sizes."""

    files: dict[str, str]
    sizes: Sizes


def program(graph: Graph, class_names: Sequence[str], name: str = "net") -> Program:
    """Returns the files of a C program.

    Args:
      graph: the network.
      class_names: by class number.
      name: of its files and functions, an identifier in C.

    Raises:
      UserError: for another name, or a network that is too large for the program's tables.
    """
    check_name(name)
    if len(graph.layers) > MOST_LAYERS:
        raise UserError(
            f"the network has {len(graph.layers)} layers, a C program can have {MOST_LAYERS}"
        )
    plan = schedule.plan(graph)
    tables = _Tables(graph, plan)
    height, width = graph.shape
    constants = {
        "HEIGHT": height,
        "WIDTH": width,
        "CLASSES": graph.classes,
        "IMAGE": height * width * graph.layers[0].output.channels,
    }
    inside = {
        "LAYERS": len(graph.layers),
        "SEGMENTS": len(plan.segments),
        "MEMORY": plan.memory,
        "WIDEST": max(layer.output.width for layer in graph.layers),
        "WINDOW": max(schedule.window(layer).rows for layer in graph.layers),
        "MULTIPLIES": int(graph.multiplies),
        **_simd_sizes(graph),
    }
    if any(isinstance(layer, Conv) and layer.groups > 1 for layer in graph.layers):
        inside["PORTABLE"] = 1  # simd.c has no grouped convolutions
    header = f"""/* {MARK}. */
#ifndef NET_H
#define NET_H

#include <stdint.h>

{_defines(constants)}

/* Computes the logits of an image: NET_HEIGHT rows of NET_WIDTH pixels of red, green and blue.
   A logit of 1 stands for {graph.step!r}. Not for two threads at a time. */
void net_run(const uint8_t *image, int32_t *logits);

#endif
"""
    kernels = _resource("program.c").replace("@SIMD@\n", _resource("simd.c"))
    split = kernels.index("enum { TABLE")
    after_enums = kernels.index("/* The order of bits")
    source = "\n".join(
        [
            f"/* {MARK}. */",
            '#include "net.h"',
            "",
            _defines(inside),
            "",
            kernels[:split],
            kernels[split:after_enums],
            tables.text(),
            kernels[after_enums:],
        ]
    )
    names = "".join(f"    {_string(each)},\n" for each in class_names)
    main = f"/* {MARK}. */\n" + _resource("main.c")
    makefile = f"""# {MARK}. For this computer's vector instructions: make ARCH=-march=native
CFLAGS = -O3 -std=c99 -Wall -Wextra -Werror

net: main.c net.c net.h
\t$(CC) $(CFLAGS) $(ARCH) -o $@ main.c net.c
"""
    files = {"net.c": source, "net.h": header, "main.c": main, "Makefile": makefile}
    renamed = {re.sub(r"^net\b", name, file): _renamed(text, name) for file, text in files.items()}
    renamed["main.c"] = renamed["main.c"].replace("@NAMES@", names)  # which stay as they are
    return Program(renamed, tables.sizes(plan.memory))


def check_name(name: str) -> None:
    """Raises a UserError for a name that no function of a C program can start with."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "main":
        raise UserError(
            f"a C program must have the name of a function, such as net.c, found {name}.c"
        )


def write(program: Program, directory: Path) -> None:
    """Writes a program's files, and makes their directory where there is none.

    Raises:
      UserError: where a file of another origin would be overwritten, or one cannot be written.
    """
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {directory}: {error.strerror}") from error
    include = next(f'#include "{name}"' for name in program.files if name.endswith(".h"))
    for name in program.files:
        path = directory / name
        try:
            mine = not path.exists() or MARK.encode() in path.read_bytes()[:200]
            if mine and name == "main.c" and path.exists() and include not in path.read_text():
                raise UserError(f"{path} belongs to another program; take another directory")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        if not mine:
            raise UserError(f"{path} exists and is not from shiftnet; take another directory")
    for name, text in program.files.items():
        write_atomically(directory / name, text)


class _Tables:
    """The data of a program: arrays in C, each once, and the layers that point to them."""

    def __init__(self, graph: Graph, plan: schedule.Plan):
        self.graph, self.plan = graph, plan
        self.number = {layer.name: i for i, layer in enumerate(graph.layers)}
        self.declared: dict[tuple[str, str], str] = {}
        self.bytes = {"weights": 0, "requantization": 0, "tables": 0}
        self.entries = [self._entry(i, layer) for i, layer in enumerate(graph.layers)]

    def text(self) -> str:
        declarations = [
            f"static const {kind} {name}[] = {{\n{body}}};\n"
            for (kind, body), name in self.declared.items()
        ]
        segments = _rows([str(last) for last in self.plan.segments])
        return "\n".join(
            [
                *declarations,
                "static const layer layers[NET_LAYERS] = {",
                *self.entries,
                "};\n",
                f"static const uint8_t segments[NET_SEGMENTS] = {{\n{segments}}};\n",
            ]
        )

    def sizes(self, memory: int) -> Sizes:
        return Sizes(**self.bytes, activations=memory)

    def _array(self, prefix: str, kind: str, values: Iterable[object], purpose: str) -> str:
        literals = [_literal(value) for value in values]
        body = _rows(literals)
        if (kind, body) not in self.declared:
            self.declared[kind, body] = f"{prefix}{len(self.declared)}"
            size = {"uint8_t": 1, "int16_t": 2, "int32_t": 4, "tap": 8}[kind]
            self.bytes[purpose] += size * len(literals)
        return self.declared[kind, body]

    def _entry(self, i: int, layer: Layer) -> str:
        """Returns a layer's initializer."""
        output, buffer = layer.output, self.plan.buffers[i]
        inputs = self.graph.inputs(layer)
        reads = schedule.window(layer)
        itemsize = np.dtype(output.dtype).itemsize
        values: dict[str, object] = {
            "low": output.low,
            "high": output.high,
            "base": buffer.base,
            "bytes": buffer.bytes,
            "row": buffer.row_bytes,
            "height": output.height,
            "width": output.width,
            "channels": output.channels,
            "pixel": output.channels * itemsize,
            "type": TYPES[output.dtype],
            "window": reads.rows,
            "padding": reads.padding,
            "sources": len(inputs),
        }
        if output.height > 1:
            stride = reads.stride.bit_length() - 1
            if 1 << stride != reads.stride:
                raise UserError(f"{layer.name} has a stride of {reads.stride}, not a power of two")
            values["stride"] = stride
        if inputs:
            values["input_type"] = TYPES[inputs[0].dtype]
            sources = ", ".join(str(self.number[name]) for name in layer.inputs)
            values["source"] = f"{{{sources}}}"
        if isinstance(layer, Table):
            table = layer.table.T.ravel().astype(np.int64) & 255
            values |= {
                "kind": "TABLE",
                "weights": self._array("pixels", "uint8_t", table, "tables"),
            }
        elif isinstance(layer, Add):
            values["kind"] = "ADD"
            values |= self._requantization(layer.multipliers, [layer.bias], [layer.shift])
        else:
            values |= self._sums(layer, inputs[0], reads)
        limits = {"width": 255, "height": 2**15, "channels": 2**15, "pixel": 2**16}
        for field, limit in limits.items():
            if int(str(values[field])) > limit:
                raise UserError(f"{layer.name} has a {field} of {values[field]}, more than {limit}")
        fields = ", ".join(f".{field} = {_literal(value)}" for field, value in values.items())
        return f"    /* {layer.name} */\n" + "".join(f"    {{{fields}}},")

    def _sums(self, layer: Layer, codes, reads: schedule.Window) -> dict[str, object]:
        assert isinstance(layer, Conv | Depthwise | Pool)
        itemsize = np.dtype(codes.dtype).itemsize
        pixel = codes.channels * itemsize
        values: dict[str, object] = {"kind": "SUMS", "across": reads.stride * pixel}
        rows, columns = (reads.rows,) * 2
        dilation = 1
        if isinstance(layer, Pool):
            rows, columns = layer.window
        if isinstance(layer, Conv):
            values["inputs"] = codes.channels // layer.groups
            if layer.groups > 1:
                values |= {"channel": pixel // layer.groups, "run": layer.run, "wrap": pixel}
            if layer.shift is not None:
                kernel_size, dilation = layer.shift
                rows = columns = kernel_size
                values["kind"] = "SHIFTED"
                values["moved"] = codes.channels // kernel_size**2 * kernel_size**2
                values["centre"] = kernel_size // 2 * (kernel_size + 1)
            if layer.offsets is not None:
                dh, dw = layer.moves(codes.channels)
                directions = values["centre"] + dh.astype(int) * rows + dw
                values["directions"] = self._array("directions", "uint8_t", directions, "tables")
        else:
            values |= {"inputs": 1, "channel": itemsize, "run": 1}
        taps = []
        for row in range(rows):
            for column in range(columns):
                at = dilation * column - reads.padding
                first = max(0, -(at // reads.stride))
                last = min(layer.output.width - 1, (codes.width - 1 - at) // reads.stride)
                offset = (first * reads.stride + at) * pixel
                count = max(0, last - first + 1)
                taps.append((dilation * row, first if count else 0, count, offset if count else 0))
        if len(taps) > 2**15 or (taps and max(abs(t[3]) for t in taps) >= 2**31):
            raise UserError(f"{layer.name} has a window that is too large for a C program")
        values["taps"] = self._array(
            "taps", "tap", [f"{{{', '.join(map(str, tap))}}}" for tap in taps], "tables"
        )
        values["tap_count"] = len(taps)
        if isinstance(layer, Conv | Depthwise):
            values |= self._weights(layer)
        after = layer.requantization
        return values | self._requantization(after.multiplier, after.bias, after.shift)

    def _weights(self, layer: Conv | Depthwise) -> dict[str, object]:
        values: dict[str, object] = {}
        in_order = layer.weights.transpose(3, 0, 1, 2).ravel()
        if layer.levels:
            width = max(1, bits_of(layer.levels))
            codes = np.searchsorted(layer.levels, in_order).astype(np.uint8)
            levels = [*layer.levels] + [0] * (2**width - len(layer.levels))
            values["levels"] = self._array("levels", "int16_t", levels, "tables")
        else:
            width, codes = 8, (in_order.astype(np.int64) & 255).astype(np.uint8)
        packed = packing.pack(codes, width)
        values["weights"] = self._array("weights", "uint8_t", packed, "weights")
        values["bits"] = width
        return values

    def _requantization(self, multiplier, bias, shift) -> dict[str, object]:
        purpose = "requantization"
        return {
            "multiplier": self._array("multipliers", "int16_t", multiplier, purpose),
            "bias": self._array("biases", "int32_t", bias, purpose),
            "shift": self._array("shifts", "uint8_t", shift, purpose),
        }


def _simd_sizes(graph: Graph) -> dict[str, int]:
    """Returns the sizes of the memory that `simd.c` needs besides the activations."""
    taps = reach = prepared = unpacked = 0
    for layer in graph.layers:
        if not isinstance(layer, Conv | Depthwise | Pool):
            continue
        (codes,) = graph.inputs(layer)
        width = layer.output.width
        blocks = _up(layer.output.channels, 16)
        taps = max(taps, _taps(layer))
        unpacked += blocks * (2 * _depth(layer) + 3 * 4)
        row = ((width - 1) * layer.stride + _columns(layer)) * codes.channels
        if isinstance(layer, Conv) and layer.shift is not None:
            kernel_size, dilation = layer.shift
            size = codes.channels * np.dtype(codes.dtype).itemsize
            reach = max(reach, dilation * (kernel_size // 2) * size)
            unpacked += _up(_taps(layer) * width * size, 64)
            row = width * codes.channels
        prepared = max(prepared, 2 * row)
    return {"TAPS": taps, "REACH": reach, "UNPACKED": unpacked, "PREPARED": _up(prepared, 64)}


def _depth(layer: Conv | Depthwise | Pool) -> int:
    """Returns how many products a sum has, each row of the kernel filled up to fours."""
    if not isinstance(layer, Conv):
        return _up(_taps(layer), 4)
    rows, columns, channels, _ = layer.weights.shape
    return rows * _up(columns * channels, 4)


def _columns(layer: Conv | Depthwise | Pool) -> int:
    """Returns how many neighbours a sum reads in a row."""
    return layer.window[1] if isinstance(layer, Pool) else layer.weights.shape[1]


def _taps(layer: Conv | Depthwise | Pool) -> int:
    """Returns how many pixels a sum reads from."""
    if isinstance(layer, Pool):
        return math.prod(layer.window)
    if isinstance(layer, Conv) and layer.shift is not None:
        return layer.shift[0] ** 2
    return layer.weights.shape[0] ** 2


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _resource(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text()


def _renamed(text: str, name: str) -> str:
    """Returns a file of the program `net` for one of another name."""
    if name == "net":
        return text
    text = re.sub(r"\bNET_", f"{name.upper()}_", text)
    text = re.sub(r"\bnet_", f"{name}_", text)
    return re.sub(r"\bnet(?=[.:]| \[)", name, text)


def _defines(values: dict[str, int]) -> str:
    return "\n".join(f"#define NET_{name} {value}" for name, value in values.items())


def _literal(value: object) -> str:
    return INT32_MIN if str(value) == str(-(2**31)) else str(value)


def _rows(literals: Sequence[str]) -> str:
    """Returns array elements in lines of up to 96 characters."""
    lines, line = [], ""
    for literal in literals:
        if line and len(line) + len(literal) + 2 > 92:
            lines.append(line)
            line = ""
        line += f" {literal}," if line else f"{literal},"
    return "".join(f"    {each}\n" for each in [*lines, line] if each)


def _string(text: str) -> str:
    """Returns a C string literal, in ASCII."""
    shown = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}"
        for byte in text.encode(errors="surrogateescape")
    )
    return f'"{shown}"'
