"""Shift and 1x1 convolution for Hopper: the shift is the coordinate of a copy.

The channels of one offset lie side by side. Pixels are numbered through all images, so that the
shifted channels of a tile of pixels are a plain box of the matrix `x[pixels, channels]` at another
row, and the copy engine loads it from there. A warpgroup reads each box into registers, applies the
prologue, drops what wrapped around an image's edge, and multiplies by the box's rows of the weight;
the sum stays in registers until all boxes are through. At stride 2 the copy engine picks even or
odd rows and columns as it loads.

The weight stays in shared memory; a block works through many tiles and has the next boxes under way
meanwhile. Rows are 16 bytes longer there than the channels of an offset, so that 8 of them never
meet in a memory bank; the copy engine fills that part with zeros from beyond the array's edge.

Bytes moved per output pixel at bfloat16: 2*C of `x` (every value that is used once, no halo), 2*K
written, 2*K more for a residual; and once for each of the 132 multiprocessors the weight.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shiftnet.kernels import gpu

# Warpgroups of a block and pixels of a tile, best first.
_SHAPES = ((4, 128), (4, 64), (3, 64), (2, 64), (1, 64))
_MOST_BOXES = 8  # under way for a warpgroup; 3 at least
_REGISTERS = {4: 64, 3: 96, 2: 160, 1: 160}


class _Plan(NamedTuple):
    taps: list[gpu.Tap]
    boxes: list[int]  # where the channels of each tap are, in units of the depth
    depth: int  # channels of a tap
    line: int  # pixels that one row of the copies' view of x holds
    rows: int  # rows of a tile
    front: int  # pixels in shared memory before the first box
    pixels: int  # pixels in shared memory
    computed: int  # pixels of a tile, rounded up to what the tensor cores take
    slots: int  # boxes in shared memory
    warpgroups: int


def _plan(x, w, *, dh, dw, stride) -> _Plan | str:
    """How to cut these arguments into tiles, or why that cannot be done."""
    view = gpu.image(x, dh, dw, stride)
    if isinstance(view, str):
        return view
    _, width, line, taps = view
    channels, outputs = x.shape[-1], w.shape[1]
    if outputs % 16 or not 0 < outputs <= 128:
        return f"w has {outputs} outputs, not a multiple of 16 up to 128"
    depth = taps[0].channels.size
    boxes = [int(tap.channels[0]) // depth for tap in taps]
    for box, tap in zip(boxes, taps, strict=True):
        if not np.array_equal(tap.channels, box * depth + np.arange(depth)):
            return "the channels of an offset are not side by side, as many for each"
    if depth % 16 or depth > 128 or channels % depth:
        return f"{depth} channels move by the same offset, not a multiple of 16 up to 128"
    reach = max(abs(tap.flat(width)) for tap in taps)
    front = gpu.round_up(reach, 8)
    # The copy engine moves multiples of 128 bytes to multiples of 128 bytes: 8 pixels.
    unit = 8 // math.gcd(line, 8)
    weights = 2 * len(taps) * depth * outputs + 8 * len(taps) * depth
    # Registers of a thread for 64 pixels: the sum, and a box before and after the prologue.
    registers = outputs // 2 + depth // 2 + depth // 4
    for warpgroups, most in _SHAPES:
        rows = most // line // unit * unit
        if rows == 0:
            continue
        computed = gpu.round_up(rows * line, 64)
        if registers * computed // 64 > _REGISTERS[warpgroups]:
            continue
        for slots in range(_MOST_BOXES, 2, -1):
            # Every pixel that is read has its place, also those that masks drop.
            pixels = front + gpu.round_up((slots - 1) * rows * line + computed + reach, 8)
            image = pixels * (depth + 8) * 2
            if weights + warpgroups * (image + computed * outputs * 2) <= (
                gpu.SHARED_BYTES - gpu.RESERVED_BYTES
            ):
                return _Plan(
                    taps, boxes, depth, line, rows, front, pixels, computed, slots, warpgroups
                )
    return (
        f"{channels} channels at {len(taps)} offsets to {outputs} outputs do not fit into "
        f"{gpu.SHARED_BYTES} bytes of shared memory and 65536 registers"
    )


def unsupported(
    x: jax.Array,
    w: jax.Array,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> str | None:
    """Why `forward` cannot take these arguments, in one clause; None when it can.

    Looks at shapes and dtypes only.
    """
    del relu
    plan = _plan(x, w, dh=dh, dw=dw, stride=stride)
    return plan if isinstance(plan, str) else None


def forward(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    out_scale: jax.Array | None = None,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`shift(relu(x * scale + bias))[:, ::stride, ::stride] @ w`, then the epilogue.

    Args:
      x: `[N, H, W, C]` bfloat16. The channels of one offset are side by side, as many for each.
      w: `[C, K]`, rounded to bfloat16.
      scale, bias: `[C]` or None, the prologue, in float32.
      relu: whether the prologue ends with a ReLU.
      dh, dw: int32 `[C]`, the offset in pixels that each channel reads from.
      stride: 1 or 2.
      out_scale, out_bias: `[K]` or None, in float32.
      out_relu: whether a ReLU follows.
      residual: `[N, H/stride, W/stride, K]` or None, rounded to bfloat16 and added last.
      interpret: simulate the kernel on the CPU.

    Returns:
      `[N, H/stride, W/stride, K]` bfloat16. Sums are float32; the prologue's result is rounded to
      bfloat16 once, the result once.

    Raises:
      ValueError: where `unsupported` gives a reason.
    """
    plan = _plan(x, w, dh=dh, dw=dw, stride=stride)
    if isinstance(plan, str):
        raise ValueError(f"shift_pointwise has no GPU kernel for this: {plan}")
    n, height, width, channels = x.shape
    height, width = height // stride, width // stride
    outputs = w.shape[1]
    groups = (channels // plan.depth, plan.depth)
    if stride == 1:
        view = x.reshape(n * height * width, *groups)
    else:
        view = x.reshape(n * height, stride, width, stride, *groups)
    boxes = np.array(plan.boxes)
    operands = {"x": view, "w": w.astype(x.dtype).reshape(*groups, outputs)[boxes]}
    # Copies move multiples of 128 bytes.
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            value = value.astype(jnp.float32).reshape(groups)[boxes]
            operands[name] = jnp.pad(value, ((0, -len(boxes) % 2), (0, 0)))
    for name, value in (("out_scale", out_scale), ("out_bias", out_bias)):
        if value is not None:
            operands[name] = jnp.pad(value.astype(jnp.float32), (0, 128 - outputs))
    if residual is not None:
        operands["residual"] = residual.astype(x.dtype).reshape(n * height * width, outputs)
    out_type = jax.ShapeDtypeStruct((n * height * width, outputs), x.dtype)
    out = _kernel(plan, (height, width), out_type, relu, out_relu, interpret, operands)
    return out.reshape(n, height, width, outputs)


def _kernel(
    plan: _Plan,
    size: tuple[int, int],
    out_type: jax.ShapeDtypeStruct,
    relu: bool,
    out_relu: bool,
    interpret: bool,
    operands: dict[str, jax.Array],
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    height, width = size
    total, outputs = out_type.shape
    depth, slots, line, step, warpgroups = (
        *(plan.depth, plan.slots, plan.line, plan.computed, plan.warpgroups),
    )
    pitch = depth + 8
    tile = plan.rows * line
    tiles = -(-total // tile)
    blocks = min(gpu.MULTIPROCESSORS, -(-tiles // warpgroups))
    workers = blocks * warpgroups
    layout = plgpu.Layout.WGMMA
    # The interpreter does not reshape, so that a copy takes one row at a time there.
    box = 1 if interpret and line > 1 else plan.rows
    copies = range(0, plan.rows, box)
    resident = [name for name in operands if name not in ("x", "residual")]

    def body(gmem, out_gmem, smem, image, out_smem, left, arrived, added, ready):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        worker = block * warpgroups + wg
        image, out_smem = image.at[wg], out_smem.at[wg]
        left = None if left is None else left.at[wg]

        @pl.when(wg == 0)
        def _resident():
            for name in resident:
                plgpu.copy_gmem_to_smem(gmem[name], smem[name], ready)

        def rows_and_offset(number, index):
            """The first row of x that is loaded for a tap, and where the tile's pixels start.

            That row is never negative: what lies before the first image is not loaded, and masks
            drop it.
            """
            tap = plan.taps[number]
            offset, column = (tap.row, tap.column) if line > 1 else (tap.flat(width), 0)
            wanted = index * plan.rows + offset
            first = jnp.maximum(wanted, 0)
            return first, (wanted - first) * line + column

        def fetch(number, index, slot):
            tap = plan.taps[number]
            first, _ = rows_and_offset(number, index)
            channels = (plan.boxes[number], gpu.padded(block, pitch))
            for row in copies:
                target = image.at[pl.ds(plan.front + slot * tile + row * line, box * line)]
                rows = pl.ds(first + row, box)
                if line == 1:
                    source = gmem["x"].at[(rows, *channels)]
                else:
                    if box > 1:
                        target = target.reshape(box, line, pitch)
                    else:
                        rows = first + row
                    part = (rows, tap.row_phase, pl.ds(0, line), tap.column_phase)
                    source = gmem["x"].at[(*part, *channels)]
                plgpu.copy_gmem_to_smem(source, target, arrived.at[wg * slots + slot])

        def per_output(name):
            vector = gpu.load(smem[name].at[pl.ds(0, outputs)], layout.reduce(0), interpret)
            return lax.broadcast_in_dim(vector, (step, outputs), (1,))

        def per_channel(name, number):
            vector = gpu.load(smem[name].at[number], layout.reduce(0), interpret)
            return lax.broadcast_in_dim(vector, (step, depth), (1,))

        mine = (tiles - worker + workers - 1) // workers
        count = len(plan.taps)
        for early in range(slots):

            @pl.when(early // count < mine)
            def _first(early=early):
                fetch(early % count, worker + early // count * workers, early)

        plgpu.barrier_wait(ready)

        @pl.loop(0, mine)
        def _tile(turn):
            index = worker + turn * workers
            here = pl.ds(index * tile, tile)
            # The last tile's result has left the buffer that this one's goes to.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if "residual" in gmem:
                target = out_smem.at[pl.ds(0, tile)]
                plgpu.copy_gmem_to_smem(gmem["residual"].at[here], target, added.at[wg])
            pixels = gpu.count_up(index * tile, step, layout.reduce(1), interpret)
            row, column = gpu.coordinates(pixels, height, width)

            def product(acc):
                for number, tap in enumerate(plan.taps):
                    slot = lax.rem(turn * count + number, slots)
                    plgpu.barrier_wait(arrived.at[wg * slots + slot])
                    _, offset = rows_and_offset(number, index)
                    source = pl.ds(plan.front + slot * tile + offset, step)
                    p = gpu.load(image.at[source, pl.ds(0, depth)], layout, interpret)
                    later, following = divmod(number + slots, count)

                    @pl.when(turn + later < mine)
                    def _next(later=later, following=following, slot=slot):
                        fetch(following, index + later * workers, slot)

                    if "scale" in smem or "bias" in smem:
                        p = p.astype(jnp.float32)
                        if "scale" in smem:
                            p *= per_channel("scale", number)
                        if "bias" in smem:
                            p += per_channel("bias", number)
                        p = p.astype(jnp.bfloat16)
                    if relu:
                        p = jnp.maximum(p, jnp.zeros((), jnp.bfloat16))
                    keep = gpu.inside(tap, row, column, height, width)
                    p = p if keep is None else gpu.where_bits(keep, p)
                    gpu.multiply_add(acc, p, smem["w"].at[number], left)
                    # With more products under way the compiler runs out of registers.
                    plgpu.wgmma_wait(1)
                return acc[...]

            value = pl.run_scoped(product, plgpu.ACC((step, outputs), jnp.float32))
            if "out_scale" in smem:
                value *= per_output("out_scale")
            if "out_bias" in smem:
                value += per_output("out_bias")
            if out_relu:
                value = jnp.maximum(value, np.float32(0))
            if "residual" in gmem:
                plgpu.barrier_wait(added.at[wg])
                value += gpu.load(out_smem, layout, interpret).astype(jnp.float32)
            out_smem[...] = value.astype(out_type.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, tile)], out_gmem.at[here])

        plgpu.wait_smem_to_gmem(0)

    def shared(name):
        array = operands[name]
        transforms = ()
        if name == "w":
            transforms = gpu.tiled(gpu.swizzle_bytes(depth, outputs))
        return plgpu.SMEM(array.shape, array.dtype, transforms=transforms)

    result = plgpu.SMEM(
        (warpgroups, step, outputs),
        jnp.bfloat16,
        transforms=gpu.tiled(gpu.swizzle_bytes(outputs)),
    )
    scratch = [
        {name: shared(name) for name in resident},
        plgpu.SMEM((warpgroups, plan.pixels, pitch), jnp.bfloat16),
        result,
        plgpu.SMEM((warpgroups, step, depth), jnp.bfloat16) if interpret else None,
        plgpu.Barrier(num_arrivals=len(copies), num_barriers=warpgroups * slots),
        plgpu.Barrier(num_barriers=warpgroups) if "residual" in operands else None,
        plgpu.Barrier(num_arrivals=len(resident)),
    ]

    def shift_pointwise(*refs):
        *inputs, out_gmem = refs
        gmem = dict(zip(operands, inputs, strict=True))
        pl.run_scoped(
            lambda *scratch: body(gmem, out_gmem, *scratch), *scratch, collective_axes="wg"
        )

    return plgpu.kernel(
        shift_pointwise,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=gpu.compiler_params(),
        interpret=gpu.interpret_params(interpret),
    )(*operands.values())
