"""The worker that times our operations, and what they are compared with in JAX.

A program runs an operation on a list of buffers, one after the other: each but the first waits, by
an optimisation barrier, for the result before it, so that XLA neither merges nor overlaps them.
"""

import functools
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_rows
from benchmarks.kernel_rows import ImageRow, MatrixRow, Row
from benchmarks.packed_matmul import PackedMatrix, expand, pack, packed_matmul
from benchmarks.protocol import serve
from shiftnet.kernels.implementations import compiler_options
from shiftnet.kernels.layouts import LANES, Layout, from_nhwc, pointwise_conv, subsample, to_nhwc
from shiftnet.kernels.shift import shift
from shiftnet.kernels.shift.offsets import ChannelOrder
from shiftnet.kernels.shift_block import shift_block
from shiftnet.kernels.shift_pointwise import shift_pointwise
from shiftnet.training.processes import set_up

Operation = Callable[..., Any]
Operands = dict[str, Any]

PLATFORM = jax.default_backend() if jax.default_backend() in ("cpu", "tpu") else "gpu"
ON_CPU = PLATFORM == "cpu"
# Buffers go round through twice as much: an H200 has 60 MB of second-level cache, a TPU 128 MiB of
# VMEM. A CPU's cache can be larger than all its buffers should be; there this is only a few images.
CACHE_BYTES = {"gpu": 64 << 20, "tpu": 128 << 20, "cpu": 16 << 20}
MIN_BUFFERS, MAX_BUFFERS = 2, {"gpu": 64, "tpu": 64, "cpu": 8}[PLATFORM]
# Operations in a compiled program: many, so that starting it counts little; few of those that are
# long anyway and take the compiler long.
GROUP, GROUP_OF_LONG = {"gpu": 16, "tpu": 16, "cpu": 4}[PLATFORM], 1
LONG = ("expand first", "xla")  # of a matrix
# These differ from one buffer to the next; weights do not, but for a matrix, which is the buffer.
IN_BUFFERS = ("x", "residual", "dout", "packed", "w")
KERNEL_CALLS = ("mosaic_gpu", "tpu_custom_call")
COPY_VALUES = {"gpu": 1 << 28, "tpu": 1 << 27, "cpu": 1 << 24}
PRODUCT_SIZE = {"gpu": 8192, "tpu": 8192, "cpu": 1024}
CEILING_SECONDS = 0.1


def layout_of(row: Row) -> Layout:
    """The layout in memory that a network gives images of a row."""
    on_lanes = PLATFORM == "tpu" and isinstance(row, ImageRow) and row.batch % LANES == 0
    return "HWCN" if on_lanes else "NHWC"


def channel_order_of(row: Row) -> ChannelOrder:
    """The order of the expanded channels: where one is needed for a kernel, that one.

    The block orders its expanded channels by itself.
    """
    needed = PLATFORM == "gpu" and row.operation == "shift_pointwise"
    return "grouped" if needed else "interleaved"


def grouped(channels: int) -> np.ndarray:
    """For each channel in the order "grouped", its number in the order "interleaved"."""
    whole = channels // 9 * 9
    return np.concatenate([np.arange(whole).reshape(-1, 9).T.ravel(), np.arange(whole, channels)])


def operation(row: Row, implementation: Any) -> Operation:
    """What a row measures, as a function of the arrays of `operands` by name."""
    if isinstance(row, MatrixRow):
        return lambda x, packed: packed_matmul(x, packed, implementation=implementation)
    assert isinstance(row, ImageRow)
    return _in_layout(layout_of(row), _on_images(row, implementation))


def _in_layout(layout: Layout, call: Operation) -> Operation:
    """An operation of images in NHWC, on such images in a layout."""

    def changed(change, tree):
        return jax.tree.map(lambda a: change(a, layout) if a.ndim == 4 else a, tree)

    return lambda **operands: changed(from_nhwc, call(**changed(to_nhwc, operands)))


def _on_images(row: ImageRow, implementation: Any) -> Operation:
    setting: dict[str, Any] = {"implementation": implementation}
    if row.operation == "shift":
        return lambda x: shift(x, **setting)
    setting["stride"] = row.stride
    if row.operation == "shift_pointwise":
        if row.variant == "inference":
            setting |= {"relu": True, "out_relu": True}
        setting["channel_order"] = channel_order_of(row)
        return lambda x, w2, **around: shift_pointwise(x, w2, **around, **setting)

    def inference(x, w1, b1, w2, out_bias, residual=None):
        after = {"out_bias": out_bias, "residual": x if residual is None else residual}
        return shift_block(x, w1, b1, w2, out_relu=True, **after, **setting)

    def training(x, w1, b1, w2, dout):
        out, gradients = jax.vjp(functools.partial(shift_block, **setting), x, w1, b1, w2)
        return out, *gradients(dout)

    return training if row.variant == "training" else inference


def programs(row: Row) -> dict[str, Operation]:
    """What can be timed in a row: "ours", this device's own, and before it what is compared."""
    found: dict[str, Operation] = {}
    if isinstance(row, MatrixRow):
        found["dense"] = lambda x, w: x @ w
        found["expand first"] = lambda x, packed: x @ _written(expand(packed, x.dtype))
    elif row.operation == "shift":
        found["copy"] = lambda x: -x
    elif row.key.startswith("shift_pointwise/alone"):
        assert isinstance(row, ImageRow)
        layout, stride = layout_of(row), row.stride
        found["1x1 product"] = lambda x, w2: pointwise_conv(
            subsample(x, stride, layout), w2, layout
        )
        found["1x1 convolution"] = functools.partial(_convolution, layout, stride)
    return {**found, "xla": operation(row, "xla"), "ours": operation(row, PLATFORM)}


CHECKED = ("expand first", "xla", "ours")


def _convolution(layout: Layout, stride: int, x: jax.Array, w2: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w2[None, None], (stride, stride), "VALID", dimension_numbers=(layout, "HWIO", layout)
    )


def _written(x: jax.Array) -> jax.Array:
    """`x` in memory, rather than computed inside of what uses it."""
    return jax.lax.optimization_barrier(x)


def operands(row: Row, program: str, dtype: str) -> Operands:
    """The weights and the first buffer of a program."""
    arrays = kernel_rows.arrays(row)
    if isinstance(row, ImageRow) and channel_order_of(row) == "grouped":
        order = grouped(row.middle)
        by_channel = {name: arrays[name] for name in ("x", "scale", "bias") if name in arrays}
        arrays = {**arrays, "w2": arrays["w2"][order]}
        arrays |= {name: value[..., order] for name, value in by_channel.items()}
    found = {name: jnp.asarray(value, dtype) for name, value in arrays.items()}
    if isinstance(row, MatrixRow):
        packed = _packed(row.inputs, row.outputs, row.bits)
        return found | ({"w": expand(packed, dtype)} if program == "dense" else {"packed": packed})
    return {
        name: from_nhwc(value, layout_of(row)) if value.ndim == 4 else value
        for name, value in found.items()
    }


@functools.lru_cache(maxsize=4)
def _packed(inputs: int, outputs: int, bits: int) -> PackedMatrix:
    codes, scale = kernel_rows.matrix(inputs, outputs, bits)
    return pack(codes, kernel_rows.LEVELS[bits], scale)


@functools.lru_cache(maxsize=1)
class Data:
    """Weights and as many buffers as were asked for so far, of one row.

    Args:
      row: the row.
      program: only "dense" has other operands than the rest.
      dtype: of all floating operands but a packed matrix's scale.
    """

    def __init__(self, row: Row, program: str, dtype: str):
        every_operand = operands(row, program, dtype)
        self.weights = {k: v for k, v in every_operand.items() if k not in IN_BUFFERS}
        self._buffers = [{k: v for k, v in every_operand.items() if k in IN_BUFFERS}]

    def buffers(self, count: int) -> list[Operands]:
        """The first as the peer has it, the others at random."""
        while len(self._buffers) < count:
            key = jax.random.key(len(self._buffers))
            self._buffers.append(_at_random(key, self._buffers[0]))
        return self._buffers[:count]


@jax.jit
def _at_random(key: jax.Array, like: Operands) -> Operands:
    """Operands like these with other values: normal ones of the same size, and any words."""
    leaves, structure = jax.tree.flatten(like)
    found = []
    for number, leaf in enumerate(leaves):
        own = jax.random.fold_in(key, number)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            words = jax.random.bits(own, leaf.shape, jnp.uint32)
            found.append(jax.lax.bitcast_convert_type(words, leaf.dtype))
        elif leaf.ndim == 1:  # a packed matrix's scale
            found.append(leaf)
        else:
            size = jnp.std(leaf.astype(jnp.float32)).astype(leaf.dtype)
            found.append(size * jax.random.normal(own, leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, found)


class Rotation:
    """An operation on several buffers in turn, some of them in each call of a compiled program.

    On a GPU or TPU each call writes its results over those of the last round, at the same
    addresses. On a CPU it takes fresh memory, as an application's call would and PyTorch's does.

    Args:
      call: the operation; takes the weights and one buffer by name.
      shapes: of its operands, arrays or `jax.ShapeDtypeStruct`s, by name.
      group: how many operations a program has at most.

    Attributes:
      result: the shapes of the operation's results.
      count: how many buffers there are.
      lowered: the program.
      results: of all buffers, once `start` was called.
    """

    def __init__(self, call: Operation, shapes: Operands, group: int = GROUP):
        self.result = jax.eval_shape(call, **shapes)
        buffer = {k: v for k, v in shapes.items() if k in IN_BUFFERS}
        weights = {k: v for k, v in shapes.items() if k not in IN_BUFFERS}
        leaves = jax.tree.leaves([buffer, self.result])
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        wanted = math.ceil(2 * CACHE_BYTES[PLATFORM] / size)
        wanted = min(max(wanted, MIN_BUFFERS), MAX_BUFFERS)
        self._group = min(group, wanted)
        self.count = -(-wanted // self._group) * self._group
        one = jax.jit(call)  # traced once

        def rotate(results, weights, buffers):
            del results  # their memory is used again
            found, buffers = [], list(buffers)
            for number in range(len(buffers)):
                result = one(**weights, **buffers[number])
                if number + 1 < len(buffers):
                    both = (result, buffers[number + 1])
                    result, buffers[number + 1] = jax.lax.optimization_barrier(both)
                found.append(result)
            return found

        donated = () if ON_CPU else (0,)
        jitted = jax.jit(
            rotate,
            donate_argnums=donated,
            keep_unused=True,
            compiler_options=compiler_options(jax.default_backend()),
        )
        results = [] if ON_CPU else [self.result] * self._group
        self.lowered = jitted.lower(results, weights, [buffer] * self._group)
        self._compiled: Any = None

    @property
    def kernels(self) -> int:
        """Calls of kernels of ours in the program's operation."""
        text = self.lowered.as_text()
        return sum(text.count(f"@{name}") for name in KERNEL_CALLS)

    def compile(self) -> None:
        """Compiles the program, if that was not done."""
        if self._compiled is None:
            self._compiled = self.lowered.compile()

    def start(self, weights: Operands, buffers: list[Operands]) -> None:
        """Runs a first round. What it fails to write is not a number."""
        self.compile()
        starts = range(0, self.count, self._group)
        self._weights, self._groups = weights, [buffers[i : i + self._group] for i in starts]
        self._results: list[Any] = []
        for _ in starts:
            old = [jax.tree.map(_poison, self.result) for _ in range(0 if ON_CPU else self._group)]
            self._results.append(old)
        self._round()
        jax.block_until_ready(self._results)

    @property
    def results(self) -> list[Any]:
        return [result for group in self._results for result in group]

    def run(self, steps: int) -> float:
        """Runs about so many operations, in whole rounds of the buffers; seconds of each."""
        rounds = -(-steps // self.count)
        start = time.perf_counter()
        for _ in range(rounds):
            self._round()
        jax.block_until_ready(self._results)
        return (time.perf_counter() - start) / (rounds * self.count)

    def dispatch(self) -> float:
        """Seconds that the host needs for an operation when the device has nothing to do."""
        jax.block_until_ready(self._results)
        start = time.perf_counter()
        self._round()
        seconds = (time.perf_counter() - start) / self.count
        jax.block_until_ready(self._results)
        return seconds

    def _round(self) -> None:
        for number, buffers in enumerate(self._groups):
            old = [] if ON_CPU else self._results[number]
            self._results[number] = self._compiled(old, self._weights, buffers)
            if ON_CPU:  # where calls could run side by side
                jax.block_until_ready(self._results[number])


def _poison(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(shape.shape, jnp.nan, shape.dtype)


_prepared: dict[tuple[str, str, str], Rotation | Exception] = {}


def plan(*, row: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What there is to time in a row.

    Returns:
      `programs`, the names in the order to time them in; `implementation`, this device's own, or
      "xla", without "ours" among the programs, and `why` that is; `layout` and `channel_order`.
    """
    found = kernel_rows.from_json(row)
    result: dict[str, Any] = {
        "programs": list(programs(found)),
        "layout": layout_of(found),
        "channel_order": channel_order_of(found),
    }
    try:
        jax.eval_shape(operation(found, PLATFORM), **operands(found, "ours", dtype))
    except ValueError as error:
        why = str(error)
        if why.startswith("unknown implementation"):
            why = f"{found.operation} has none for a {PLATFORM}"
        result["programs"].remove("ours")
        return result | {"implementation": "xla", "why": why}
    except Exception:  # the kernel takes these arguments; what is wrong shows when it is compiled
        pass
    return result | {"implementation": PLATFORM}


def prepare(*, rows: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """Compiles the programs of some rows side by side, for `Program`; what fails, fails there.

    Returns:
      The rows' plans.
    """
    _prepared.clear()
    plans = [plan(row=row, dtype=dtype) for row in rows]
    for fields, planned in zip(rows, plans, strict=True):
        row = kernel_rows.from_json(fields)
        for name in planned["programs"]:
            try:
                _prepared[row.key, name, dtype] = _lowered(row, name, dtype)
            except Exception as error:
                _prepared[row.key, name, dtype] = error

    def compile_one(key: tuple[str, str, str]) -> None:
        rotation = _prepared[key]
        try:
            if isinstance(rotation, Rotation):
                rotation.compile()
        except Exception as error:
            _prepared[key] = error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, list(_prepared)))
    return plans


def _lowered(row: Row, name: str, dtype: str) -> Rotation:
    shapes = jax.tree.map(_shape, operands(row, name, dtype))
    long = isinstance(row, MatrixRow) and name in LONG
    return Rotation(programs(row)[name], shapes, GROUP_OF_LONG if long else GROUP)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class Program:
    """One program of one row.

    Args:
      row: its fields.
      program: one of `programs`.
      dtype: "float32" or "bfloat16".
    """

    def __init__(self, *, row: dict[str, Any], program: str, dtype: str):
        self._row, self._name = kernel_rows.from_json(row), program
        prepared = _prepared.pop((self._row.key, program, dtype), None)
        if isinstance(prepared, Exception):
            raise prepared
        self._rotation = prepared or _lowered(self._row, program, dtype)
        self._rotation.compile()
        data = Data(self._row, "dense" if program == "dense" else "", dtype)
        self._buffers, self._weights = data.buffers(self._rotation.count), data.weights

    def start(self) -> dict[str, Any]:
        """Runs the first round and checks it.

        Returns:
          `buffers`, how many there are; `kernels`, calls of kernels of ours in a program; `error`,
          the largest of all results against plain XLA in float32 (see `Row.by_norm`), None for
          what computes something else than the row does.
        """
        self._rotation.start(self._weights, self._buffers)
        about = {"buffers": self._rotation.count, "kernels": self._rotation.kernels}
        return {**about, "error": self._error() if self._name in CHECKED else None}

    def _error(self) -> float:
        exact, gap = _reference(self._row), functools.partial(_gap, self._row.by_norm)
        worst = 0.0
        for buffer, result in zip(self._buffers, self._rotation.results, strict=True):
            error = float(gap(exact(self._weights, buffer), result))
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst

    def check(self, steps: int) -> list[list[float]]:
        """Values at fixed places of each result of the first buffer; `steps` plays no part."""
        return [
            kernel_rows.sample(
                np.asarray(to_nhwc(a, layout_of(self._row)) if a.ndim == 4 else a, np.float32)
            )
            for a in jax.tree.leaves(self._rotation.results[0])
        ]

    def run(self, steps: int) -> float:
        """Runs about so many operations to the end of the device's work; seconds of each."""
        return self._rotation.run(steps)

    def dispatch(self) -> float:
        """See `Rotation.dispatch`."""
        return self._rotation.dispatch()


@functools.lru_cache(maxsize=1)
def _reference(row: Row) -> Operation:
    """Plain XLA in float32 without rounding inputs of products, of the weights and a buffer."""
    call = operation(row, "xla")

    @jax.jit
    def reference(weights: Operands, buffer: Operands) -> Any:
        widened = jax.tree.map(
            lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, {**weights, **buffer}
        )
        with jax.default_matmul_precision("highest"):
            return call(**widened)

    return reference


@functools.partial(jax.jit, static_argnums=0)
def _gap(by_norm: bool, exact: Any, found: Any) -> jax.Array:
    worst = jnp.float32(0)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
        gaps = jnp.abs(a - b.astype(jnp.float32))
        gap = jnp.sqrt(jnp.mean(gaps**2)) if by_norm else gaps.max()
        worst = jnp.maximum(worst, gap / jnp.sqrt(jnp.mean(a**2)))  # keeps what is not a number
    return worst


def ceilings(*, dtype: str) -> dict[str, float]:
    """What this device does at best: copying, a large product, and the smallest operation.

    Returns:
      `bytes_a_second`, read and written together; `operations_a_second`, multiplications and
      additions counted apart; `smallest_seconds`, of an operation on 128 numbers.
    """
    values, size = COPY_VALUES[PLATFORM], PRODUCT_SIZE[PLATFORM]
    key = jax.random.key(0)
    large = {"x": jax.random.normal(key, (values,), dtype)}
    copying = min(_fastest(jnp.negative, large), _fastest(jnp.copy, large))
    square = {name: jax.random.normal(key, (size, size), dtype) for name in ("x", "w")}
    return {
        "bytes_a_second": 2 * values * kernel_rows.ITEMSIZE[dtype] / copying,
        "operations_a_second": 2 * size**3 / _fastest(lambda x, w: x @ w, square),
        "smallest_seconds": _fastest(jnp.negative, {"x": large["x"][:128]}),
    }


def _fastest(call: Operation, buffer: Operands) -> float:
    """Seconds of the fastest round."""
    named = lambda **operands: call(*operands.values())  # noqa: E731
    rotation = Rotation(named, buffer)
    rotation.start({}, [_at_random(jax.random.key(i), buffer) for i in range(rotation.count)])
    steps = max(1, round(CEILING_SECONDS / rotation.run(1)))
    return min(rotation.run(steps) for _ in range(5))


def describe() -> dict[str, Any]:
    """Versions and device, for the report."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "versions": versions,
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "platform": PLATFORM,
    }


if __name__ == "__main__":
    set_up()
    serve(Program, describe=describe, ceilings=ceilings, plan=plan, prepare=prepare)
