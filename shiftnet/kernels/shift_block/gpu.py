"""The shift block for Hopper: the expanded image exists in registers only, forward and backward.

Forward, the expanded channels of one offset at an output pixel depend on one input pixel, so

    out[p] = sum over offsets g of  relu(x[p + g] @ w1[:, g] + b1[g]) @ w2[g, :]

without the terms whose pixel p + g lies outside the image. A warpgroup computes a tile of output
pixels. Pixels are numbered through all images, so that every offset is a whole number of rows of
the matrix `x[pixels, C]`. The tile is loaded into shared memory once, with the pixels before and
after it that offsets reach (none if a tile consists of whole images). For each offset its rows are
loaded into registers, multiplied by a slice of `w1`, the bias and the ReLU are applied, values that
wrapped around an image's edge are masked, and the result is rounded to bfloat16 and multiplied by a
slice of `w2`, all in registers. With stride 2 the copy engine splits the input into the 4 images of
even and odd rows and columns, in which offsets are whole pixels again.

Backward, with d[q, g] the gradient of the output pixel q - g, which reads q by offset g,

    dx[q] = sum over offsets g of  ((d[q, g] @ w2[g, :].T) * (y[q, g] > 0)) @ w1[:, g].T

where y[q, g] is relu(x[q] @ w1[:, g] + b1[g]), recomputed. This is the same kernel with one more
product, and the tile with its surrounding pixels is one of the gradient. At stride 2 there is one
call for each of the 4 images of x. The gradients of the weights are sums over pixels of products
with y and with the factor of `w1[:, g].T`. For these a warpgroup takes 64 expanded channels and a
part of the pixels; the channels are the rows of its products, so that left factors come from
registers again. Each warpgroup writes its sums, and XLA adds them up.

Both weights stay in shared memory; a block computes many tiles, and loads the next one meanwhile.
Rows in shared memory are 16 bytes longer than C channels, so that 8 of them never conflict in a
memory bank; the copy engine fills that part with zeros from beyond the array's edge.

Memory traffic per output pixel at bfloat16: 2*C*stride**2 bytes of `x` (plus the pixels around
tiles, which other blocks read at about the same time, so that they are in the L2 cache), 2*K
written, 2*K more for a residual; and the weights once per multiprocessor, of which there are 132.
Backward: 2*C*stride**2 of `x` read and as much of `dx` written, 2*K*stride**2 of `dout` read; at
stride 2 both of the first are read and written once more, to split and to join them. The sums over
pixels read x and dout once per 64 expanded channels, or per fewer channels if these have more
offsets than there are registers for; all warpgroups read the same values at about the same time.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shiftnet.kernels import gpu

# Warpgroups per block and pixels per tile, best first: more warpgroups hide more latency, larger
# tiles read fewer pixels twice.
_SHAPES = ((4, 256), (4, 128), (3, 128), (4, 64), (3, 64), (2, 64), (1, 64))
_SLOTS = 2
# Registers per thread for factors and sums, by the number of warpgroups: with more the compiler
# spills (seen in its reports for an H200).
_REGISTERS = {4: 72, 3: 96, 2: 160, 1: 160}
_MOST_DEPTH = 128  # channels of one offset multiplied at a time
# For the gradients of the weights: expanded channels per warpgroup, pixels whose products are in
# registers at a time, and the largest number of sums over pixels per expanded channel.
_ROWS = _STEP = 64
_MOST_SUMS = 128
_SUMS_SHAPES = ((3, 128), (3, 64), (2, 64), (1, 64))


class _Plan(NamedTuple):
    taps: list[gpu.Tap]
    phases: list[tuple[int, int]]
    depth: int  # channels of each tap, padded
    halo: gpu.Halo
    step: int  # pixels whose products are in registers at a time
    warpgroups: int


def _plan(x, w1, w2, *, dh, dw, stride) -> _Plan | str:
    """Returns how these arguments are divided into tiles, or why that is not supported."""
    view = gpu.image(x, dh, dw, stride)
    if isinstance(view, str):
        return view
    channels, outputs = x.shape[-1], w2.shape[1]
    if channels % 16 or not 0 < channels <= 64:
        return f"x has {channels} channels, not 16, 32, 48 or 64"
    if outputs % 16 or not 0 < outputs <= 64:
        return f"w2 has {outputs} outputs, not 16, 32, 48 or 64"
    return _cut(view, channels, outputs, backward=False)


def _cut(view: gpu.Image, channels: int, outputs: int, backward: bool) -> _Plan | str:
    """Divides an image into tiles, given its channels and those of the result."""
    taps = _split(view.taps)
    phases = sorted({tap.phase for tap in taps})
    depth = gpu.round_up(max(tap.channels.size for tap in taps), 16)
    weights = 2 * len(taps) * depth * (channels + outputs) + 4 * len(taps) * depth
    # Registers per thread for 64 pixels: two sums, and both factors.
    registers = (depth + outputs) // 2 + (channels + depth) // 4
    if backward:
        registers += (depth + outputs) // 4  # the expanded channels, and the pixels of x
    for warpgroups, most in _SHAPES:
        halo = gpu.halo(view, most)
        if halo is None or registers > _REGISTERS[warpgroups]:
            continue
        image = _SLOTS * len(phases) * halo.pixels * (channels + 8) * 2
        if weights + warpgroups * (image + halo.computed * outputs * 2) > (
            gpu.SHARED_BYTES - gpu.RESERVED_BYTES
        ):
            continue
        double = halo.computed % 128 == 0 and 2 * registers <= _REGISTERS[warpgroups]
        return _Plan(taps, phases, depth, halo, 128 if double else 64, warpgroups)
    return (
        f"{channels} channels, expanded to {len(taps)} offsets of {depth}, to {outputs} outputs do "
        f"not fit into {gpu.SHARED_BYTES} bytes of shared memory"
    )


def _split(taps: list[gpu.Tap]) -> list[gpu.Tap]:
    """Splits taps that have more channels than a warpgroup multiplies at a time."""
    return [
        tap._replace(channels=part)
        for tap in taps
        for part in np.array_split(tap.channels, -(-tap.channels.size // _MOST_DEPTH))
    ]


class _SumsPlan(NamedTuple):
    """Division of the sums over pixels; a warpgroup computes those of one chunk."""

    chunks: list[list[gpu.Tap]]
    each: int  # largest number of taps in a chunk
    halo: gpu.Halo
    warpgroups: int


class _Backward(NamedTuple):
    images: dict[tuple[int, int], _Plan]  # by phase of x
    sums: _SumsPlan


def _backward_plan(x, w1, w2, *, dh, dw, stride) -> _Backward | str:
    """Does the same for the gradients."""
    plan = _plan(x, w1, w2, dh=dh, dw=dw, stride=stride)
    if isinstance(plan, str):
        return plan
    channels, outputs = x.shape[-1], w2.shape[1]
    height, width = x.shape[1] // stride, x.shape[2] // stride

    def from_dout(taps):
        """Returns how the gradient of the phase of x that these taps read is read from dout."""
        back = [gpu.Tap(0, 0, -tap.row, -tap.column, tap.channels) for tap in taps]
        return gpu.Image(height, width, 1, back)

    images = {}
    for phase in plan.phases:
        view = from_dout([tap for tap in plan.taps if tap.phase == phase])
        cut = _cut(view, outputs, channels, backward=True)
        if isinstance(cut, str):
            return cut
        images[phase] = cut
    each = max(1, (_MOST_SUMS - channels) // outputs)
    chunks: list[list[gpu.Tap]] = []
    for phase in plan.phases:
        pieces = [
            tap._replace(channels=part)
            for tap in plan.taps
            if tap.phase == phase
            for part in np.array_split(tap.channels, -(-tap.channels.size // _ROWS))
        ]
        # The fewest chunks, with about as many taps in each.
        for count in range(1, len(pieces) + 1):
            ends = [len(pieces) * i // count for i in range(count + 1)]
            parts = [pieces[a:b] for a, b in itertools.pairwise(ends)]
            if all(
                len(part) <= each and sum(tap.channels.size for tap in part) <= _ROWS
                for part in parts
            ):
                break
        chunks += parts
    each = max(map(len, chunks))
    weights = 2 * _ROWS * (channels + each * outputs)
    for warpgroups, most in _SUMS_SHAPES:
        halo = gpu.halo(from_dout(plan.taps), most)
        assert halo is not None  # a row is one pixel
        images_bytes = _SLOTS * 2 * (halo.pixels * (outputs + 8) + halo.computed * channels)
        shifted = 2 * _STEP * each * outputs
        if warpgroups * (weights + images_bytes + shifted) <= gpu.SHARED_BYTES - gpu.RESERVED_BYTES:
            return _Backward(images, _SumsPlan(chunks, each, halo, warpgroups))
    return (
        f"the sums over pixels of {channels} and {outputs} channels do not fit into "
        f"{gpu.SHARED_BYTES} bytes of shared memory"
    )


def unsupported(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    backward: bool = False,
) -> str | None:
    """Returns in one clause why `forward` or `backward` does not support the arguments, or None.

    It depends on shapes, dtypes and offsets only.
    """
    plan = (_backward_plan if backward else _plan)(x, w1, w2, dh=dh, dw=dw, stride=stride)
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
    """Computes `shift(relu(x @ w1 + b1))[:, ::stride, ::stride] @ w2`, then the epilogue.

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
      interpret: whether to interpret the kernel on the CPU.

    Returns:
      `[N, H/stride, W/stride, K]` bfloat16. Sums are float32; the expanded image and the result are
      each rounded to bfloat16 once.

    Raises:
      ValueError: if `unsupported` returns a reason.
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
    weights = _weights([[tap] for tap in plan.taps], plan.depth, w1, b1, w2, x.dtype)
    epilogue = {}
    if out_bias is not None:
        # Copies move multiples of 128 bytes.
        epilogue["bias"] = jnp.zeros(64, jnp.float32).at[:outputs].set(out_bias.astype(jnp.float32))
    if residual is not None:
        epilogue["aligned"] = residual.astype(x.dtype).reshape(n * height * width, outputs)
    out = _kernel(
        plan,
        (height, width),
        jax.ShapeDtypeStruct((n * height * width, outputs), x.dtype),
        {"image": view, **weights, **epilogue},
        out_relu=out_relu,
        interpret=interpret,
    )
    return out.reshape(n, height, width, outputs)


def backward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    dout: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients `(dx, dw1, db1, dw2)` of `forward` without an epilogue.

    `dout [N, H/stride, W/stride, K]` is rounded to bfloat16. Each gradient has the shape and dtype
    of its argument. Sums are float32; the expanded image and its gradient are each rounded to
    bfloat16 once.

    Raises:
      ValueError: if `unsupported(..., backward=True)` returns a reason.
    """
    plan = _backward_plan(x, w1, w2, dh=dh, dw=dw, stride=stride)
    if isinstance(plan, str):
        raise ValueError(f"shift_block has no GPU kernel for its gradients: {plan}")
    n, height, width, channels = x.shape
    size = height, width = height // stride, width // stride
    pixels, outputs = n * height * width, w2.shape[1]
    dout = dout.astype(x.dtype).reshape(pixels, outputs)
    phases = x.reshape(n, height, stride, width, stride, channels).transpose(2, 4, 0, 1, 3, 5)
    phases = phases.reshape(stride, stride, pixels, channels)
    out_type = jax.ShapeDtypeStruct((pixels, channels), x.dtype)
    dphases = [[jnp.zeros((pixels, channels), x.dtype)] * stride for _ in range(stride)]
    for (row, column), part in plan.images.items():
        weights = _weights([[tap] for tap in part.taps], part.depth, w1, b1, w2, x.dtype)
        operands = {"image": dout, **weights, "aligned": phases[row, column]}
        dphases[row][column] = _kernel(
            part, size, out_type, operands, backward=True, interpret=interpret
        )
    dx = jnp.stack([jnp.stack(row) for row in dphases])
    dx = dx.reshape(stride, stride, n, height, width, channels).transpose(2, 3, 0, 4, 1, 5)
    sums = _sums(plan.sums, size, phases, dout, w1, b1, w2, interpret)
    dw1, db1, dw2 = (_of_channels(plan.sums.chunks, value, len(b1)) for value in sums)
    return (
        dx.reshape(x.shape),
        dw1.T.astype(w1.dtype),
        db1.astype(b1.dtype),
        dw2.astype(w2.dtype),
    )


def _places(chunks: list[list[gpu.Tap]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the channel of each row of each chunk, and its tap's index; -1 for padding."""
    channel, number = (np.full((len(chunks), rows), -1) for _ in range(2))
    for i, chunk in enumerate(chunks):
        sizes = [tap.channels.size for tap in chunk]
        channel[i, : sum(sizes)] = np.concatenate([tap.channels for tap in chunk])
        number[i, : sum(sizes)] = np.repeat(np.arange(len(chunk)), sizes)
    return channel, number


def _weights(
    chunks: list[list[gpu.Tap]], rows: int, w1: Any, b1: Any, w2: Any, dtype: Any
) -> dict[str, jax.Array]:
    """Returns `w1 [chunks, C, rows]`, `b1 [chunks, rows]` and `w2 [chunks, rows, taps * K]`.

    They are zero in rows that are padding, and where the channel of a row has another tap.
    """
    channel, number = _places(chunks, rows)
    real, index = channel >= 0, np.maximum(channel, 0)
    of_tap = number[..., None] == np.arange(max(map(len, chunks)))
    w1 = jnp.where(real[None], w1.astype(dtype)[:, index], jnp.zeros((), dtype))
    b1 = jnp.where(real, b1.astype(jnp.float32)[index], np.float32(0))
    w2 = jnp.where(of_tap[..., None], w2.astype(dtype)[index][:, :, None], jnp.zeros((), dtype))
    return {
        "w1": w1.transpose(1, 0, 2),
        # Padded by at most one row, to a multiple of 128 bytes.
        "b1": jnp.pad(b1, ((0, -len(chunks) % 2), (0, 0))),
        "w2": w2.reshape(*index.shape, -1),
    }


def _of_channels(chunks: list[list[gpu.Tap]], values: jax.Array, channels: int) -> jax.Array:
    """Sorts `values [chunks, rows, ...]` by channel; 0 for channels without a tap."""
    channel = _places(chunks, values.shape[1])[0].reshape(-1)
    (rows,) = np.nonzero(channel >= 0)
    place = np.full(channels, -1)
    place[channel[rows]] = rows
    values = values.reshape(channel.size, *values.shape[2:])[place]
    real = (place >= 0).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.where(real, values, jnp.zeros((), values.dtype))


def _kernel(
    plan: _Plan,
    size: tuple[int, int],
    out_type: jax.ShapeDtypeStruct,
    operands: dict[str, jax.Array],
    *,
    out_relu: bool = False,
    backward: bool = False,
    interpret: bool,
) -> jax.Array:
    """Computes the block, or the gradient of its input.

    Args:
      plan: the division into tiles.
      size: height and width of the output.
      out_type: `[pixels, channels]`.
      operands: `image`, which is read at offsets, `w1`, `b1`, `w2`, and optionally `bias` and
        `aligned`, the residual. Backward the image is dout, and `aligned` is x.
      out_relu: whether a ReLU precedes the residual.
      backward: whether to compute the gradient.
      interpret: whether to interpret the kernel.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    height, width = size
    total, outputs = out_type.shape
    channels = operands["image"].shape[-1]
    halo, depth, step, warpgroups = plan.halo, plan.depth, plan.step, plan.warpgroups
    tiles = -(-total // halo.tile)
    blocks = min(gpu.MULTIPROCESSORS, -(-tiles // warpgroups))
    workers = blocks * warpgroups
    layout = plgpu.Layout.WGMMA
    resident = [name for name in operands if name not in ("image", "aligned")]

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

        def fetch(index, slot):
            for number, phase in enumerate(plan.phases):
                halo.fetch(
                    gmem["image"],
                    image.at[slot, number],
                    arrived.at[wg * _SLOTS + slot],
                    index,
                    phase,
                    block=block,
                    interpret=interpret,
                )

        def product(a, b):
            def multiply(acc):
                gpu.multiply_add(acc, a, b, left)
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((step, b.shape[1]), jnp.float32))

        def along_pixels(vector):
            """Loads a vector of channels and broadcasts it over pixels."""
            vector = gpu.load(vector, layout.reduce(0), interpret)
            return lax.broadcast_in_dim(vector, (step, *vector.shape), (1,))

        def expand(a, number):
            y = product(a, smem["w1"].at[number]) + along_pixels(smem["b1"].at[number])
            # Rounding first halves the cost of the ReLU and gives the same result.
            return jnp.maximum(y.astype(jnp.bfloat16), jnp.zeros((), jnp.bfloat16))

        def compute(first, slot, base, x):
            """Computes output pixels from `first` on, whose inputs start at `base` in memory.

            Backward these are pixels of the gradient of x, and `x` has the same pixels of x.
            """
            pixels = gpu.count_up(first, step, layout.reduce(1), interpret)
            row, column = gpu.coordinates(pixels, height, width)
            # Without it addresses are computed once for all tiles, and fill the registers.
            zero = lax.optimization_barrier(slot * 0)

            def factor(tap, number):
                source = pl.ds(base + tap.flat(width), step)
                source = image.at[slot, plan.phases.index(tap.phase), source, pl.ds(0, channels)]
                if backward:
                    y = expand(x, number)
                    dout = gpu.load(source, layout, interpret)
                    dy = product(dout, smem["w2"].at[number].T).astype(jnp.bfloat16)
                    y = gpu.where_bits(y > jnp.zeros((), y.dtype), dy)
                else:
                    y = expand(gpu.load(source, layout, interpret), number)
                keep = gpu.inside(tap, row, column, height, width)
                return y if keep is None else gpu.where_bits(keep, y)

            def project(acc):
                for number, tap in enumerate(plan.taps):
                    number += zero
                    b = smem["w1"].at[number].T if backward else smem["w2"].at[number]
                    gpu.multiply_add(acc, factor(tap, number), b, left)
                return acc[...]

            value = pl.run_scoped(project, plgpu.ACC((step, outputs), jnp.float32))
            if "bias" in smem:
                value += along_pixels(smem["bias"].at[pl.ds(0, outputs)])
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
            here = pl.ds(index * halo.tile, halo.tile)
            # The previous tile's result must have left the buffer that this one is written to.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if "aligned" in gmem:
                plgpu.copy_gmem_to_smem(
                    gmem["aligned"].at[here], out_smem.at[pl.ds(0, halo.tile)], added.at[wg]
                )
            plgpu.barrier_wait(arrived.at[wg * _SLOTS + slot])
            if backward:
                plgpu.barrier_wait(added.at[wg])

            @pl.loop(0, halo.computed // step)
            def _step(number):
                start = number * step
                here_smem = out_smem.at[pl.ds(start, step)]
                first = index * halo.tile + start
                value = compute(first, slot, halo.base(index) + start, here_smem)
                if "aligned" in gmem and not backward:

                    @pl.when(number == 0)
                    def _added():
                        plgpu.barrier_wait(added.at[wg])

                    value += gpu.load(here_smem, layout, interpret).astype(jnp.float32)
                here_smem[...] = value.astype(out_type.dtype)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, halo.tile)], out_gmem.at[here])

            @pl.when(turn + _SLOTS < mine)
            def _next():
                fetch(index + _SLOTS * workers, slot)

        plgpu.wait_smem_to_gmem(0)

    def shared(name):
        shape = operands[name].shape
        return gpu.matrices(*shape) if name[0] == "w" else plgpu.SMEM(shape, jnp.float32)

    copies = len(plan.phases) * len(halo.copies(interpret))
    wide = max(channels, depth, outputs)
    scratch = [
        {name: shared(name) for name in resident},
        plgpu.SMEM((warpgroups, _SLOTS, len(plan.phases), halo.pixels, channels + 8), jnp.bfloat16),
        # Backward it holds factors of the same products as w1, so it is sliced in the same way.
        gpu.matrices(warpgroups, halo.computed, outputs, part=depth if backward else 0),
        plgpu.SMEM((warpgroups, step, wide), jnp.bfloat16) if interpret else None,
        plgpu.Barrier(num_arrivals=copies, num_barriers=warpgroups * _SLOTS),
        plgpu.Barrier(num_barriers=warpgroups) if "aligned" in operands else None,
        plgpu.Barrier(num_arrivals=len(resident)),
    ]

    def shift_block(*refs):
        *inputs, out_gmem = refs
        gmem = dict(zip(operands, inputs, strict=True))
        pl.run_scoped(
            lambda *scratch: body(gmem, out_gmem, *scratch), *scratch, collective_axes="wg"
        )

    return gpu.launch(
        shift_block,
        out_type,
        blocks=blocks,
        warpgroups=warpgroups,
        interpret=interpret,
    )(*operands.values())


def _sums(
    plan: _SumsPlan,
    size: tuple[int, int],
    phases: jax.Array,
    dout: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of `w1`, transposed, `b1` and `w2`, `[chunks, rows, ...]` each.

    Args:
      plan: the division of the sums.
      size: height and width of the output.
      phases: x as `[stride, stride, pixels, C]`.
      dout: `[pixels, K]`.
      w1, b1, w2: the weights.
      interpret: whether to interpret the kernel.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    height, width = size
    total, channels = phases.shape[2:]
    outputs = dout.shape[1]
    chunks, each, halo, warpgroups = len(plan.chunks), plan.each, plan.halo, plan.warpgroups
    tiles = -(-total // halo.tile)
    # Workers with consecutive numbers have the same pixels.
    shares = min(tiles, max(1, gpu.MULTIPROCESSORS * warpgroups // chunks))
    blocks = -(-shares * chunks // warpgroups)
    workers = blocks * warpgroups
    layout = plgpu.Layout.WGMMA
    # The phase of each chunk, and the offset of each of its taps.
    table = np.zeros((chunks, 2 + 2 * each), np.int32)
    for entry, chunk in zip(table, plan.chunks, strict=True):
        entry[:2] = chunk[0].phase
        for number, tap in enumerate(chunk):
            entry[2 + 2 * number : 4 + 2 * number] = tap.row, tap.column
    weights = _weights(plan.chunks, _ROWS, w1, b1, w2, dout.dtype)
    operands = {
        "w1": weights["w1"].transpose(0, 2, 1),
        "b1": weights["b1"],
        "w2": weights["w2"],
        "table": jnp.asarray(table),
        "x": phases,
        "dout": dout,
    }

    def body(gmem, out_gmem, smem, image, x, shifted, left, arrived, ready):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        worker = block * warpgroups + wg
        chunk, share = lax.rem(worker, np.int32(chunks)), lax.div(worker, np.int32(chunks))
        image, x, shifted = image.at[wg], x.at[wg], shifted.at[wg]
        w1, b1, w2 = (smem[name].at[wg] for name in ("w1", "b1", "w2"))
        left = None if left is None else left.at[wg]
        for name, target in (("w1", w1), ("b1", b1), ("w2", w2)):
            plgpu.copy_gmem_to_smem(gmem[name].at[chunk], target, ready.at[wg])
        phase = tuple(gmem["table"][chunk, i] for i in range(2))
        offsets = [
            tuple(gmem["table"][chunk, 2 + 2 * number + i] for i in range(2))
            for number in range(each)
        ]

        def fetch(index, slot):
            barrier = arrived.at[wg * _SLOTS + slot]
            halo.fetch(
                gmem["dout"], image.at[slot], barrier, index, block=block, interpret=interpret
            )
            here = pl.ds(index * halo.tile, halo.tile)
            plgpu.copy_gmem_to_smem(gmem["x"].at[(*phase, here)], x.at[slot], barrier)

        def product(a, b):
            def multiply(acc):
                plgpu.wgmma(acc, a, b)
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((_ROWS, _STEP), jnp.float32))

        def add(start, db1, *, dw1, dw2, index, slot):
            """Adds the products of _STEP pixels of the tile from `start` on."""
            here = x.at[slot, pl.ds(start, _STEP)]
            pixels = gpu.count_up(index * halo.tile + start, _STEP, layout.reduce(1), interpret)
            row, column = gpu.coordinates(pixels, height, width)
            for number, (down, right) in enumerate(offsets):
                source = pl.ds(halo.base(index) + start - down * width - right, _STEP)
                d = gpu.load(image.at[slot, source, pl.ds(0, outputs)], layout, interpret)
                above, left_of = row - down, column - right
                keep = (above >= 0) & (above < height) & (left_of >= 0) & (left_of < width)
                shifted[:, pl.ds(number * outputs, outputs)] = gpu.where_bits(keep, d)
            plgpu.commit_smem()
            y = product(w1, here.T) + lax.broadcast_in_dim(bias, (_ROWS, _STEP), (0,))
            y = jnp.maximum(y.astype(jnp.bfloat16), jnp.zeros((), jnp.bfloat16))
            dy = product(w2, shifted.T)
            dy = jnp.where(y > jnp.zeros((), y.dtype), dy, np.float32(0))
            gpu.multiply_add(dw2, y, shifted, left)
            gpu.multiply_add(dw1, dy.astype(jnp.bfloat16), here, left)
            plgpu.wgmma_wait(0)  # the next pixels overwrite these
            return db1 + dy.sum(1)

        mine = jnp.where(share < shares, (tiles - share + shares - 1) // shares, 0)
        for slot in range(_SLOTS):

            @pl.when(slot < mine)
            def _first(slot=slot):
                fetch(share + slot * shares, slot)

        plgpu.barrier_wait(ready.at[wg])
        bias = gpu.load(b1, layout.reduce(1), interpret)

        def accumulate(dw1, dw2):
            def tile(turn, db1):
                index = share + turn * shares
                slot = lax.rem(turn, _SLOTS)
                plgpu.barrier_wait(arrived.at[wg * _SLOTS + slot])
                here = functools.partial(add, dw1=dw1, dw2=dw2, index=index, slot=slot)
                db1 = lax.fori_loop(
                    0, halo.tile // _STEP, lambda step, db1: here(step * _STEP, db1), db1
                )

                @pl.when(turn + _SLOTS < mine)
                def _next():
                    fetch(index + _SLOTS * shares, slot)

                return db1

            db1 = lax.fori_loop(0, mine, tile, bias * 0)
            return dw1[...], db1, dw2[...]

        shapes = ((_ROWS, n) for n in (channels, each * outputs))
        sums = pl.run_scoped(accumulate, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        for target, value in zip(out_gmem, sums, strict=True):
            target[worker] = value

    scratch = [
        {
            "w1": gpu.matrices(warpgroups, _ROWS, channels),
            "b1": plgpu.SMEM((warpgroups, _ROWS), jnp.float32),
            "w2": gpu.matrices(warpgroups, _ROWS, each * outputs, part=outputs),
        },
        plgpu.SMEM((warpgroups, _SLOTS, halo.pixels, outputs + 8), jnp.bfloat16),
        gpu.matrices(warpgroups, _SLOTS, halo.tile, channels),
        gpu.matrices(warpgroups, _STEP, each * outputs, part=outputs),
        plgpu.SMEM((warpgroups, _ROWS, _STEP), jnp.bfloat16) if interpret else None,
        plgpu.Barrier(
            num_arrivals=len(halo.copies(interpret)) + 1, num_barriers=warpgroups * _SLOTS
        ),
        plgpu.Barrier(num_arrivals=3, num_barriers=warpgroups),
    ]

    def shift_block_sums(*refs):
        gmem = dict(zip(operands, refs, strict=False))
        out_gmem = refs[len(operands) :]
        pl.run_scoped(
            lambda *scratch: body(gmem, out_gmem, *scratch), *scratch, collective_axes="wg"
        )

    shapes = ((_ROWS, channels), (_ROWS,), (_ROWS, each * outputs))
    sums = gpu.launch(
        shift_block_sums,
        tuple(jax.ShapeDtypeStruct((workers, *shape), jnp.float32) for shape in shapes),
        blocks=blocks,
        warpgroups=warpgroups,
        interpret=interpret,
    )(*operands.values())
    dw1, db1, dw2 = (gpu.total(value, shares, chunks) for value in sums)
    of_tap = _places(plan.chunks, _ROWS)[1][..., None] == np.arange(each)
    dw2 = dw2.reshape(chunks, _ROWS, each, outputs)
    return dw1, db1, jnp.where(of_tap[..., None], dw2, np.float32(0)).sum(2)
