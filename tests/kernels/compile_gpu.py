"""Compiles every GPU kernel, and whole networks, for an H200 on a machine that has none.

    pip install "jax[cuda13]" absl-py      (about 4.4 GB, in an environment of its own)
    python -m tests.kernels.compile_gpu

Prints a line for each kernel that does not compile, with the reason, one for each convolution,
whose products are cuDNN's, and one for each network, with the bytes that its program moves (what
its operations read and write, each operand once, as if there were no caches). Exits with 1 where
something does not compile, or a network does not run its blocks through kernels or moves more than
it should. The target is described by `shiftnet/planning/h200.txtpb`. Set `MOSAIC_GPU_DUMP_PTXAS=1`
to see registers and spills.
"""

import functools
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# There is no driver here to check against.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from shiftnet.kernels.conv import conv
from shiftnet.kernels.implementations import lowered_for
from shiftnet.kernels.shift import channel_offsets
from shiftnet.kernels.shift import gpu as shift
from shiftnet.kernels.shift_block import gpu as shift_block
from shiftnet.kernels.shift_pointwise import gpu as shift_pointwise
from shiftnet.planning import hlo, plan
from tests.kernels import compile_nets

# Side, input channels, output channels and stride of the blocks of ShiftResNet20 and 56.
BLOCKS = [(32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1)]
EXPANSIONS = (1, 3, 9)
# ShiftResNet20 at expansion 9, its 9 blocks in bfloat16: kernels, and megabytes an image, at most.
NETS = {"inference": (9, 0.8), "training": (27, 8.0)}

Shape = tuple[tuple[int, ...], str]
Kernel = tuple[str, str | None, Callable[..., Any], list[Shape]]


def block(batch: int, size: tuple[int, ...], expansion: int, whole: bool) -> Kernel:
    side, channels, outputs, stride = size
    expanded = expansion * channels
    dh, dw = channel_offsets(expanded)
    core = {"dh": dh, "dw": dw, "stride": stride}
    image = ((batch, side, side, channels), "bfloat16")
    w1, w2 = ((channels, expanded), "bfloat16"), ((expanded, outputs), "bfloat16")
    shapes = [image, w1, ((expanded,), "float32"), w2]
    if whole:
        small = side // stride
        shapes += [((outputs,), "float32"), ((batch, small, small, outputs), "bfloat16")]

    def call(x, w1, b1, w2, out_bias=None, residual=None):
        after = {"out_bias": out_bias, "out_relu": whole, "residual": residual}
        return shift_block.forward(x, w1, b1, w2, **core, **after)

    reason = shift_block.unsupported(*(jax.ShapeDtypeStruct(*shapes[i]) for i in (0, 1, 3)), **core)
    return f"shift_block {batch} {size} e={expansion} whole={whole}", reason, call, shapes


def block_gradients(batch: int, size: tuple[int, ...], expansion: int) -> Kernel:
    side, channels, outputs, stride = size
    expanded, small = expansion * channels, side // stride
    dh, dw = channel_offsets(expanded)
    core = {"dh": dh, "dw": dw, "stride": stride}
    w1, w2 = ((channels, expanded), "bfloat16"), ((expanded, outputs), "bfloat16")
    image, dout = (batch, side, side, channels), (batch, small, small, outputs)
    shapes = [(image, "bfloat16"), w1, ((expanded,), "float32"), w2, (dout, "bfloat16")]
    x, w1, w2 = (jax.ShapeDtypeStruct(*shapes[i]) for i in (0, 1, 3))
    reason = shift_block.unsupported(x, w1, w2, **core, backward=True)
    call = functools.partial(shift_block.backward, **core)
    return f"gradients of shift_block {batch} {size} e={expansion}", reason, call, shapes


def pointwise(batch: int, size: tuple[int, ...], whole: bool) -> Kernel:
    side, channels, outputs, stride = size
    expanded = 9 * channels
    dh, dw = (np.repeat(offset, channels) for offset in channel_offsets(9))
    core = {"relu": whole, "dh": dh, "dw": dw, "stride": stride}
    shapes = [((batch, side, side, expanded), "bfloat16"), ((expanded, outputs), "bfloat16")]
    if whole:
        small = side // stride
        shapes += [((n,), "float32") for n in (expanded, expanded, outputs, outputs)]
        shapes += [((batch, small, small, outputs), "bfloat16")]

    def call(x, w, scale=None, bias=None, out_scale=None, out_bias=None, residual=None):
        after = {"out_scale": out_scale, "out_bias": out_bias, "residual": residual}
        return shift_pointwise.forward(x, w, scale, bias, **core, **after, out_relu=whole)

    x, w = (jax.ShapeDtypeStruct(*shape) for shape in shapes[:2])
    return (
        f"shift_pointwise {batch} {size} whole={whole}",
        shift_pointwise.unsupported(x, w, **core),
        call,
        shapes,
    )


def pointwise_gradients(batch: int, size: tuple[int, ...], whole: bool) -> Kernel:
    side, channels, outputs, stride = size
    expanded, small = 9 * channels, side // stride
    dh, dw = (np.repeat(offset, channels) for offset in channel_offsets(9))
    core = {"relu": whole, "dh": dh, "dw": dw, "stride": stride}
    image, dout = (batch, side, side, expanded), (batch, small, small, outputs)
    shapes = [(image, "bfloat16"), ((expanded, outputs), "bfloat16"), (dout, "bfloat16")]
    if whole:
        shapes += [((expanded,), "float32")] * 2

    def call(x, w, dout, scale=None, bias=None):
        return shift_pointwise.backward(x, w, scale, bias, dout, **core)

    x, w = (jax.ShapeDtypeStruct(*shape) for shape in shapes[:2])
    reason = shift_pointwise.unsupported(x, w, **core, backward=True)
    return f"gradients of shift_pointwise {batch} {size} whole={whole}", reason, call, shapes


def several(kernel: Kernel, runs: int) -> Kernel:
    """The same of several seeds at once, by `jax.vmap`."""
    name, reason, call, shapes = kernel
    stacked = [((runs, *shape), dtype) for shape, dtype in shapes]
    return f"{runs} times {name}", reason, jax.vmap(call), stacked


def moves(shape: tuple[int, ...], dtype: str, kernel_size: int = 3) -> Kernel:
    dh, dw = channel_offsets(shape[-1], kernel_size)
    reason = shift.unsupported(shape, jnp.dtype(dtype), dh, dw)
    return f"shift {shape} {dtype}", reason, lambda x: shift.shift(x, dh, dw), [(shape, dtype)]


def kernels() -> Iterator[Kernel]:
    for size in BLOCKS:
        for expansion in EXPANSIONS:
            yield block(512, size, expansion, True)
            yield block_gradients(512, size, expansion)
            yield moves((512, size[0], size[0], expansion * size[1]), "bfloat16")
        yield pointwise(512, size, True)
        yield pointwise_gradients(512, size, True)
    # Networks of several seeds.
    for size in (BLOCKS[0], BLOCKS[3]):
        for expansion in (1, 9):
            yield several(block(128, size, expansion, True), 4)
            yield several(block_gradients(128, size, expansion), 4)
    yield several(pointwise(128, BLOCKS[1], True), 4)
    yield several(pointwise_gradients(128, BLOCKS[1], True), 4)
    yield several(moves((128, 32, 32, 144), "bfloat16"), 4)
    # A batch too small for all multiprocessors, and nothing before or after the products.
    yield block(8, BLOCKS[0], 9, False)
    yield block_gradients(8, BLOCKS[0], 9)
    yield pointwise(8, BLOCKS[0], False)
    yield pointwise_gradients(8, BLOCKS[0], False)
    # Images larger than a tile, rows that are no multiple of 8 pixels.
    yield block(64, (56, 64, 64, 1), 1, True)
    yield block_gradients(64, (56, 64, 64, 1), 1)
    yield block(64, (28, 16, 48, 2), 3, True)
    yield block_gradients(64, (28, 16, 48, 2), 3)
    yield pointwise(64, (28, 16, 48, 2), True)
    yield moves((64, 56, 56, 64), "bfloat16")
    yield moves((64, 32, 32, 144), "float32")
    yield moves((64, 14, 14, 200), "bfloat16", 5)


def net(which: str, mesh: jax.sharding.Mesh) -> tuple[int, float, float]:
    """The kernels in a network's program, the MB an image that it moves, seconds to compile."""
    f, operands = compile_nets.program(compile_nets.SHIFTRESNET, "bfloat16", which, mesh)

    def traced(*operands):  # a function of its own, which JAX has not traced yet
        with lowered_for("gpu"):
            return f(*operands)

    start = time.perf_counter()
    text = jax.jit(traced).lower(*operands).compile().as_text()
    called = text.count('custom_call_target="mosaic_gpu')
    moved = hlo.memory_traffic(text) / compile_nets.SHIFTRESNET.batch / 1e6
    return called, moved, time.perf_counter() - start


# Side, channels, outputs, stride and groups of 3x3 convolutions.
CONVOLUTIONS = [(32, 16, 16, 1, 1), (32, 16, 32, 2, 1), (32, 42, 42, 1, 42)]


def convolution(sizes: tuple[int, ...], sharding: jax.sharding.Sharding) -> list[str]:
    """cuDNN's operations in the forward pass and gradients of a convolution, bfloat16 in NHWC."""
    side, channels, outputs, stride, groups = sizes
    shapes = ((128, side, side, channels), (3, 3, channels // groups, outputs))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]

    def both(x, w):
        out, pull = jax.vjp(functools.partial(conv, stride=stride, groups=groups), x, w)
        return out, pull(out)

    with lowered_for("gpu"):
        text = jax.jit(both).lower(*operands).compile().as_text()
    calls = re.findall(
        r"= \(bf16.* custom-call.*dim_labels=b01f.*custom_call_target=\"(.*?)\"", text
    )
    return [call for call in calls if call.startswith("__cudnn$conv")]


def main() -> int:
    target = pathlib.Path(plan.__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    failed = total = 0
    start = time.perf_counter()
    for name, reason, call, shapes in kernels():
        total += 1
        try:
            if reason:
                raise ValueError(reason)
            arguments = [jax.ShapeDtypeStruct(*shape, sharding=here) for shape in shapes]
            jax.jit(call).lower(*arguments).compile()
        except Exception as error:  # whatever a compiler raises is what this is for
            failed += 1
            reason = next(iter(str(error).splitlines()), "")
            print(f"{name}: {type(error).__name__}: {reason}")
    seconds = time.perf_counter() - start
    print(
        f"{total - failed} of {total} kernels compiled for an H200 in {seconds:.0f} s", flush=True
    )
    for sizes in CONVOLUTIONS:
        found = convolution(sizes, here)
        failed += len(found) != 3
        print(f"conv {sizes}: {', '.join(found)}: {'ok' if len(found) == 3 else 'NO'}", flush=True)
    for which, (least, most) in NETS.items():
        called, moved, seconds = net(which, mesh)
        good = called >= least and moved <= most
        failed += not good
        print(
            f"{compile_nets.SHIFTRESNET.arch} h200 bfloat16 {which:9} {moved:5.2f} MB an image, at "
            f"most {most:.2f}; {called} kernels, at least {least}: {'ok' if good else 'NO'}; "
            f"compiled in {seconds:.0f} s",
            flush=True,
        )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
