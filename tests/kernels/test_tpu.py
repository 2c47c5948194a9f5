"""The TPU kernels' numbers, interpreted on the CPU, against a plain restatement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from shiftnet.kernels.shift import tpu as shift_tpu
from shiftnet.kernels.shift.offsets import channel_offsets
from shiftnet.kernels.shift_block import tpu as block_tpu
from shiftnet.kernels.shift_pointwise import tpu as pointwise_tpu

# Memory that nothing was written to holds NaN, as it may on the chip.
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")

# H, W, C, E, K, N, kernel_size, dilation, stride, dtype: few channels and no multiples of 9, odd
# sizes, images smaller than the shift, more than one tile of images, groups of no multiple of 8.
CASES = [
    (3, 4, 3, 18, 5, 128, 3, 1, 1, "float32"),
    (5, 3, 4, 20, 5, 128, 3, 1, 2, "float32"),
    (1, 2, 4, 20, 5, 128, 3, 2, 1, "float32"),
    (2, 3, 4, 7, 3, 128, 3, 1, 2, "float32"),
    (3, 3, 5, 26, 4, 128, 5, 1, 2, "bfloat16"),
    (3, 4, 9, 27, 8, 256, 2, 1, 3, "bfloat16"),
    (2, 2, 9, 29, 5, 384, 3, 1, 1, "bfloat16"),
]


def named(cases, slow=()):
    return [
        pytest.param(
            case,
            id="{}x{}x{}-{}-{}x{} k{}d{}s{} {}".format(*case),
            marks=[pytest.mark.slow] * (number in slow),
        )
        for number, case in enumerate(cases)
    ]


def run(f, *operands):
    """Compiled, but not well: most of these tests' time is the CPU's compiler."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})(*operands)


def plain_shift(x, dh, dw):
    height, width, channels, _ = x.shape
    h, w = np.arange(height)[:, None, None] + dh, np.arange(width)[:, None] + dw
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    values = x[h.clip(0, height - 1), w.clip(0, width - 1), np.arange(channels)]
    return jnp.where(inside[..., None], values, jnp.zeros((), x.dtype))


def plain(x, w1, scale, bias, w2, relu, dh, dw, stride):
    """What the kernels compute, up to the epilogue, in float32 but for y as the kernels keep it."""
    y = x.astype(jnp.float32)
    y = y if w1 is None else jnp.einsum("hwcn,ce->hwen", y, w1.astype(jnp.float32))
    y = y if scale is None else y * scale[:, None]
    y = y if bias is None else y + bias[:, None]
    y = jax.nn.relu(y) if relu else y
    y = y.astype(x.dtype).astype(jnp.float32)
    y = plain_shift(y, dh, dw)[::stride, ::stride]
    return jnp.einsum("hwen,ek->hwkn", y, w2.astype(jnp.float32)).astype(x.dtype)


@functools.cache
def arrays(case):
    height, width, channels, expanded, outputs, batch, _, _, stride, dtype = case
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "x": normal(height, width, channels, batch),
        "wide_x": normal(height, width, expanded, batch),
        "w1": normal(channels, expanded),
        "w2": normal(expanded, outputs),
        "scale": normal(expanded, dtype="float32"),
        "bias": normal(expanded, dtype="float32"),
        "out_scale": normal(outputs, dtype="float32"),
        "out_bias": normal(outputs, dtype="float32"),
        "dout": normal(-(-height // stride), -(-width // stride), outputs, batch),
    }


def offsets(case):
    *_, expanded, _, _, kernel_size, dilation, _, _ = case
    return channel_offsets(expanded, kernel_size, dilation)


def assert_close(ours, theirs, terms):
    """To a rounding of the largest value, and to those of a float32 sum of so many terms."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    tolerance = float(jnp.finfo(ours.dtype).eps + jnp.finfo(jnp.float32).eps * np.sqrt(terms))
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def check(forward, backward, restated, operands, dout, terms):
    """Compares a kernel and its gradients with those of `restated`."""

    def theirs(dout, *operands):
        y, vjp = jax.vjp(restated, *operands)
        return y, vjp(dout)

    def ours(dout, *operands):
        return forward(*operands), backward(*operands, dout)

    (y, grads), (expected, expected_grads) = (
        run(ours, dout, *operands),
        run(theirs, dout, *operands),
    )
    assert_close(y, expected, terms)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, terms=dout.size // dout.shape[2])


@pytest.mark.parametrize("case", named(CASES[:5] + CASES[6:], slow=[0, 2, 3, 5]))
def test_block_and_its_gradients(case):
    a, (dh, dw), stride = arrays(case), offsets(case), case[8]
    where = {"dh": dh, "dw": dw, "stride": stride, "interpret": INTERPRET}
    check(
        functools.partial(block_tpu.forward, **where),
        functools.partial(block_tpu.backward, **where),
        lambda x, w1, b1, w2: plain(x, w1, None, b1, w2, True, dh, dw, stride),
        [a[name] for name in ("x", "w1", "bias", "w2")],
        a["dout"],
        terms=case[3],
    )


@pytest.mark.parametrize("case", named([CASES[1], CASES[5]], slow=[0]))
def test_pointwise_and_its_gradients(case):
    a, (dh, dw), stride = arrays(case), offsets(case), case[8]
    where = {"relu": True, "dh": dh, "dw": dw, "stride": stride, "interpret": INTERPRET}
    check(
        functools.partial(pointwise_tpu.forward, **where),
        functools.partial(pointwise_tpu.backward, **where),
        lambda x, w, scale, bias: plain(x, None, scale, bias, w, True, dh, dw, stride),
        [a[name] for name in ("wide_x", "w2", "scale", "bias")],
        a["dout"],
        terms=case[3],
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_pointwise_without_prologue_in_any_order_of_channels(grouped):
    """Contiguous groups of whole tiles are used as they lie; any other order is sorted."""
    dh, dw = np.repeat([-1, 0, 2, 7], 8), np.repeat([1, 0, -1, 0], 8)  # the last leaves the image
    order = np.arange(32) if grouped else np.random.default_rng(1).permutation(32)
    dh, dw = dh[order][: 24 if grouped else 32], dw[order][: 24 if grouped else 32]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, len(dh), 128)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(len(dh), 5)), jnp.float32)
    dout = jnp.asarray(rng.normal(size=(3, 2, 5, 128)), jnp.float32)
    where = {"relu": False, "dh": dh, "dw": dw, "stride": 1, "interpret": INTERPRET}

    def backward(x, w, dout):
        dx, dweight, dscale, dbias = pointwise_tpu.backward(x, w, None, None, dout, **where)
        assert dscale is None
        assert dbias is None
        return dx, dweight

    check(
        lambda x, w: pointwise_tpu.forward(x, w, None, None, **where),
        backward,
        lambda x, w: plain(x, None, None, None, w, False, dh, dw, 1),
        [x, w],
        dout,
        terms=len(dh),
    )


@pytest.mark.parametrize("case", named([CASES[1], CASES[4]], slow=[0]))
def test_epilogue_is_scale_bias_relu_and_residual_in_this_order(case):
    a, (dh, dw), stride = arrays(case), offsets(case), case[8]
    where = {"dh": dh, "dw": dw, "stride": stride}
    after = {"out_bias": a["out_bias"], "out_relu": True, "residual": a["dout"]}
    more = {"out_scale": a["out_scale"], **after}

    def ours(x, wide_x, w1, bias, w2):
        kernel = {**where, "interpret": INTERPRET}
        block = block_tpu.forward(x, w1, bias, w2, **after, **kernel)
        return block, pointwise_tpu.forward(wide_x, w2, None, None, relu=False, **more, **kernel)

    def theirs(x, wide_x, w1, bias, w2):
        # In float32 up to the end, as the kernels have it.
        x, wide_x, w1, w2, residual = (
            array.astype(jnp.float32) for array in (x, wide_x, w1, w2, a["dout"])
        )
        scale, shift = a["out_scale"][:, None], a["out_bias"][:, None]
        block = plain(x, w1, None, bias, w2, relu=True, **where)
        pointwise = plain(wide_x, None, None, None, w2, relu=False, **where)
        results = jax.nn.relu(block + shift), jax.nn.relu(pointwise * scale + shift)
        return [(result + residual).astype(a["dout"].dtype) for result in results]

    operands = [a[name] for name in ("x", "wide_x", "w1", "bias", "w2")]
    for our, their in zip(run(ours, *operands), run(theirs, *operands), strict=True):
        assert_close(our, their, terms=case[3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "kernel_size", "dilation", "sign"),
    [
        ((3, 4, 20, 128), 3, 1, 1),
        ((1, 2, 18, 128), 3, 2, 1),
        ((3, 2, 7, 128), 3, 1, -1),
        ((2, 3, 21, 384), 2, 1, -1),
        ((2, 2, 9, 256), 3, 100, 1),
    ],
)
@pytest.mark.covering
def test_shift_moves_every_bit(shape, kernel_size, dilation, sign, dtype):
    x = np.random.default_rng(0).normal(size=shape)
    x[0, 0, ::3], x[-1, -1, 1::3], x[0, -1, 2::3] = np.nan, -np.inf, -0.0
    x = jnp.asarray(x, dtype)
    dh, dw = (sign * offset for offset in channel_offsets(shape[2], kernel_size, dilation))
    y = run(lambda x: shift_tpu.shift(x, dh, dw, interpret=INTERPRET), x)
    bits = f"uint{8 * x.dtype.itemsize}"
    expected = run(lambda x: plain_shift(x, dh, dw), x)
    np.testing.assert_array_equal(y.view(bits), expected.view(bits))


class TestUnsupported:
    """Each reason is one clause that a sentence can end with."""

    def ask(self, shape, dtype="bfloat16", expanded=144, backward=True):
        x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        w1 = jax.ShapeDtypeStruct((shape[2], expanded), x.dtype)
        w2 = jax.ShapeDtypeStruct((expanded, 16), x.dtype)
        wide_x = jax.ShapeDtypeStruct((*shape[:2], expanded, shape[3]), x.dtype)
        dh, dw = channel_offsets(expanded)
        where = {"dh": dh, "dw": dw, "stride": 1, "backward": backward}
        return [
            block_tpu.unsupported(x, w1, w2, **where),
            pointwise_tpu.unsupported(wide_x, w2, relu=True, **where),
            shift_tpu.unsupported(wide_x.shape, x.dtype, dh, dw),
        ]

    @pytest.mark.parametrize("shape", [(32, 32, 16, 128), (8, 8, 64, 512), (1, 1, 3, 256)])
    def test_nothing(self, shape):
        assert self.ask(shape) == [None] * 3

    @pytest.mark.parametrize("batch", [1, 100, 129])
    def test_batch(self, batch):
        assert set(self.ask((8, 8, 3, batch))) == {f"the batch is {batch}, not a multiple of 128"}

    def test_dtype(self):
        reason = "the dtype is float16, not float32 or bfloat16"
        assert set(self.ask((8, 8, 3, 128), "float16")) == {reason}

    def test_nothing_to_compute(self):
        for reason in self.ask((8, 8, 3, 0)):
            assert "without any element" in reason

    def test_chip_too_small(self):
        block, pointwise, _ = self.ask((32, 32, 160, 128), expanded=2304)
        assert block == pointwise
        assert "rows of 32 pixels of 2304 channels do not fit" in block
        block, *_ = self.ask((32, 32, 160, 128), expanded=2304, backward=False)
        assert block is None
        assert "do not fit" in self.ask((500, 500, 3, 128), expanded=144)[2]

    def test_offsets_that_leave_the_image(self):
        x, w = jax.ShapeDtypeStruct((1, 1, 9, 128), jnp.float32), jnp.zeros((9, 2))
        far = np.full(9, 3)
        reason = pointwise_tpu.unsupported(x, w, relu=False, dh=far, dw=far, stride=1)
        assert reason == "every channel moves out of the image"
