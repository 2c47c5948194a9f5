"""The Mosaic GPU kernels in JAX's interpreter, against a plain restatement of what they compute.

No kernel starts a copy at a negative index (which the interpreter gets wrong): a copy that would
starts at 0, and masks drop what lies before. Memory that no copy wrote is NaN in the interpreter,
so that a mask that drops too little shows. What the interpreter cannot show is in `compile_gpu.py`:
whether the kernels compile for an H200. Registers as the left factor of a product, and references
that are reshaped, take another way in the interpreter than on a device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.kernels import gpu
from shiftnet.kernels.shift import channel_offsets
from shiftnet.kernels.shift import gpu as shift
from shiftnet.kernels.shift_block import gpu as shift_block
from shiftnet.kernels.shift_block import shift_block as shift_block_operation
from shiftnet.kernels.shift_block import xla as shift_block_xla
from shiftnet.kernels.shift_pointwise import gpu as shift_pointwise
from shiftnet.kernels.shift_pointwise import shift_pointwise as shift_pointwise_operation
from shiftnet.kernels.shift_pointwise import xla as shift_pointwise_xla

# Its copies past the end of an array come back empty.
simulated = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 does not know enough"
)


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """One multiprocessor, so that a few tiles are many for each warpgroup."""
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 1)


def run(kernel, *operands, **settings):
    """Compiled, but not well: most of these tests' time is the CPU's compiler."""
    kernel = functools.partial(kernel, interpret=True, **settings)
    return jax.jit(kernel, compiler_options={"xla_backend_optimization_level": 0})(*operands)


@pytest.fixture
def one_warpgroup(monkeypatch):
    """For gradients: where the CPU has few threads, two can each hold what the other waits for."""
    monkeypatch.setattr(shift_block, "_SHAPES", ((1, 64),))
    monkeypatch.setattr(shift_block, "_SUMS_SHAPES", ((1, 128), (1, 64)))
    monkeypatch.setattr(shift_pointwise, "_WARPGROUPS", (1,))


def numbers(seed, *shape, dtype=jnp.bfloat16, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def exact(*arrays):
    return [np.asarray(a.astype(jnp.float32)) for a in arrays]


def rounded(x):
    """As bfloat16 holds it."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def shifted(x, dh, dw):
    y = np.zeros_like(x)
    _, height, width, channels = x.shape
    for c in range(channels):
        for h in range(height):
            for w in range(width):
                if 0 <= h + dh[c] < height and 0 <= w + dw[c] < width:
                    y[:, h, w, c] = x[:, h + dh[c], w + dw[c], c]
    return y


def assert_rounded_once(ours, expected):
    """Sums are float32; what is left is the result's rounding to bfloat16, and of sums near 0."""
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(ours)[0], expected, rtol=2**-8, atol=2e-3)


BLOCKS = pytest.mark.parametrize(
    ("image", "channels", "expanded", "outputs", "stride", "dilation", "whole"),
    [
        pytest.param((2, 16, 20), 16, 144, 16, 1, 1, True, id="many-tiles-in-an-image"),
        pytest.param(
            *((3, 8, 8), 64, 192, 64, 1, 1, False),
            id="tile-is-an-image-21-channels-each",
            marks=pytest.mark.slow,
        ),
        pytest.param((8, 2, 5), 32, 20, 16, 1, 2, False, id="offsets-outside-few-channels-each"),
        pytest.param((4, 12, 12), 16, 16, 32, 2, 1, True, id="stride-2-partly-filled-tiles"),
        pytest.param(
            *((2, 16, 16), 32, 288, 64, 2, 2, False),
            id="stride-2-dilation-2",
            marks=pytest.mark.slow,
        ),
    ],
)


def block_operands(image, channels, expanded, outputs, stride, dilation):
    x = numbers(0, *image, channels)
    w1 = numbers(1, channels, expanded, scale=channels**-0.5)
    b1 = numbers(2, expanded, dtype=jnp.float32)
    w2 = numbers(3, expanded, outputs, scale=expanded**-0.5)
    dh, dw = channel_offsets(expanded, 3, dilation)
    return (x, w1, b1, w2), {"dh": dh, "dw": dw, "stride": stride}


@simulated
@BLOCKS
def test_shift_block(monkeypatch, image, channels, expanded, outputs, stride, dilation, whole):
    monkeypatch.setattr(shift_block, "_SHAPES", ((2, 64),))
    operands, core = block_operands(image, channels, expanded, outputs, stride, dilation)
    n, height, width = image
    epilogue = {}
    if whole:
        residual = numbers(4, n, height // stride, width // stride, outputs)
        epilogue = {"out_bias": numbers(5, outputs, dtype=jnp.float32), "out_relu": True}
        epilogue["residual"] = residual
    out = run(shift_block.forward, *operands, **core, **epilogue)
    x, w1, b1, w2 = exact(*operands)
    y = shifted(rounded(np.maximum(x @ w1 + b1, 0)), core["dh"], core["dw"])
    expected = y[:, ::stride, ::stride] @ w2
    if whole:
        bias, residual = exact(epilogue["out_bias"], residual)
        expected = np.maximum(expected + bias, 0) + residual
    assert_rounded_once(out, expected)


@simulated
@pytest.mark.usefixtures("one_warpgroup")
@BLOCKS
def test_gradients_of_shift_block(image, channels, expanded, outputs, stride, dilation, whole):
    del whole
    operands, core = block_operands(image, channels, expanded, outputs, stride, dilation)
    n, height, width = image
    dout = numbers(4, n, height // stride, width // stride, outputs)
    found = run(shift_block.backward, *operands, dout, **core)
    assert_gradients(found, operands, shift_block_xla.forward, core, dout)


@simulated
@pytest.mark.usefixtures("one_warpgroup")
@pytest.mark.parametrize("stride", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_networks_of_several_seeds_have_their_blocks_in_one_kernel(stride):
    """Each with weights of its own, on images of its own; a tile is no whole part of its images."""
    runs, image = 3, (2, 4, 12)
    shapes = block_operands(image, 16, 32, 16, stride, 1)[0]
    operands = [numbers(i, runs, *v.shape, dtype=v.dtype) for i, v in enumerate(shapes)]
    dh, dw = channel_offsets(32)
    core = {"dh": dh, "dw": dw, "stride": stride}
    dout = numbers(4, runs, 2, 4 // stride, 12 // stride, 16)

    def both(*operands, interpret):
        out = shift_block.forward(*operands[:4], **core, interpret=interpret)
        return out, shift_block.backward(*operands, **core, interpret=interpret)

    def stacked(*operands, interpret):
        return jax.vmap(functools.partial(both, interpret=interpret))(*operands)

    out, gradients = run(stacked, *operands, dout)
    for i in range(runs):
        x, w1, b1, w2 = exact(*(operand[i] for operand in operands))
        y = shifted(rounded(np.maximum(x @ w1 + b1, 0)), dh, dw)[:, ::stride, ::stride]
        np.testing.assert_allclose(exact(out[i])[0], y @ w2, rtol=2**-7, atol=2e-2)
        mine = [operand[i] for operand in operands]
        found = [gradient[i] for gradient in gradients]
        assert_gradients(found, mine, shift_block_xla.forward, core, dout[i])


@simulated
@pytest.mark.slow
@pytest.mark.usefixtures("one_warpgroup")
def test_shift_block_of_learned_offsets():
    """As learned ones are: most channels do not move, the others go anywhere."""
    (x, w1, b1, w2), core = block_operands((2, 8, 8), 16, 160, 16, 1, 1)
    rng = np.random.default_rng(6)
    moves = rng.permutation(160) < 20
    core["dh"], core["dw"] = (np.where(moves, rng.integers(-3, 4, 160), 0) for _ in range(2))
    out = run(shift_block.forward, x, w1, b1, w2, **core)
    wide_x, wide_w1, wide_b1, wide_w2 = exact(x, w1, b1, w2)
    y = rounded(np.maximum(wide_x @ wide_w1 + wide_b1, 0))
    assert_rounded_once(out, shifted(y, core["dh"], core["dw"]) @ wide_w2)
    dout = numbers(4, 2, 8, 8, 16)
    found = run(shift_block.backward, x, w1, b1, w2, dout, **core)
    assert_gradients(found, (x, w1, b1, w2), shift_block_xla.forward, core, dout)


def assert_gradients(found, operands, forward, core, dout, whole_numbers=False):
    """Against those of plain XLA in float32, which rounds nothing on the way."""
    wide = [None if value is None else value.astype(jnp.float32) for value in operands]
    forward = functools.partial(forward, **core)
    expected = jax.vjp(forward, *wide)[1](dout.astype(jnp.float32))
    for value, a, b in zip(operands, found, expected, strict=True):
        if value is None:
            assert a is None
            continue
        assert (a.shape, a.dtype) == (value.shape, value.dtype)
        if whole_numbers:
            np.testing.assert_array_equal(exact(a)[0], exact(b.astype(a.dtype))[0])
            continue
        # A value in bfloat16 between is off by 2**-9 of itself; the sums are of many.
        np.testing.assert_allclose(exact(a)[0], b, rtol=2**-7, atol=2**-7 * np.abs(b).max())


@simulated
@pytest.mark.usefixtures("one_warpgroup")
@pytest.mark.parametrize(
    ("expanded", "kernel_size", "stride"),
    [
        pytest.param(18, 3, 1, id="2-channels-each"),
        pytest.param(
            *(80, 1, 2), id="80-channels-that-read-one-pixel-in-4", marks=pytest.mark.slow
        ),
    ],
)
def test_gradients_of_shift_block_are_exact(monkeypatch, expanded, kernel_size, stride):
    """Small whole numbers are exact in bfloat16, so that no rounding hides a wrong term."""
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 4)  # several shares of the pixels
    rng = np.random.default_rng(0)
    arrays = ((2, 8, 12, 16), (16, expanded), (expanded,), (expanded, 16))
    arrays = (*arrays, (2, 8 // stride, 12 // stride, 16))
    *operands, dout = (jnp.asarray(rng.integers(-1, 2, shape), jnp.bfloat16) for shape in arrays)
    dh, dw = channel_offsets(expanded, kernel_size)
    core = {"dh": dh, "dw": dw, "stride": stride}
    found = run(shift_block.backward, *operands, dout, **core)
    assert_gradients(found, operands, shift_block_xla.forward, core, dout, whole_numbers=True)


@simulated
@pytest.mark.parametrize(
    ("image", "channels", "outputs", "stride", "dilation", "whole"),
    [
        pytest.param(
            *((1, 16, 20), 144, 16, 1, 1, True),
            id="many-tiles-in-an-image",
            marks=pytest.mark.slow,
        ),
        pytest.param((8, 2, 5), 288, 16, 1, 2, False, id="offsets-outside"),
        pytest.param((4, 12, 12), 144, 32, 2, 1, True, id="stride-2-partly-filled-tiles"),
    ],
)
def test_shift_pointwise(monkeypatch, image, channels, outputs, stride, dilation, whole):
    monkeypatch.setattr(shift_pointwise, "_SHAPES", ((2, 64),))
    n, height, width = image
    x = numbers(0, *image, channels)
    w = numbers(1, channels, outputs, scale=channels**-0.5)
    dh, dw = (np.repeat(offset, channels // 9) for offset in channel_offsets(9, 3, dilation))
    vectors = {}
    if whole:
        size = {"scale": channels, "bias": channels, "out_scale": outputs, "out_bias": outputs}
        vectors = {
            name: numbers(i, length, dtype=jnp.float32)
            for i, (name, length) in enumerate(size.items(), 2)
        }
        vectors["residual"] = numbers(6, n, height // stride, width // stride, outputs)
    rest = dict(vectors)
    prologue = rest.pop("scale", None), rest.pop("bias", None)
    core = {"relu": whole, "out_relu": whole, "dh": dh, "dw": dw, "stride": stride}
    out = run(shift_pointwise.forward, x, w, *prologue, **core, **rest)
    x, w = exact(x, w)
    if whole:
        scale, bias, out_scale, out_bias, residual = exact(*vectors.values())
        x = np.maximum(rounded(x * scale + bias), 0)
    expected = shifted(x, dh, dw)[:, ::stride, ::stride] @ w
    if whole:
        expected = np.maximum(expected * out_scale + out_bias, 0) + residual
    assert_rounded_once(out, expected)


@simulated
@pytest.mark.usefixtures("one_warpgroup")
@pytest.mark.parametrize(
    ("image", "channels", "outputs", "stride", "dilation", "whole"),
    [
        pytest.param(
            *((1, 16, 20), 144, 16, 1, 1, True),
            id="many-tiles-in-an-image",
            marks=pytest.mark.slow,
        ),
        pytest.param((8, 3, 5), 288, 32, 1, 2, False, id="no-prologue-partly-filled-tile"),
        pytest.param((2, 16, 12), 144, 32, 2, 1, True, id="stride-2"),
    ],
)
def test_gradients_of_shift_pointwise_are_exact(
    monkeypatch, image, channels, outputs, stride, dilation, whole
):
    """Of small whole numbers: no rounding hides a wrong term."""
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 6)  # 2 shares of the pixels of 144 channels
    n, height, width = image
    rng = np.random.default_rng(0)
    arrays = (*image, channels), (channels, outputs), (channels,), (channels,)
    arrays = (*arrays, (n, height // stride, width // stride, outputs))
    x, w, scale, bias, dout = (jnp.asarray(rng.integers(-2, 3, a), jnp.bfloat16) for a in arrays)
    prologue = (scale, bias.astype(jnp.float32)) if whole else (None, None)
    dh, dw = (np.repeat(offset, channels // 9) for offset in channel_offsets(9, 3, dilation))
    core = {"relu": whole, "dh": dh, "dw": dw, "stride": stride}
    operands = x, w, *prologue
    found = run(shift_pointwise.backward, *operands, dout, **core)
    assert_gradients(found, operands, shift_pointwise_xla.forward, core, dout, whole_numbers=True)


@simulated
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation", "dtype"),
    [
        pytest.param((2, 17, 16, 16), 3, 1, "bfloat16", id="many-tiles-in-an-image"),
        pytest.param((3, 8, 8, 72), 3, 1, "float32", id="channels-in-two-parts"),
        pytest.param((1, 7, 5, 56), 5, 1, "bfloat16", id="25-offsets"),
        pytest.param((6, 5, 48), 3, 2, "bfloat16", id="no-batch-odd-numbers-of-channels"),
    ],
)
def test_shift_moves_every_bit(shape, kernel, dilation, dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(1, 256, shape), dtype)
    dh, dw = channel_offsets(shape[-1], kernel, dilation)
    y = run(shift.shift, x, dh=-dh, dw=-dw)  # the gradient's direction: any offsets will do
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    expected = shifted(exact(x)[0].reshape(-1, *shape[-3:]), -dh, -dw)
    np.testing.assert_array_equal(exact(y)[0], expected.reshape(shape))


@simulated
def test_a_nan_reaches_the_pixels_that_read_it_and_no_other(monkeypatch):
    monkeypatch.setattr(shift_block, "_SHAPES", ((1, 64),))
    x = numbers(0, 1, 8, 9, 16).at[0, 3, 8].set(jnp.nan)
    dh, dw = channel_offsets(144)
    weights = numbers(1, 16, 144), numbers(2, 144, dtype=jnp.float32), numbers(3, 144, 16)
    out = run(shift_block.forward, x, *weights, dh=dh, dw=dw, stride=1)
    expected = np.zeros((8, 9), bool)
    expected[2:5, 7:] = True
    np.testing.assert_array_equal(np.isnan(exact(out)[0][0]).all(-1), expected)
    assert np.isfinite(exact(out)[0][0][~expected]).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_lower_for_a_gpu_without_one(stride):
    """What a device runs differs from what the interpreter runs, and lowers with every JAX."""
    dh, dw = channel_offsets(144)
    core = {"dh": dh, "dw": dw, "stride": stride}
    grouped = {"dh": np.repeat(dh[:9], 16), "dw": np.repeat(dw[:9], 16), "stride": stride}
    small = 32 // stride
    x, expanded, w1, b1, w2, dout = shapes(
        *((8, 32, 32, 16), (8, 32, 32, 144), (16, 144), (144,), (144, 16)),
        (8, small, small, 16),
    )
    calls = [
        (functools.partial(shift_block.forward, **core), x, w1, b1, w2),
        (functools.partial(shift_block.backward, **core), x, w1, b1, w2, dout),
        (
            lambda x, w, v: shift_pointwise.forward(x, w, v, v, relu=True, **grouped),
            *(expanded, w2, b1),
        ),
        (
            lambda x, w, v, d: shift_pointwise.backward(x, w, v, v, d, relu=True, **grouped),
            *(expanded, w2, b1, dout),
        ),
        (functools.partial(shift.shift, dh=dh, dw=dw), expanded),
    ]
    for call, *arguments in calls:
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


def shapes(*arrays):
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in arrays]


@pytest.mark.parametrize(
    ("x", "expanded", "outputs", "stride", "reason"),
    [
        ((8, 8, 8, 16), 144, 16, 1, None),
        ((512, 32, 32, 16), 144, 32, 2, None),
        ((8, 8, 8, 24), 144, 16, 1, "x has 24 channels"),
        ((8, 8, 8, 16), 144, 10, 1, "w2 has 10 outputs"),
        ((8, 8, 8, 16), 144, 16, 3, "the stride is 3"),
        ((8, 7, 8, 16), 144, 16, 2, "an image of 7x8 pixels has an odd side"),
        ((1, 7, 7, 16), 144, 16, 1, "49 output pixels, not a multiple of 8"),
        ((0, 8, 8, 16), 144, 16, 1, "the batch is empty"),
        ((8, 8, 8, 64), 9 * 128, 64, 1, "do not fit into 232448 bytes"),
    ],
)
def test_shift_block_says_what_it_cannot_take(x, expanded, outputs, stride, reason):
    dh, dw = channel_offsets(expanded)
    x, w1, w2 = shapes(x, (x[-1], expanded), (expanded, outputs))
    core = {"dh": dh, "dw": dw, "stride": stride}
    found = shift_block.unsupported(x, w1, w2, **core)
    assert found is None if reason is None else reason in found
    if reason is not None:
        b1 = jax.ShapeDtypeStruct((expanded,), jnp.float32)
        with pytest.raises(ValueError, match="shift_block has no GPU kernel for this"):
            shift_block.forward(x, w1, b1, w2, **core)


@pytest.mark.parametrize(
    ("width", "kernels"), [pytest.param(32, 3, id="all"), pytest.param(512, 1, id="forward-only")]
)
def test_gradients_without_a_kernel_are_xla_s(width, kernels):
    dh, dw = channel_offsets(144)
    x, w1, b1, w2 = shapes((1, 8, width, 16), (16, 144), (144,), (144, 64))
    found = shift_block.unsupported(x, w1, w2, dh=dh, dw=dw, stride=1, backward=True)
    assert (found is None) == (kernels > 1)

    assert kernels_of_gradients(shift_block_operation, x, w1, b1, w2) == kernels


def kernels_of_gradients(operation, *operands):
    """How many kernels value and gradients have together."""

    def loss(*operands):
        return operation(*operands, implementation="gpu").astype(jnp.float32).sum()

    gradients = jax.jit(jax.value_and_grad(loss, range(len(operands))))
    text = gradients.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize(
    ("outputs", "dilation", "reason"),
    [
        (32, 1, None),
        (64, 1, "4 offsets to 64 outputs are more than 128 sums of a channel"),
        (16, 8, "some channels move out of the image"),
    ],
)
def test_gradients_of_shift_pointwise_without_a_kernel_are_xla_s(outputs, dilation, reason):
    operation = functools.partial(
        shift_pointwise_operation, dilation=dilation, channel_order="grouped"
    )
    x, w, dout = shapes((8, 8, 8, 144), (144, outputs), (8, 8, 8, outputs))
    assert kernels_of_gradients(operation, x, w) == (2 if reason is None else 1)
    if reason is not None:
        dh, dw = channel_offsets(144, 3, dilation, "grouped")
        with pytest.raises(ValueError, match=reason):
            shift_pointwise.backward(x, w, None, None, dout, relu=False, dh=dh, dw=dw, stride=1)


@pytest.mark.parametrize(
    ("x", "outputs", "grouped", "reason"),
    [
        ((8, 8, 8, 144), 16, True, None),
        ((8, 8, 8, 576), 64, True, None),
        ((8, 8, 8, 144), 16, False, "not side by side"),
        ((8, 8, 8, 72), 16, True, "8 channels move by the same offset"),
        ((8, 8, 8, 144), 10, True, "w has 10 outputs"),
        ((1, 7, 7, 144), 16, True, "49 output pixels"),
        ((8, 8, 8, 1152), 128, True, "do not fit into 232448 bytes"),
    ],
)
def test_shift_pointwise_says_what_it_cannot_take(x, outputs, grouped, reason):
    offsets = channel_offsets(x[-1])
    if grouped:
        offsets = (np.repeat(offset, x[-1] // 9) for offset in channel_offsets(9))
    dh, dw = offsets
    x, w = shapes(x, (x[-1], outputs))
    found = shift_pointwise.unsupported(x, w, relu=True, dh=dh, dw=dw, stride=1)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("shape", "dtype", "dilation", "reason"),
    [
        ((8, 32, 32, 144), "bfloat16", 1, None),
        ((8, 8, 8, 64), "float32", 1, None),
        ((8, 8, 8, 20), "bfloat16", 1, "40 bytes, not a multiple of 16"),
        ((8, 8, 8, 16), "int8", 1, "x is int8"),
        ((0, 8, 8, 16), "bfloat16", 1, "x is empty"),
        ((8, 8, 8, 16), "bfloat16", 9, "larger than the image"),
        ((8, 8, 8, 320), "bfloat16", 1, "do not repeat within 248 channels"),
        ((8, 512, 512, 64), "bfloat16", 2, "do not fit into 232448 bytes"),
    ],
)
def test_shift_says_what_it_cannot_take(shape, dtype, dilation, reason):
    found = shift.unsupported(shape, jnp.dtype(dtype), *channel_offsets(shape[-1], 3, dilation))
    assert found is None if reason is None else reason in found
