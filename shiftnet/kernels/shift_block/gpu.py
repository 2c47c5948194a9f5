"""The inference block for Hopper, in one kernel: the expanded image lives in registers only.

For one offset the expanded channels at an output pixel need only the input at one other pixel, so

    out[p] = sum over offsets g of  relu(x[p + g] @ w1[:, g] + b1[g]) @ w2[g, :]

without the terms whose pixel p + g lies outside. A warpgroup takes a tile of output pixels. Pixels
are numbered through all images, which makes every offset a whole number of rows of the matrix
`x[pixels, C]`: the tile comes into shared memory once, with as many pixels before and after as the
offsets reach (none where a tile is whole images), and each offset reads its rows of it into
registers, multiplies by its slice of `w1`, adds the bias, takes the ReLU, drops what wrapped around
an image's edge, rounds to bfloat16 and multiplies by its slice of `w2`, all without leaving the
registers. Stride 2 splits the input into the 4 images of even and odd rows and columns as it loads
(the copy engine does it), in which offsets are whole pixels again.

Both weights stay in shared memory; a block works through many tiles and has the next one under way
meanwhile. Rows are 16 bytes longer there than C channels, so that 8 of them never meet in a memory
bank; the copy engine fills that part with zeros from beyond the array's edge.

Bytes moved per output pixel at bfloat16: 2*C*stride**2 of `x` (plus the reach of the offsets on
both sides of a tile, which other blocks read at about the same time and the second-level cache
holds), 2*K written, 2*K more for a residual; and once for each of the 132 multiprocessors the
weights.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shiftnet.kernels import gpu

# Warpgroups of a block and pixels of a tile, best first: more warpgroups hide more latency, larger
# tiles read fewer pixels twice.
_SHAPES = ((4, 256), (4, 128), (3, 128), (4, 64), (3, 64), (2, 64), (1, 64))
_SLOTS = 2
# Registers of a thread that the factors and sums may take, by the number of warpgroups: more than
# these and the compiler spills (seen in its reports for an H200).
_REGISTERS = {4: 64, 3: 96, 2: 160, 1: 160}


class _Plan(NamedTuple):
    taps: list[gpu.Tap]
    phases: list[tuple[int, int]]
    depth: int  # channels of each tap, padded
    line: int  # pixels that one row of the copies' view of x holds
    rows: int  # rows of a tile
    before: int  # rows loaded before a tile
    front: int  # pixels in shared memory before the first row that is loaded
    loaded: int  # rows loaded, those before and after a tile included
    pixels: int  # pixels in shared memory
    computed: int  # pixels of a tile, rounded up to what the tensor cores take
    step: int  # pixels whose products are in registers at a time
    warpgroups: int

    def offset(self, tap: gpu.Tap, width: int) -> int:
        return tap.row * width + tap.column


def _plan(x, w1, w2, *, dh, dw, stride) -> _Plan | str:
    """How to cut these arguments into tiles, or why that cannot be done."""
    view = gpu.image(x, dh, dw, stride)
    if isinstance(view, str):
        return view
    height, width, line, taps = view
    channels, outputs = x.shape[-1], w2.shape[1]
    if channels % 16 or not 0 < channels <= 64:
        return f"x has {channels} channels, not 16, 32, 48 or 64"
    if outputs % 16 or not 0 < outputs <= 64:
        return f"w2 has {outputs} outputs, not 16, 32, 48 or 64"
    phases = sorted({tap.phase for tap in taps})
    depth = gpu.round_up(max(tap.channels.size for tap in taps), 16)
    if depth > 128:
        return f"{depth} expanded channels move by the same offset, more than 128"
    reach = max(abs(tap.row * width + tap.column) for tap in taps)
    front = gpu.round_up(reach, 8)
    if stride == 1:
        before = after = reach
    else:
        before = max(0, *(-tap.row for tap in taps))
        after = max(0, *(tap.row for tap in taps))
    # The copy engine moves multiples of 128 bytes to multiples of 128 bytes: 8 pixels.
    unit = 8 // math.gcd(line, 8)
    weights = 2 * len(taps) * depth * (channels + outputs) + 4 * len(taps) * depth
    # Registers of a thread for 64 pixels: two sums, and both factors from registers.
    registers = (depth + outputs) // 2 + (channels + depth) // 4
    for warpgroups, most in _SHAPES:
        rows = most // line // unit * unit
        if rows == 0 or registers > _REGISTERS[warpgroups]:
            continue
        computed = gpu.round_up(rows * line, 64)
        if rows * line % (height * width) == 0:
            first = last = 0  # whole images
        else:
            first, last = before, after
        loaded = gpu.round_up(first + rows + last, unit)
        # Every pixel that is read has its place, also those that masks drop.
        pixels = max(loaded * line, first * line + computed + reach)
        pixels = front + gpu.round_up(pixels, 8)
        image = _SLOTS * len(phases) * pixels * (channels + 8) * 2
        if weights + warpgroups * (image + computed * outputs * 2) > (
            gpu.SHARED_BYTES - gpu.RESERVED_BYTES
        ):
            continue
        step = 128 if computed % 128 == 0 and 2 * registers <= _REGISTERS[warpgroups] else 64
        return _Plan(
            taps,
            phases,
            depth,
            line,
            rows,
            first,
            front,
            loaded,
            pixels,
            computed,
            step,
            warpgroups,
        )
    return (
        f"{channels} channels, expanded to {len(taps)} offsets of {depth}, to {outputs} outputs do "
        f"not fit into {gpu.SHARED_BYTES} bytes of shared memory"
    )


def unsupported(
    x: jax.Array, w1: jax.Array, w2: jax.Array, *, dh: np.ndarray, dw: np.ndarray, stride: int
) -> str | None:
    """Why `forward` cannot take these arguments, in one clause; None when it can.

    Looks at shapes and dtypes only.
    """
    plan = _plan(x, w1, w2, dh=dh, dw=dw, stride=stride)
    return plan if isinstance(plan, str) else None


def forward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`shift(relu(x @ w1 + b1))[:, ::stride, ::stride] @ w2`, then the epilogue.

    Args:
      x: `[N, H, W, C]` bfloat16.
      w1: `[C, E]`, rounded to bfloat16.
      b1: `[E]`, added in float32.
      w2: `[E, K]`, rounded to bfloat16.
      dh, dw: int32 `[E]`, the offset in pixels that each expanded channel reads from.
      stride: 1 or 2.
      out_bias: `[K]`, added in float32.
      out_relu: whether a ReLU follows.
      residual: `[N, H/stride, W/stride, K]`, rounded to bfloat16 and added last.
      interpret: simulate the kernel on the CPU.

    Returns:
      `[N, H/stride, W/stride, K]` bfloat16. Sums are float32; the expanded image is rounded to
      bfloat16 once, the result once.

    Raises:
      ValueError: where `unsupported` gives a reason.
    """
    plan = _plan(x, w1, w2, dh=dh, dw=dw, stride=stride)
    if isinstance(plan, str):
        raise ValueError(f"shift_block has no GPU kernel for this: {plan}")
    n, height, width, channels = x.shape
    height, width = height // stride, width // stride
    outputs = w2.shape[1]
    if stride == 1:
        view = x.reshape(n * height * width, channels)
    else:
        view = x.reshape(n * height, stride, width, stride, channels)
    operands = [view, *_weights(plan, w1, b1, w2, x.dtype)]
    if out_bias is not None:
        # Copies move multiples of 128 bytes.
        operands.append(jnp.zeros(64, jnp.float32).at[:outputs].set(out_bias.astype(jnp.float32)))
    if residual is not None:
        operands.append(residual.astype(x.dtype).reshape(n * height * width, outputs))
    out = _kernel(
        plan,
        (height, width),
        jax.ShapeDtypeStruct((n * height * width, outputs), x.dtype),
        out_bias is not None,
        out_relu,
        residual is not None,
        interpret,
        operands,
    )
    return out.reshape(n, height, width, outputs)


def _weights(plan: _Plan, w1: Any, b1: Any, w2: Any, dtype: Any) -> list[jax.Array]:
    """`w1`, `b1` and `w2` as one matrix for each tap, with zero channels up to the depth."""
    index = np.zeros((len(plan.taps), plan.depth), np.int32)
    real = np.zeros(index.shape, bool)
    for row, tap in enumerate(plan.taps):
        index[row, : tap.channels.size] = tap.channels
        real[row, : tap.channels.size] = True
    w1 = jnp.where(real[None], w1.astype(dtype)[:, index], jnp.zeros((), dtype))
    b1 = jnp.where(real, b1.astype(jnp.float32)[index], np.float32(0))
    w2 = jnp.where(real[..., None], w2.astype(dtype)[index], jnp.zeros((), dtype))
    # A last row of zeros at most, so that the biases are a multiple of 128 bytes.
    b1 = jnp.pad(b1, ((0, -len(plan.taps) % 2), (0, 0)))
    return [w1.transpose(1, 0, 2), b1, w2]


def _kernel(plan, size, out_type, has_bias, out_relu, has_residual, interpret, operands):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    height, width = size
    total, outputs = out_type.shape
    channels = operands[0].shape[-1]
    pitch = channels + 8
    depth, step, warpgroups = plan.depth, plan.step, plan.warpgroups
    tile = plan.rows * plan.line
    tiles = -(-total // tile)
    blocks = min(gpu.MULTIPROCESSORS, -(-tiles // warpgroups))
    workers = blocks * warpgroups
    layout = plgpu.Layout.WGMMA
    # One row at a time where a copy cannot take several: the interpreter does not reshape.
    box = 1 if interpret and plan.line > 1 else gpu.BOX
    copies = [(row, min(box, plan.loaded - row)) for row in range(0, plan.loaded, box)]

    def body(x_gmem, w1_gmem, b1_gmem, w2_gmem, *rest, scratch: Any) -> None:
        # What is there of the epilogue's operands; never None where it is used.
        operands: list[Any] = list(rest)
        bias_gmem: Any = operands.pop(0) if has_bias else None
        residual_gmem: Any = operands.pop(0) if has_residual else None
        (out_gmem,) = operands
        image, w1, b1, w2, bias, out_smem, left, arrived, added, ready = scratch
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        worker = block * warpgroups + wg
        image, out_smem = image.at[wg], out_smem.at[wg]
        left = None if left is None else left.at[wg]

        @pl.when(wg == 0)
        def _weights():
            plgpu.copy_gmem_to_smem(w1_gmem, w1, ready)
            plgpu.copy_gmem_to_smem(b1_gmem, b1, ready)
            plgpu.copy_gmem_to_smem(w2_gmem, w2, ready)
            if has_bias:
                plgpu.copy_gmem_to_smem(bias_gmem, bias, ready)

        def first_row(index):
            # Never negative: rows before the first tile are not loaded, and masks drop them.
            return jnp.maximum(index * plan.rows - plan.before, 0)

        def fetch(index, slot):
            for phase, (row_phase, column_phase) in enumerate(plan.phases):
                for row, count in copies:
                    source = pl.ds(first_row(index) + row, count)
                    target = pl.ds(plan.front + row * plan.line, count * plan.line)
                    target = image.at[slot, phase, target]
                    if plan.line > 1:
                        source = (source, row_phase, pl.ds(0, plan.line), column_phase)
                        if count > 1:
                            target = target.reshape(count, plan.line, pitch)
                        else:
                            source = (first_row(index) + row, *source[1:])
                    else:
                        source = (source,)
                    plgpu.copy_gmem_to_smem(
                        x_gmem.at[(*source, gpu.padded(block, pitch))],
                        target,
                        arrived.at[wg * _SLOTS + slot],
                    )

        def compute(first, slot, base):
            """The output pixels from the `first` on, whose inputs start at `base` in memory."""
            pixels = gpu.count_up(first, step, layout.reduce(1), interpret)
            row, column = gpu.coordinates(pixels, height, width)

            def expand(tap, number):
                source = pl.ds(base + plan.offset(tap, width), step)
                source = image.at[slot, plan.phases.index(tap.phase), source, pl.ds(0, channels)]
                a = gpu.load(source, layout, interpret)

                def product(acc):
                    gpu.multiply_add(acc, a, w1.at[number], left)
                    return acc[...]

                y = pl.run_scoped(product, plgpu.ACC((step, depth), jnp.float32))
                shift = gpu.load(b1.at[number], layout.reduce(0), interpret)
                y += lax.broadcast_in_dim(shift, y.shape, (1,))
                # Rounding first halves the work of the ReLU, and changes nothing.
                y = jnp.maximum(y.astype(jnp.bfloat16), jnp.zeros((), jnp.bfloat16))
                keep = gpu.inside(tap, row, column, height, width)
                return y if keep is None else gpu.where_bits(keep, y)

            def project(acc):
                for number, tap in enumerate(plan.taps):
                    gpu.multiply_add(acc, expand(tap, number), w2.at[number], left)
                return acc[...]

            value = pl.run_scoped(project, plgpu.ACC((step, outputs), jnp.float32))
            if has_bias:
                shift = gpu.load(bias.at[pl.ds(0, outputs)], layout.reduce(0), interpret)
                value += lax.broadcast_in_dim(shift, value.shape, (1,))
            return jnp.maximum(value, np.float32(0)) if out_relu else value

        mine = (tiles - worker + workers - 1) // workers
        for slot in range(_SLOTS):

            @pl.when(slot < mine)
            def _first(slot=slot):
                fetch(worker + slot * workers, slot)

        plgpu.barrier_wait(ready)

        @pl.loop(0, mine)
        def _tile(turn):
            index = worker + turn * workers
            slot = lax.rem(turn, _SLOTS)
            here = pl.ds(index * tile, tile)
            # The last tile's result has left the buffer that this one's goes to.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if has_residual:
                plgpu.copy_gmem_to_smem(
                    residual_gmem.at[here], out_smem.at[pl.ds(0, tile)], added.at[wg]
                )
            plgpu.barrier_wait(arrived.at[wg * _SLOTS + slot])
            base = plan.front + (index * plan.rows - first_row(index)) * plan.line
            for start in range(0, plan.computed, step):
                value = compute(index * tile + start, slot, base + start)
                if has_residual and start == 0:
                    plgpu.barrier_wait(added.at[wg])
                here_smem = out_smem.at[pl.ds(start, step)]
                if has_residual:
                    value += gpu.load(here_smem, layout, interpret).astype(jnp.float32)
                here_smem[...] = value.astype(out_type.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, tile)], out_gmem.at[here])

            @pl.when(turn + _SLOTS < mine)
            def _next():
                fetch(index + _SLOTS * workers, slot)

        plgpu.wait_smem_to_gmem(0)

    def matrices(*shape):
        swizzle = gpu.swizzle_bytes(*shape[-2:])
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=gpu.tiled(swizzle))

    count = len(plan.taps)
    b1_shape = operands[2].shape
    scratch = [
        plgpu.SMEM((warpgroups, _SLOTS, len(plan.phases), plan.pixels, pitch), jnp.bfloat16),
        matrices(count, channels, depth),
        plgpu.SMEM(b1_shape, jnp.float32),
        matrices(count, depth, outputs),
        plgpu.SMEM((64,), jnp.float32) if has_bias else None,
        plgpu.SMEM(
            (warpgroups, plan.computed, outputs),
            jnp.bfloat16,
            transforms=gpu.tiled(gpu.swizzle_bytes(outputs)),
        ),
        plgpu.SMEM((warpgroups, step, max(channels, depth)), jnp.bfloat16) if interpret else None,
        plgpu.Barrier(
            num_arrivals=len(plan.phases) * len(copies), num_barriers=warpgroups * _SLOTS
        ),
        plgpu.Barrier(num_barriers=warpgroups) if has_residual else None,
        plgpu.Barrier(num_arrivals=3 + has_bias),
    ]

    def shift_block(*refs):
        pl.run_scoped(lambda *scratch: body(*refs, scratch=scratch), *scratch, collective_axes="wg")

    return plgpu.kernel(
        shift_block,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=gpu.compiler_params(),
        interpret=gpu.interpret_params(interpret),
    )(*operands)
