"""Expand, shift and contract on a TPU, without the expanded tensor leaving the chip.

For each pixel and a tile of T images, `shift_pointwise` and `shift_block` both compute

    y = prologue(w1^T x)                       [E, T], channels sorted by offset
    shifted[p - (dh, dw)] <- y's channels      a store at another address: the shift
    out[p] = epilogue(w2^T shifted[p])         [K, T], once shifted[p] is complete

in the layout HWCN, with images in the lanes and a pixel's channels in the sublanes, so that a
position is an index of two untiled dimensions. The grid runs over tiles of images and, inside,
over rows; `shifted` is a ring buffer of as many rows as offsets span. Each row of x is fetched once
and each row of the result written once; the weights are fetched once in total.

In `shift_pointwise` the expanded channels are those of x, in any order: w1 is the 0/1 matrix that
sorts them, whose product is exact (except that an infinity in one channel makes the pixel's other
channels NaN).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from shiftnet.kernels.layouts import LANES

# v5e and v6e have 128 MiB; the compiler needs some of it.
VMEM_BYTES = 100 * 2**20
# Wider tiles make fewer, longer steps; beyond this size they only take memory from prefetches.
COMFORTABLE_BYTES = 48 * 2**20
TILES = (512, 256, LANES)


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels with one offset `dh, dw`, at `start:stop` among the sorted channels."""

    dh: int
    dw: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order and the offsets of the expanded channels, all known at trace time.

    Groups follow one another, each padded with zero channels to a whole number of sublane tiles.
    Those read from input pixels of the same (row, column) remainder modulo the stride are adjacent.
    Groups that always read from outside the image are left out.

    Attributes:
      order: int `[padded E]`, the channel at each index, or -1 for padding.
      expanded: E.
      up, down, west, east: the largest offset in each direction, all at least 0.
    """

    height: int
    width: int
    stride: int
    groups: tuple[Group, ...]
    order: np.ndarray
    expanded: int
    up: int
    down: int
    west: int
    east: int

    @property
    def out_height(self) -> int:
        return pl.cdiv(self.height, self.stride)

    @property
    def out_width(self) -> int:
        return pl.cdiv(self.width, self.stride)

    @property
    def channels(self) -> int:
        return len(self.order)

    @property
    def margin(self) -> int:
        """Columns before column 0 in a ring of output rows; their values are never read."""
        return pl.cdiv(self.east, self.stride)

    @property
    def ring(self) -> tuple[int, int, int]:
        """Rows, columns and channels of the ring buffer of incomplete output rows."""
        s = self.stride
        columns = self.margin + self.out_width + pl.cdiv(self.west, s)
        return (self.up + self.down) // s + 1, columns, self.channels

    @property
    def input_ring(self) -> tuple[int, int, int]:
        """The same for the gradient: its rows are those of the input, its margin is `west`."""
        return self.up + self.down + 1, self.west + self.width + self.east, self.channels

    @property
    def remainders(self) -> list[tuple[int, int]]:
        return [(h, w) for h in range(self.stride) for w in range(self.stride)]

    def fed_by(self, row: int, column: int) -> list[Group]:
        """Returns the groups that read pixels with these remainders modulo the stride."""
        s = self.stride
        return [g for g in self.groups if (g.dh - row) % s == 0 and (g.dw - column) % s == 0]

    def span(self, row: int, column: int) -> tuple[int, int]:
        """Returns the range of their channels, which are contiguous."""
        groups = self.fed_by(row, column)
        return (groups[0].start, groups[-1].stop) if groups else (0, 0)


def plan(
    height: int, width: int, dh: np.ndarray, dw: np.ndarray, stride: int, dtype: jnp.dtype
) -> Plan:
    """Sorts the channels; `dh, dw` are int `[E]`."""
    tile = 32 // jnp.dtype(dtype).itemsize
    offsets = sorted(
        {
            (h % stride, w % stride, h, w)
            for h, w in zip(dh.tolist(), dw.tolist(), strict=True)
            if abs(h) < height and abs(w) < width
        }
    )
    groups: list[Group] = []
    order: list[int] = []
    for _, _, h, w in offsets:
        members = np.flatnonzero((dh == h) & (dw == w)).tolist()
        start = len(order)
        order += members + [-1] * (-len(members) % tile)
        groups.append(Group(h, w, start, len(order)))
    return Plan(
        height=height,
        width=width,
        stride=stride,
        groups=tuple(groups),
        order=np.array(order, np.int32),
        expanded=len(dh),
        up=max([0, *[-g.dh for g in groups]]),
        down=max([0, *[g.dh for g in groups]]),
        west=max([0, *[-g.dw for g in groups]]),
        east=max([0, *[g.dw for g in groups]]),
    )


def _dot(a, b, contract=((1,), (0,)), exact=False):
    """Returns a product in float32; `exact` (for 0/1 matrices) does not round the operands."""
    precision = jax.lax.Precision.HIGHEST if exact and b.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def is_row(row, stride, remainder, low, high):
    """Returns whether `low <= row < high` and `row % stride == remainder`."""
    inside = (row >= low) & (row < high)
    return inside & (jax.lax.rem(row, stride) == remainder) if stride > 1 else inside


def slot_of(ring, row):
    """Returns a row's slot in a ring buffer; a row can be negative, down to minus its length."""
    return jax.lax.rem(row + ring.shape[0], ring.shape[0])


def _scatter(ring, groups, values, address):
    """Stores each group's channels at `ring[address(group)]`, which is the shift."""
    first = groups[0].start
    for g in groups:
        ring[(*address(g), slice(g.start, g.stop))] = values[g.start - first : g.stop - first]


def clear(ring, slot, start, stop):
    @pl.loop(0, ring.shape[1])
    def _(column):
        ring[slot, column, start:stop] = jnp.zeros((stop - start, ring.shape[3]), ring.dtype)


def clear_all(ring):
    @pl.loop(0, ring.shape[0])
    def _(slot):
        clear(ring, slot, 0, ring.shape[2])


def widen(refs, wide):
    """Broadcasts per-channel columns over the lanes, once per tile instead of once per pixel."""
    for name, ref in wide.items():
        ref[...] = jnp.broadcast_to(refs[name][...], ref.shape)


def _loop(count, unroll):
    # The factor must divide the count: libtpu 0.0.48 crashes at a remainder of 2 or 3.
    even = (n for n in range(1, unroll + 1) if count % n == 0)
    return pl.loop(0, count, unroll=max(even))


def _for_columns(plan, unroll, body):
    """Calls `body(j, column)` for the columns `j * stride + column` of a row, `column < stride`."""
    s = plan.stride

    @_loop(plan.width // s, unroll)
    def _(j):
        for column in range(s):
            body(j, column)

    for column in range(plan.width % s):
        body(plan.width // s, column)


def _expand(refs, wide, pixel, start, stop, exact):
    """Returns channels `start:stop` before and after scale and bias, float32 `[n, T]`."""
    if "w1" in refs:
        raw = _dot(refs["w1"][start:stop], pixel, exact=exact)
    else:
        raw = pixel[start:stop].astype(jnp.float32)
    y = raw * wide["scale"][start:stop] if "scale" in wide else raw
    return raw, y + wide["bias"][start:stop] if "bias" in wide else y


def _store_shifted(plan, shifted, row, h, j, column, y):
    """Stores a pixel's channels at the outputs that read them; `row = h % stride`."""
    s = plan.stride
    _scatter(
        shifted,
        plan.fed_by(row, column),
        y,
        lambda g: (
            slot_of(shifted, jax.lax.div(h - g.dh, s)),
            plan.margin + j + (column - g.dw) // s,
        ),
    )


def _finish_below(plan, shifted, h):
    """Stores zeros for the outputs that read rows below the image."""
    for row in range(plan.stride):
        groups = [g for g in plan.groups if g.dh > 0 and (g.dh - row) % plan.stride == 0]

        @pl.when(is_row(h, plan.stride, row, plan.height, plan.height + plan.down))
        def _(groups=groups):
            for g in groups:
                slot = slot_of(shifted, jax.lax.div(h - g.dh, plan.stride))
                clear(shifted, slot, g.start, g.stop)


def _forward_kernel(refs, out, shifted, wide, *, plan, relu, out_relu, exact, unroll):
    s = plan.stride
    h = pl.program_id(1)

    @pl.when(h == 0)
    def _():
        clear_all(shifted)
        widen(refs, wide)

    for row in range(s):

        @pl.when(is_row(h, s, row, 0, plan.height))
        def _(row=row):
            def body(j, column):
                start, stop = plan.span(row, column)
                if start == stop:
                    return
                pixel = refs["x"][0, j * s + column]
                _, y = _expand(refs, wide, pixel, start, stop, exact)
                y = (jnp.maximum(y, 0) if relu else y).astype(shifted.dtype)
                _store_shifted(plan, shifted, row, h, j, column, y)

            _for_columns(plan, unroll, body)

    _finish_below(plan, shifted, h)

    complete = h - plan.down

    @pl.when(is_row(complete, s, 0, 0, plan.height))
    def _():
        slot = slot_of(shifted, jax.lax.div(complete, s))

        @_loop(plan.out_width, unroll)
        def _(j):
            y = _dot(refs["w2"][...], shifted[slot, plan.margin + j])
            y = y * wide["out_scale"][...] if "out_scale" in wide else y
            y = y + wide["out_bias"][...] if "out_bias" in wide else y
            y = jnp.maximum(y, 0) if out_relu else y
            y = y + refs["residual"][0, j].astype(jnp.float32) if "residual" in refs else y
            out[0, j] = y.astype(out.dtype)


def _backward_kernel(refs, outs, scratch, wide, *, plan, relu, exact, unroll):
    s = plan.stride
    tile, u = pl.program_id(0), pl.program_id(1)
    shifted, dshifted, douts = scratch["shifted"], scratch["dshifted"], scratch["douts"]
    dtype = shifted.dtype
    totals = {name: outs[name] for name in ("w1", "w2") if name in outs} | scratch["sums"]

    @pl.when((tile == 0) & (u == 0))
    def _():
        for ref in totals.values():
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    @pl.when(u == 0)
    def _():
        clear_all(shifted)
        clear_all(dshifted)
        widen(refs, wide)

    # Row u of the output's gradient is stored at the pixels that its terms were read from.
    @pl.when(is_row(u, s, 0, 0, plan.height))
    def _():
        slot = slot_of(douts, jax.lax.div(u, s))

        @_loop(plan.out_width, unroll)
        def _(j):
            dout = refs["dout"][0, j]
            douts[slot, j] = dout
            dy = _dot(refs["w2"][...], dout).astype(dtype)
            _scatter(
                dshifted,
                plan.groups,
                dy,
                lambda g: (slot_of(dshifted, u + g.dh), plan.west + j * s + g.dw),
            )

    @pl.when(is_row(u, s, 0, plan.height, plan.height + plan.up))
    def _():
        for g in plan.groups:
            if g.dh < 0:
                clear(dshifted, slot_of(dshifted, u + g.dh), g.start, g.stop)

    # Row h of the expanded tensor's gradient is now complete.
    h = u - plan.up
    for row in range(s):

        @pl.when(is_row(h, s, row, 0, plan.height))
        def _(row=row):
            slot = slot_of(dshifted, h)

            def body(j, column):
                w = j * s + column
                start, stop = plan.span(row, column)
                if start == stop:
                    outs["x"][0, w] = jnp.zeros(outs["x"].shape[2:], dtype)
                    return
                pixel = refs["x"][0, w]
                raw, y = _expand(refs, wide, pixel, start, stop, exact)
                dy = dshifted[slot, plan.west + w, start:stop].astype(jnp.float32)
                if relu:
                    dy = jnp.where(y > 0, dy, 0.0)
                    y = jnp.maximum(y, 0)
                _store_shifted(plan, shifted, row, h, j, column, y.astype(dtype))
                if "bias" in outs:
                    scratch["sums"]["bias"][start:stop] += _fold_lanes(dy)
                if "scale" in outs:
                    scratch["sums"]["scale"][start:stop] += _fold_lanes(dy * raw)
                    dy = dy * wide["scale"][start:stop]
                draw = dy.astype(dtype)
                if "w1" in outs:
                    outs["w1"][start:stop] += _dot(draw, pixel, contract=((1,), (1,)))
                if "w1" in refs:
                    draw = _dot(refs["w1_back"][row * s + column][...], draw, exact=exact)
                outs["x"][0, w] = draw.astype(dtype)

            _for_columns(plan, unroll, body)

    _finish_below(plan, shifted, h)

    # So are the shifted channels of an output row, the other factor of dw2.
    complete = h - plan.down

    @pl.when(is_row(complete, s, 0, 0, plan.height))
    def _():
        q = jax.lax.div(complete, s)
        slot, dout_slot = slot_of(shifted, q), slot_of(douts, q)

        @_loop(plan.out_width, unroll)
        def _(j):
            y, dout = shifted[slot, plan.margin + j], douts[dout_slot, j]
            outs["w2"][...] += _dot(y, dout, contract=((1,), (1,)))

    @pl.when((tile == pl.num_programs(0) - 1) & (u == pl.num_programs(1) - 1))
    def _():
        for name, ref in scratch["sums"].items():
            outs[name][...] = ref[...].sum(axis=1, keepdims=True)


def _fold_lanes(a):
    return sum(a[:, i : i + LANES] for i in range(0, a.shape[1], LANES))


def _places(plan, dtype):
    """Returns the 0/1 matrix `[padded E, E]` that sorts channels; gathers would move more bytes."""
    return (jnp.asarray(plan.order)[:, None] == np.arange(plan.expanded)).astype(dtype)


def _arrange(plan, a, dtype):
    """Sorts the rows of `a [E, n]` by the plan, with zeros as padding."""
    return _dot(_places(plan, dtype), a.astype(dtype), exact=True).astype(dtype)


def _restore(plan, a, dtype):
    """Inverts `_arrange` for a float32 `a`; zeros for channels that were left out."""
    return _dot(_places(plan, a.dtype), a, contract=((0,), (0,)), exact=True).astype(dtype)


def _first_weight(plan, x, w1):
    """Returns w1 sorted or the matrix that sorts x, `[padded E, C]`; None if x is sorted."""
    if w1 is not None:
        return _arrange(plan, w1.T, x.dtype)
    if plan.stride == 1 and np.array_equal(plan.order, np.arange(plan.expanded)):
        return None
    return _places(plan, x.dtype)


def _column(a):
    return None if a is None else a.astype(jnp.float32)[:, None]


def _arrange_column(plan, a):
    return None if a is None else _arrange(plan, _column(a), jnp.float32)


def whole(a):
    return pl.BlockSpec(a.shape, lambda n, u: (0,) * len(a.shape))


def rows_of(columns, channels, tile, row):
    """Returns the spec of one row of a tile of images per step: row `row(step)`."""
    return pl.BlockSpec((1, columns, channels, tile), lambda n, u: (row(u), 0, 0, n))


def padded_bytes(rows, columns, itemsize):
    """Returns the bytes of a matrix in VMEM, where a tile has 128 lanes of 32 bytes."""
    sublanes = 32 // itemsize
    return pl.cdiv(rows, sublanes) * sublanes * pl.cdiv(columns, LANES) * LANES * itemsize


def _vmem_bytes(plan, channels, outputs, tile, itemsize, *, own_weight, backward):
    """Returns an upper estimate of the bytes that a call keeps on the chip."""

    def row(columns, channels):
        return columns * padded_bytes(channels, tile, itemsize)

    expanded = plan.channels
    x, out = row(plan.width, channels), row(plan.out_width, outputs)
    first = padded_bytes(expanded, channels, itemsize)
    second = padded_bytes(expanded, outputs, itemsize)
    slots, columns, _ = plan.ring
    kept = slots * row(columns, expanded) + 2 * padded_bytes(expanded, tile, 4)
    pixel = padded_bytes(expanded, tile, 4)
    # Operands and results are double-buffered; a pixel has some intermediate values.
    if not backward:
        return 2 * (x + 2 * out + first + second) + kept + 3 * pixel
    slots_back, columns_back, _ = plan.input_ring
    kept += slots_back * row(columns_back, expanded) + slots * out
    kept += 2 * padded_bytes(expanded, LANES, 4)
    gradients = padded_bytes(expanded, outputs, 4) + 2 * padded_bytes(expanded, 1, 4)
    gradients += padded_bytes(expanded, channels, 4) if own_weight else 0
    return 2 * (2 * x + out + 2 * first + second + gradients) + kept + 5 * pixel


def _tile(plan, x, outputs, *, own_weight, backward):
    """Returns the number of images per grid step; None if even the smallest tile does not fit."""
    *_, channels, batch = x.shape
    for tile in TILES:
        size = _vmem_bytes(
            plan,
            channels,
            outputs,
            tile,
            x.dtype.itemsize,
            own_weight=own_weight,
            backward=backward,
        )
        limit = VMEM_BYTES if tile == LANES else COMFORTABLE_BYTES
        if batch % tile == 0 and size <= limit:
            return tile
    return None


def _unroll(plan):
    """Returns the number of pixels to compute in parallel, so that the matrix units seldom wait.

    In the schedules of libtpu 0.0.48 for a v5e, at 144 channels, forward, a pixel of 128 images
    takes 99 cycles alone and 60 as one of four; a pixel of 512 images takes 271 and 221.
    """
    return 4 if plan.channels <= 256 else 1


def unsupported(
    x: jax.Array,
    expanded: int,
    outputs: int,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    own_weight: bool,
    backward: bool,
) -> str | None:
    """Returns why `forward` (or `backward`) does not support these arguments, or None.

    `expanded` and `outputs` are E and K; `own_weight` is whether there is a w1.
    """
    why = unsupported_images(x.shape, x.dtype)
    if why:
        return why
    if min(expanded, outputs) == 0:
        return "there are no channels"
    height, width, channels, _ = x.shape
    one = outputs == 1 or (own_weight and channels == 1)
    if backward and one and jnp.dtype(x.dtype) == jnp.bfloat16:
        return "libtpu 0.0.48 does not compile gradients of a single bfloat16 channel"
    p = plan(height, width, dh, dw, stride, x.dtype)
    if not p.groups:
        return "every channel moves out of the image"
    if not _tile(p, x, outputs, own_weight=own_weight, backward=backward):
        return f"rows of {width} pixels of {p.channels} channels do not fit into the chip's memory"
    return None


def unsupported_images(x_shape: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """Returns why no kernel here supports images `[H, W, C, N]` like these, or None."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the dtype is {jnp.dtype(dtype).name}, not float32 or bfloat16"
    if 0 in x_shape:
        return f"the shape is {x_shape}, without any element"
    if x_shape[-1] % LANES:
        return f"the batch is {x_shape[-1]}, not a multiple of {LANES}"
    return None


def forward(
    x: jax.Array,
    w1: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    w2: jax.Array,
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
    """Computes `epilogue(w2^T shift(prologue(w1^T x))[::stride, ::stride])`; see the module.

    Args:
      x: `[H, W, C, N]`, float32 or bfloat16, N a multiple of 128.
      w1: `[C, E]`, or None if the expanded channels are those of `x`.
      scale, bias: `[E]` each, the prologue, which ends with `relu`.
      w2: `[E, K]`.
      dh, dw: int `[E]`, the offset that each expanded channel is read from.
      stride: at least 1; rows and columns that are multiples of it are kept.
      out_scale, out_bias: `[K]` each, followed by `out_relu` and `residual [H', W', K, N]`.
      interpret: whether to interpret the kernel, which works on any device but is slow.

    Returns:
      `[H', W', K, N]` in the dtype of `x`, with H' = ceil(H / stride) and W' = ceil(W / stride).
    """
    height, width, channels, batch = x.shape
    outputs = w2.shape[1]
    p = plan(height, width, dh, dw, stride, x.dtype)
    tile = _tile(p, x, outputs, own_weight=w1 is not None, backward=False)
    assert tile, "the caller asks `unsupported` first"
    operands = {
        "x": x,
        "w1": _first_weight(p, x, w1),
        "scale": _arrange_column(p, scale),
        "bias": _arrange_column(p, bias),
        "w2": _arrange(p, w2, x.dtype).T,
        "out_scale": _column(out_scale),
        "out_bias": _column(out_bias),
        "residual": residual,
    }
    operands = {name: a for name, a in operands.items() if a is not None}
    out_row = rows_of(
        p.out_width, outputs, tile, lambda u: jax.lax.div(jnp.maximum(u - p.down, 0), stride)
    )
    specs = {name: whole(a) for name, a in operands.items()}
    specs["x"] = rows_of(width, channels, tile, lambda u: jnp.minimum(u, height - 1))
    if residual is not None:
        specs["residual"] = out_row
    wide: dict[str, Any] = {
        name: pltpu.VMEM((operands[name].shape[0], tile), jnp.float32)
        for name in ("scale", "bias", "out_scale", "out_bias")
        if name in operands
    }
    return pl.pallas_call(
        functools.partial(
            _forward_kernel,
            plan=p,
            relu=relu,
            out_relu=out_relu,
            exact=w1 is None,
            unroll=1 if interpret else _unroll(p),
        ),
        grid=(batch // tile, (p.out_height - 1) * stride + p.down + 1),
        in_specs=(specs,),
        out_specs=out_row,
        out_shape=jax.ShapeDtypeStruct((p.out_height, p.out_width, outputs, batch), x.dtype),
        scratch_shapes=(pltpu.VMEM((*p.ring, tile), x.dtype), wide),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(operands)


def backward(
    x: jax.Array,
    w1: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    w2: jax.Array,
    dout: jax.Array,
    *,
    relu: bool,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    interpret: bool = False,
) -> dict[str, jax.Array]:
    """Returns the gradients of `forward` without epilogue, by name, of all arguments but None.

    One more pass over the rows of x and `dout [H', W', K, N]`: the expanded channels are
    recomputed, `w2 dout` is stored at the pixels that each group reads, and the gradients of the
    weights stay on the chip, in float32, until the last step.
    """
    height, width, channels, batch = x.shape
    outputs = w2.shape[1]
    p = plan(height, width, dh, dw, stride, x.dtype)
    own_weight = w1 is not None
    tile = _tile(p, x, outputs, own_weight=own_weight, backward=True)
    assert tile, "the caller asks `unsupported` first"
    first = _first_weight(p, x, w1)
    operands = {
        "x": x,
        "dout": dout,
        "w1": first,
        "scale": _arrange_column(p, scale),
        "bias": _arrange_column(p, bias),
        "w2": _arrange(p, w2, x.dtype),
    }
    operands = {name: a for name, a in operands.items() if a is not None}
    specs = {name: whole(a) for name, a in operands.items()}
    # A row of x is fetched once the gradients of all rows below that read it are known.
    x_row = rows_of(width, channels, tile, lambda u: jnp.clip(u - p.up, 0, height - 1))
    specs["x"] = x_row
    specs["dout"] = rows_of(
        p.out_width, outputs, tile, lambda u: jnp.minimum(jax.lax.div(u, stride), p.out_height - 1)
    )
    if first is not None:
        # Transposed and sliced here, because slicing lanes is free at multiples of 128 only.
        spans = [p.span(*remainder) for remainder in p.remainders]
        operands["w1_back"] = [first[a:b].T if a < b else None for a, b in spans]
        specs["w1_back"] = [a if a is None else whole(a) for a in operands["w1_back"]]
    shapes = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    shapes["w2"] = jax.ShapeDtypeStruct((p.channels, outputs), jnp.float32)
    if own_weight:
        shapes["w1"] = jax.ShapeDtypeStruct((p.channels, channels), jnp.float32)
    wide: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    for name in ("scale", "bias"):
        if name in operands:
            shapes[name] = jax.ShapeDtypeStruct((p.channels, 1), jnp.float32)
            wide[name] = pltpu.VMEM((p.channels, tile), jnp.float32)
            sums[name] = pltpu.VMEM((p.channels, LANES), jnp.float32)
    scratch = {
        "shifted": pltpu.VMEM((*p.ring, tile), x.dtype),
        "dshifted": pltpu.VMEM((*p.input_ring, tile), x.dtype),
        "douts": pltpu.VMEM((p.ring[0], p.out_width, outputs, tile), x.dtype),
        "sums": sums,
    }
    steps = p.up + max(height, (p.out_height - 1) * stride + p.down + 1)
    grads = pl.pallas_call(
        functools.partial(
            _backward_kernel,
            plan=p,
            relu=relu,
            exact=not own_weight,
            unroll=1 if interpret else _unroll(p),
        ),
        grid=(batch // tile, steps),
        in_specs=(specs,),
        out_specs={name: whole(a) for name, a in shapes.items()} | {"x": x_row},
        out_shape=shapes,
        scratch_shapes=(scratch, wide),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(operands)
    restored = {"x": grads["x"], "w2": _restore(p, grads["w2"], w2.dtype)}
    if w1 is not None:
        restored["w1"] = _restore(p, grads["w1"], w1.dtype).T
    for name, a in (("scale", scale), ("bias", bias)):
        if a is not None:
            restored[name] = _restore(p, grads[name], a.dtype)[:, 0]
    return restored
