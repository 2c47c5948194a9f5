"""Shift and 1x1 convolution for Hopper: the shift changes the coordinates of copies.

The channels of one offset are contiguous. Pixels are numbered through all images, so that the
shifted channels of a tile of pixels are a box of the matrix `x[pixels, channels]` at another row,
which the copy engine can load. A warpgroup loads each box into registers, applies the prologue,
masks values that wrapped around an image's edge, and multiplies by the box's rows of the weight;
the sum stays in registers until all boxes are done. At stride 2 the copy engine loads even or odd
rows and columns only.

The weight stays in shared memory; a block computes many tiles, and loads the next boxes meanwhile.
Rows in shared memory are 16 bytes longer than the channels of an offset, so that 8 of them never
conflict in a memory bank; the copy engine fills that part with zeros from beyond the array's edge.

Memory traffic per output pixel at bfloat16: 2*C bytes of `x` (each value used once, no halo), 2*K
written, 2*K more for a residual; and the weight once per multiprocessor, of which there are 132.

Backward, one kernel reads x and dout and writes dx and the sums over pixels. With d[q, c] = dout at
the output pixel that reads pixel q of channel c,

    dp[q, c] = d[q, c] @ w[c]        dw[c] = sum over q of p[q, c] * d[q, c]

A warpgroup takes 64 channels, of a few offsets, and a part of the pixels. The channels are the rows
of its products, so that p is a left factor from registers, each thread has two values of scale and
bias, and their gradients are sums along rows. A product with the identity transposes x on the
tensor cores, without rounding. Each warpgroup writes its sums over pixels, and XLA adds them up.
Stride 2 needs copies: the quarter of x that a channel reads is extracted before the kernel, and the
quarter of dx is surrounded by zeros after it.

Memory traffic backward per output pixel: 2*C bytes of x read, 2*C of dx written, and 2*K of dout
read per 64 channels, by all warpgroups at about the same time; at stride 2 in addition 4*C to
extract x, 2*C to read and 8*C to write dx.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shiftnet.kernels import gpu

# Warpgroups per block and pixels per tile, best first.
_SHAPES = ((4, 128), (4, 64), (3, 64), (2, 64), (1, 64))
_MOST_BOXES = 8  # in shared memory per warpgroup; at least 3
_REGISTERS = {4: 64, 3: 96, 2: 160, 1: 160}
# Backward: channels and pixels of a warpgroup's tile, the largest number of sums over pixels per
# channel, warpgroups per block, and tiles in shared memory per warpgroup.
_ROWS = _TILE = 64
_MOST_SUMS = 128
_WARPGROUPS = (3, 2, 1)
_SLOTS = 2


class _Plan(NamedTuple):
    taps: list[gpu.Tap]
    boxes: list[int]  # first channel of each tap, in units of the depth
    depth: int  # channels of a tap
    line: int  # pixels per row of the view of x that copies use
    rows: int  # rows of a tile
    front: int  # pixels in shared memory before the first box
    pixels: int  # pixels in shared memory
    computed: int  # pixels of a tile, rounded up to a size that the tensor cores support
    slots: int  # boxes in shared memory
    warpgroups: int


def _plan(x, w, *, dh, dw, stride) -> _Plan | str:
    """Returns how these arguments are divided into tiles, or why that is not supported."""
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
    # The copy engine moves multiples of 128 bytes between 128-byte aligned addresses: 8 pixels.
    unit = 8 // math.gcd(line, 8)
    weights = 2 * len(taps) * depth * outputs + 8 * len(taps) * depth
    # Registers per thread for 64 pixels: the sum, and a box before and after the prologue.
    registers = outputs // 2 + depth // 2 + depth // 4
    for warpgroups, most in _SHAPES:
        rows = most // line // unit * unit
        if rows == 0:
            continue
        computed = gpu.round_up(rows * line, 64)
        if registers * computed // 64 > _REGISTERS[warpgroups]:
            continue
        for slots in range(_MOST_BOXES, 2, -1):
            # Includes pixels that are read but masked.
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


class _BackwardPlan(NamedTuple):
    taps: list[gpu.Tap]  # in the order of their channels
    part: int  # contiguous channels in shared memory, all of one tap
    chunks: list[list[gpu.Tap]]  # the tap of each part of a warpgroup's channels
    halo: gpu.Halo
    warpgroups: int


def _backward_plan(x, w, *, dh, dw, stride) -> _BackwardPlan | str:
    """Does the same for the gradients."""
    plan = _plan(x, w, dh=dh, dw=dw, stride=stride)
    if isinstance(plan, str):
        return plan
    channels, outputs = w.shape
    if len(plan.taps) * plan.depth < channels:
        return "some channels move out of the image"
    part = math.gcd(plan.depth, _ROWS)
    each = _ROWS // part
    if each * outputs > _MOST_SUMS:
        return f"{each} offsets to {outputs} outputs are more than {_MOST_SUMS} sums of a channel"
    parts = [tap for tap in plan.taps for _ in range(plan.depth // part)]
    parts += parts[-1:] * (-len(parts) % each)
    chunks = [parts[first : first + each] for first in range(0, len(parts), each)]
    # The gradient of pixel q of x is read at q - tap.
    back = [tap._replace(row=-tap.row, column=-tap.column) for tap in plan.taps]
    view = gpu.Image(x.shape[1] // stride, x.shape[2] // stride, 1, back)
    halo = gpu.halo(view, _TILE)
    assert halo is not None  # a row is one pixel
    elements = _SLOTS * (halo.pixels * (outputs + 8) + _TILE * _ROWS)
    elements += (_ROWS + _TILE) * each * outputs + _TILE * _ROWS
    for warpgroups in _WARPGROUPS:
        if 2 * (warpgroups * elements + _ROWS**2) <= gpu.SHARED_BYTES - gpu.RESERVED_BYTES:
            return _BackwardPlan(plan.taps, part, chunks, halo, warpgroups)
    return (
        f"the gradients of {channels} channels and {outputs} outputs do not fit into "
        f"{gpu.SHARED_BYTES} bytes of shared memory"
    )


def unsupported(
    x: jax.Array,
    w: jax.Array,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    backward: bool = False,
) -> str | None:
    """Returns in one clause why `forward` or `backward` does not support the arguments, or None.

    It depends on shapes, dtypes and offsets only.
    """
    del relu
    plan = (_backward_plan if backward else _plan)(x, w, dh=dh, dw=dw, stride=stride)
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
    """Computes `shift(relu(x * scale + bias))[:, ::stride, ::stride] @ w`, then the epilogue.

    Args:
      x: `[N, H, W, C]` bfloat16. The channels of an offset are contiguous, equally many for each.
      w: `[C, K]`, rounded to bfloat16.
      scale, bias: `[C]` or None, the prologue, in float32.
      relu: whether the prologue ends with a ReLU.
      dh, dw: int32 `[C]`, the offset in pixels that each channel reads from.
      stride: 1 or 2.
      out_scale, out_bias: `[K]` or None, in float32.
      out_relu: whether a ReLU follows.
      residual: `[N, H/stride, W/stride, K]` or None, rounded to bfloat16 and added last.
      interpret: whether to interpret the kernel on the CPU.

    Returns:
      `[N, H/stride, W/stride, K]` bfloat16. Sums are float32; the results of the prologue and of
      the operation are each rounded to bfloat16 once.

    Raises:
      ValueError: if `unsupported` returns a reason.
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


def backward(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    dout: jax.Array,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Returns the gradients `(dx, dw, dscale, dbias)` of `forward` without an epilogue.

    `dout [N, H/stride, W/stride, K]` is rounded to bfloat16. Each gradient has the shape and dtype
    of its argument, or is None if that is. Sums are float32; the prologue's result is rounded to
    bfloat16.

    Raises:
      ValueError: if `unsupported(..., backward=True)` returns a reason.
    """
    plan = _backward_plan(x, w, dh=dh, dw=dw, stride=stride)
    if isinstance(plan, str):
        raise ValueError(f"shift_pointwise has no GPU kernel for its gradients: {plan}")
    channels, outputs = w.shape
    size = dout.shape[1], dout.shape[2]
    chunks, each = len(plan.chunks), _ROWS // plan.part
    spans = [slice(tap.channels[0], tap.channels[-1] + 1) for tap in plan.taps]
    own = x
    if stride > 1:
        own = jnp.concatenate(
            [
                x[:, tap.row_phase :: stride, tap.column_phase :: stride, span]
                for tap, span in zip(plan.taps, spans, strict=True)
            ],
            axis=-1,
        )

    def rows(values):
        """Pads and reshapes `[C, ...]` to `[chunks, _ROWS, ...]`."""
        values = jnp.pad(values, [(0, chunks * _ROWS - channels)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(chunks, _ROWS, *values.shape[1:])

    # A row has the weights of its tap only.
    of_tap = np.repeat(np.eye(each, dtype=bool), plan.part, axis=0)[..., None]
    weights = jnp.where(of_tap, rows(w.astype(x.dtype))[:, :, None], jnp.zeros((), x.dtype))
    vectors = [jnp.ones(channels) if scale is None else scale]
    vectors += [jnp.zeros(channels) if bias is None else bias]
    table = [[(tap.row, tap.column) for tap in chunk] for chunk in plan.chunks]
    operands = {
        "w": weights.reshape(chunks, _ROWS, each * outputs),
        "vectors": jnp.stack([rows(vector.astype(jnp.float32)) for vector in vectors], 1),
        "identity": jnp.eye(_ROWS, dtype=x.dtype),
        "table": jnp.array(table, jnp.int32).reshape(chunks, 2 * each),
        "x": own.reshape(-1, channels),
        "dout": dout.astype(x.dtype).reshape(-1, outputs),
    }
    dx, dweight, dscale, dbias = _gradients(plan, size, relu, interpret, operands)
    dx = dx.reshape(own.shape)
    if stride > 1:
        dx = jnp.concatenate(
            [
                _spread(dx[..., span], stride, tap.phase)
                for tap, span in zip(plan.taps, spans, strict=True)
            ],
            axis=-1,
        )
    dweight = dweight.reshape(chunks, _ROWS, each, outputs)
    dweight = jnp.where(of_tap, dweight, np.float32(0)).sum(2)

    def of_channels(sums, value):
        if value is None:
            return None
        sums = sums.reshape(chunks * _ROWS, *value.shape[1:])
        return sums[:channels].astype(value.dtype)

    return dx, *map(of_channels, (dweight, dscale, dbias), (w, scale, bias))


def _spread(x: jax.Array, stride: int, phase: tuple[int, int]) -> jax.Array:
    """Returns an image whose pixels of one phase are `x`, `[N, H, W, C]`, and 0 elsewhere."""
    around = [(first, stride - 1 - first, stride - 1) for first in phase]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])


def _gradients(
    plan: _BackwardPlan,
    size: tuple[int, int],
    relu: bool,
    interpret: bool,
    operands: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns `dx [pixels, C]` at stride 1, and the gradients of `w`, `scale` and `bias` by chunk.

    `w [chunks, _ROWS, taps * K]` is 0 where a row has another tap; the caller masks its gradient.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    height, width = size
    total, outputs = operands["dout"].shape
    chunks, halo, warpgroups = len(plan.chunks), plan.halo, plan.warpgroups
    each = _ROWS // plan.part
    tiles = -(-total // _TILE)
    # Workers with consecutive numbers have the same pixels.
    shares = min(tiles, max(1, gpu.MULTIPROCESSORS * warpgroups // chunks))
    blocks = -(-shares * chunks // warpgroups)
    workers = blocks * warpgroups
    layout = plgpu.Layout.WGMMA

    def body(gmem, out_gmem, smem, identity, image, x, shifted, dx, left, arrived, ready):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        worker = block * warpgroups + wg
        chunk, share = lax.rem(worker, np.int32(chunks)), lax.div(worker, np.int32(chunks))
        image, x, shifted, dx = (ref.at[wg] for ref in (image, x, shifted, dx))
        w, vectors = (smem[name].at[wg] for name in ("w", "vectors"))
        left = None if left is None else left.at[wg]
        for name, target in (("w", w), ("vectors", vectors)):
            plgpu.copy_gmem_to_smem(gmem[name].at[chunk], target, ready)

        @pl.when(wg == 0)
        def _resident():
            plgpu.copy_gmem_to_smem(gmem["identity"], identity, ready)

        def part_of(ref, index):
            """Returns a reference to a tile of the warpgroup's channels."""
            return ref.at[pl.ds(index * _TILE, _TILE), pl.ds(chunk * _ROWS, _ROWS)]

        def fetch(index, slot):
            barrier = arrived.at[wg * _SLOTS + slot]
            halo.fetch(
                gmem["dout"], image.at[slot], barrier, index, block=block, interpret=interpret
            )
            plgpu.copy_gmem_to_smem(part_of(gmem["x"], index), x.at[slot], barrier)

        def product(a, b):
            def multiply(acc):
                plgpu.wgmma(acc, a, b)
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((_ROWS, _TILE), jnp.float32))

        def along(vector):
            return lax.broadcast_in_dim(vector, (_ROWS, _TILE), (0,))

        def add(dw, sums, index, slot):
            """Writes the tile's dx to shared memory, and adds to the other gradients."""
            pixels = gpu.count_up(index * _TILE, _TILE, layout.reduce(1), interpret)
            row, column = gpu.coordinates(pixels, height, width)
            for number in range(each):
                # Read again for every tile: otherwise they would fill the registers.
                down, right = (gmem["table"][chunk, 2 * number + i] for i in range(2))
                source = pl.ds(halo.base(index) - down * width - right, _TILE)
                d = gpu.load(image.at[slot, source, pl.ds(0, outputs)], layout, interpret)
                above, left_of = row - down, column - right
                keep = (above >= 0) & (above < height) & (left_of >= 0) & (left_of < width)
                shifted[:, pl.ds(number * outputs, outputs)] = gpu.where_bits(keep, d)
            plgpu.commit_smem()
            xt = product(identity, x.at[slot].T)
            p = (xt * along(scale) + along(bias)).astype(jnp.bfloat16)
            dp = product(w, shifted.T)
            if relu:
                p = jnp.maximum(p, jnp.zeros((), p.dtype))
                dp = jnp.where(p > jnp.zeros((), p.dtype), dp, np.float32(0))
            gpu.multiply_add(dw, p, shifted, left)
            sums = sums[0] + (dp * xt).sum(1), sums[1] + dp.sum(1)
            turned = (dp * along(scale)).astype(jnp.bfloat16)
            dx.T[...] = plgpu.layout_cast(turned, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.wgmma_wait(0)  # the next pixels overwrite these
            return sums

        mine = jnp.where(share < shares, (tiles - share + shares - 1) // shares, 0)
        for slot in range(_SLOTS):

            @pl.when(slot < mine)
            def _first(slot=slot):
                fetch(share + slot * shares, slot)

        plgpu.barrier_wait(ready)
        scale, bias = (gpu.load(vectors.at[i], layout.reduce(1), interpret) for i in range(2))

        def accumulate(dw):
            def tile(turn, sums):
                index = share + turn * shares
                slot = lax.rem(turn, _SLOTS)
                plgpu.barrier_wait(arrived.at[wg * _SLOTS + slot])
                # The previous tile's result must have left the buffer.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                sums = add(dw, sums, index, slot)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dx, part_of(out_gmem[0], index))

                @pl.when(turn + _SLOTS < mine)
                def _next():
                    fetch(index + _SLOTS * shares, slot)

                return sums

            sums = lax.fori_loop(0, mine, tile, (scale * 0, scale * 0))
            return dw[...], *sums

        sums = pl.run_scoped(accumulate, plgpu.ACC((_ROWS, each * outputs), jnp.float32))
        for target, value in zip(out_gmem[1:], sums, strict=True):
            target[worker] = value
        plgpu.wait_smem_to_gmem(0)

    def by_part(*shape):
        return gpu.matrices(*shape, part=plan.part)

    def by_output(*shape):
        return gpu.matrices(*shape, part=outputs)

    scratch = [
        {
            "w": by_output(warpgroups, _ROWS, each * outputs),
            "vectors": plgpu.SMEM((warpgroups, 2, _ROWS), jnp.float32),
        },
        by_part(_ROWS, _ROWS),
        plgpu.SMEM((warpgroups, _SLOTS, halo.pixels, outputs + 8), jnp.bfloat16),
        by_part(warpgroups, _SLOTS, _TILE, _ROWS),
        by_output(warpgroups, _TILE, each * outputs),
        by_part(warpgroups, _TILE, _ROWS),
        plgpu.SMEM((warpgroups, _ROWS, _TILE), jnp.bfloat16) if interpret else None,
        plgpu.Barrier(
            num_arrivals=len(halo.copies(interpret)) + 1, num_barriers=warpgroups * _SLOTS
        ),
        plgpu.Barrier(num_arrivals=2 * warpgroups + 1),
    ]

    def shift_pointwise_gradients(*refs):
        gmem = dict(zip(operands, refs, strict=False))
        out_gmem = refs[len(operands) :]
        pl.run_scoped(
            lambda *scratch: body(gmem, out_gmem, *scratch), *scratch, collective_axes="wg"
        )

    shapes = ((_ROWS, each * outputs), (_ROWS,), (_ROWS,))
    x = operands["x"]
    dx, *sums = gpu.launch(
        shift_pointwise_gradients,
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct((workers, *shape), jnp.float32) for shape in shapes),
        ),
        blocks=blocks,
        warpgroups=warpgroups,
        interpret=interpret,
    )(*operands.values())
    dw, dscale, dbias = (gpu.total(value, shares, chunks) for value in sums)
    return dx, dw, dscale, dbias


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
    # The interpreter cannot reshape, so its copies of a strided image are single rows.
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
            """Returns the first row of x loaded for a tap, and where the tile's pixels start.

            The row is never negative: pixels before the first image are not loaded, and are masked.
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
            # The previous tile's result must have left the buffer that this one is written to.
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
                    # With more products in flight the compiler runs out of registers.
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

    return gpu.launch(
        shift_pointwise,
        out_type,
        blocks=blocks,
        warpgroups=warpgroups,
        interpret=interpret,
    )(*operands.values())
