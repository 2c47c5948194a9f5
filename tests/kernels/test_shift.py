"""The shift, against a plain restatement of its formula and against the original's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftnet.kernels.implementations import lowered_for, only_xla
from shiftnet.kernels.shift import Offsets, channel_offsets, shift
from tests import oracle
from tests.networks import channels_first, channels_last

pytestmark = pytest.mark.core

IMPLEMENTATIONS = ["gather", "select"]  # the kernels have test_tpu.py and test_gpu.py
DTYPES = ["float32", "bfloat16", "float64"]

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def formula(x: np.ndarray, k: int, d: int, sign: int = 1) -> np.ndarray:
    """The rule of the original's CUDA layer, value by value; `sign=-1` gives the gradient."""
    *_, height, width, channels = x.shape
    y = np.zeros_like(x)
    for c in range(channels):
        dh = dw = 0
        if c < channels // k**2 * k**2:
            dh = sign * d * ((c // k) % k - k // 2)
            dw = sign * d * (c % k - k // 2)
        for h in range(height):
            for w in range(width):
                if 0 <= h + dh < height and 0 <= w + dw < width:
                    y[..., h, w, c] = x[..., h + dh, w + dw, c]
    return y


jitted_shift = jax.jit(shift, static_argnums=(1, 2), static_argnames="implementation")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def forward_and_vjp(x, cotangent, k, d, implementation):
    """The shift of `x`, and the gradient that `cotangent` gives."""
    y, vjp = jax.vjp(lambda x: shift(x, k, d, implementation=implementation), x)
    return y, vjp(cotangent)[0]


def assert_same_bits(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(
        np.ascontiguousarray(ours).view(np.uint8), np.ascontiguousarray(theirs).view(np.uint8)
    )


def whole_numbers(shape, seed=0, dtype=np.float32) -> np.ndarray:
    """Values that any dtype holds exactly, and that add up exactly."""
    return np.random.default_rng(seed).integers(1, 100, shape).astype(dtype)


@oracle.every_case("shift")
@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("float64")
@pytest.mark.covering
def test_moves_every_bit_where_the_original_does(name, dtype, implementation):
    case = oracle.case("shift", name)
    x, cotangent, y, grad = (
        jnp.asarray(channels_last(case.arrays[key])).astype(dtype)
        for key in ("x", "cotangent", "y", "grad_x")
    )
    k, d = case.hyper["kernel_size"], case.hyper["dilate_factor"]
    ours = forward_and_vjp(x, cotangent, k, d, implementation)
    assert_same_bits(ours[0], y)
    assert_same_bits(ours[1], grad)


@each_implementation
def test_moves_where_the_original_does_in_a_clone(implementation):
    golden = oracle.read(oracle.GOLDEN / "shift_k3d1_c20_7x9.npz")
    x = whole_numbers((1, 20, 7, 9))
    for table, ours in zip(
        (golden["y_from"], golden["grad_from"]),
        forward_and_vjp(*[jnp.asarray(channels_last(x))] * 2, 3, 1, implementation),
        strict=True,
    ):
        expected = np.where(table >= 0, x.ravel()[table], np.float32(0))
        np.testing.assert_array_equal(channels_first(ours), expected)


@st.composite
def arguments(draw):
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    channels = draw(st.integers(1, 40))
    k, d = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([np.float32, jnp.bfloat16, np.int32, np.uint8]))
    return whole_numbers((*batch, height, width, channels), k * 100 + d, dtype), k, d


@each_implementation
@settings(max_examples=40)
@given(arguments())
def test_follows_the_formula_for_any_kernel_dilation_and_shape(implementation, drawn):
    x, k, d = drawn
    y = jitted_shift(jnp.asarray(x), k, d, implementation=implementation)
    assert_same_bits(y, formula(x, k, d))


@each_implementation
@settings(max_examples=20)
@given(arguments())
def test_gradient_is_the_adjoint_of_the_forward_pass(implementation, drawn):
    x, k, d = drawn
    x = x.astype(np.float32)
    cotangent = whole_numbers(x.shape, seed=1)
    y, grad = forward_and_vjp(jnp.asarray(x), jnp.asarray(cotangent), k, d, implementation)
    assert_same_bits(grad, formula(cotangent, k, d, sign=-1))
    in_float64 = [np.asarray(a, np.float64) for a in (y, cotangent, x, grad)]
    assert np.vdot(*in_float64[:2]) == np.vdot(*in_float64[2:])


@each_implementation
@pytest.mark.parametrize("k", [2, 4])
def test_even_kernels_reach_one_pixel_further_up_and_left(implementation, k):
    dh, dw = channel_offsets(k * k, k)
    assert (dh.min(), dh.max()) == (dw.min(), dw.max()) == (-k // 2, k // 2 - 1)
    x = whole_numbers((1, 5, 5, k * k))
    assert_same_bits(shift(jnp.asarray(x), k, implementation=implementation), formula(x, k, 1))


@each_implementation
def test_kernel_of_one_moves_nothing(implementation):
    x = whole_numbers((2, 3, 4, 5))
    assert_same_bits(shift(jnp.asarray(x), 1, 3, implementation=implementation), x)


@each_implementation
def test_offsets_beyond_the_image_give_zeros(implementation):
    x = whole_numbers((1, 4, 3, 9))
    y = np.asarray(shift(jnp.asarray(x), 3, 100, implementation=implementation))
    assert_same_bits(y[..., 4], x[..., 4])  # the centre
    assert not np.delete(y, 4, axis=-1).any()


def test_offsets_beyond_int32_give_zeros_too():
    assert shift(jnp.ones((1, 3, 3, 81)), 9, 2**30).sum() == 9  # of the channel that stays
    assert shift(jnp.ones((1, 3, 3, 9)), 3, 2**31).sum() == 9
    assert not shift(jnp.ones((1, 3, 3, 1)), offsets=((2**31,), (0,))).any()


@each_implementation
def test_infinities_and_nans_stay_in_their_places(implementation):
    x = whole_numbers((1, 4, 4, 9))
    x[0, 0, 0], x[0, 3, 3] = np.nan, -np.inf
    y = np.asarray(shift(jnp.asarray(x), 3, implementation=implementation))
    np.testing.assert_array_equal(y, formula(x, 3, 1))


def test_channel_offsets_are_dealt_out_in_turn():
    dh, dw = channel_offsets(11, 3, 2)
    assert dw.tolist() == [-2, 0, 2, -2, 0, 2, -2, 0, 2, 0, 0]
    assert dh.tolist() == [-2, -2, -2, 0, 0, 0, 2, 2, 2, 0, 0]


@each_implementation
def test_jit_and_vmap_change_nothing(implementation):
    x, cotangent = whole_numbers((3, 2, 5, 4, 18)), whole_numbers((3, 2, 5, 4, 18), seed=1)

    def both(x, cotangent):
        return forward_and_vjp(x, cotangent, 3, 1, implementation)

    for y, grad in (
        both(x, cotangent),
        jax.vmap(both)(x, cotangent),
        jax.vmap(both, in_axes=1, out_axes=1)(x, cotangent),
    ):
        assert_same_bits(y, formula(x, 3, 1))
        assert_same_bits(grad, formula(cotangent, 3, 1, sign=-1))


@each_implementation
def test_can_be_differentiated_twice(implementation):
    x = jnp.asarray(whole_numbers((1, 4, 4, 9)))
    y = formula(np.asarray(x), 3, 1)

    def loss(x):
        return (shift(x, implementation=implementation) ** 3).sum()

    def squared_gradient(x):
        return (jax.grad(loss)(x) ** 2).sum() / 36

    # The shift permutes or drops, so each value that stays inside contributes x^4 / 4.
    np.testing.assert_allclose(
        jax.grad(squared_gradient)(x), formula(y**3, 3, 1, sign=-1), rtol=1e-6
    )


@pytest.mark.parametrize("offsets", [None, ([3, 0, -1, 0, -2], [0, 2, 1, -3, 0])])
def test_the_convolution_in_onnx_programs_is_the_shift(offsets):
    x = jnp.asarray(whole_numbers((2, 5, 4, 23 if offsets is None else 5)))
    offsets = offsets and Offsets(*offsets)
    with only_xla(), lowered_for("onnx"):
        found = shift(x, 3, offsets=offsets)
        program = jax.make_jaxpr(lambda x: shift(x, 3, offsets=offsets))(x)
    assert "conv_general_dilated" in str(program)
    np.testing.assert_array_equal(found, shift(x, 3, offsets=offsets))


@pytest.mark.parametrize(("platform", "gathers"), [("cpu", True), ("cuda", True), ("tpu", False)])
def test_each_platform_gets_the_implementation_it_is_fast_with(platform, gathers):
    x = jax.ShapeDtypeStruct((1, 8, 8, 9), jnp.float32)
    lowered = jax.jit(shift).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert ("gather" in lowered) == gathers


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        ((4, 4), {}, r"at least 3 dimensions, got \(4, 4\)"),
        ((4, 4, 9), {"kernel_size": 0}, "kernel_size and dilation of at least 1.*kernel_size 0"),
        ((4, 4, 9), {"kernel_size": -3}, "at least 1.*kernel_size -3"),
        ((4, 4, 9), {"dilation": 0}, "at least 1.*dilation 0"),
        ((4, 4, 9), {"implementation": "fast"}, "unknown implementation 'fast'.*gather, select"),
    ],
)
def test_bad_arguments_are_named(shape, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        shift(jnp.zeros(shape), **settings)


@each_implementation
def test_accepts_an_empty_batch(implementation):
    x = jnp.zeros((0, 4, 4, 9))
    assert shift(x, implementation=implementation).shape == x.shape


@pytest.mark.parametrize("channels", [1, 8, 9, 20, 27])
@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.covering
def test_grouped_channels_are_the_interleaved_ones_permuted(channels, kernel_size):
    dh, dw = channel_offsets(channels, kernel_size, 2)
    each, positions = channels // kernel_size**2, kernel_size**2
    order = [g + i * positions for g in range(positions) for i in range(each)]
    order += range(each * positions, channels)
    grouped = channel_offsets(channels, kernel_size, 2, "grouped")
    np.testing.assert_array_equal(grouped, (dh[order], dw[order]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, channels)).astype(np.float32))
    expected = shift(x, kernel_size, 2)[..., np.array(order)]
    found = shift(x[..., np.array(order)], kernel_size, 2, channel_order="grouped")
    np.testing.assert_array_equal(found, expected)


@each_implementation
def test_takes_any_whole_offset_of_every_channel(implementation):
    dh, dw = np.random.default_rng(0).integers(-6, 7, (2, 23)).tolist()
    x, cotangent = whole_numbers((2, 5, 4, 23)), whole_numbers((2, 5, 4, 23), seed=1)
    y, vjp = jax.vjp(
        lambda x: shift(x, offsets=Offsets(dh, dw), implementation=implementation), jnp.asarray(x)
    )
    expected, gradient = np.zeros_like(x), np.zeros_like(x)
    for h, w, c in np.ndindex(5, 4, 23):
        there = h + dh[c], w + dw[c]
        if 0 <= there[0] < 5 and 0 <= there[1] < 4:
            expected[:, h, w, c] = x[:, *there, c]
            gradient[:, *there, c] = cotangent[:, h, w, c]
    assert_same_bits(y, expected)
    assert_same_bits(vjp(jnp.asarray(cotangent))[0], gradient)
    with pytest.raises(ValueError, match="two offsets for each of 23 channels, got 22 and 23"):
        shift(jnp.asarray(x), offsets=Offsets(dh[1:], dw))
    with pytest.raises(ValueError, match="whole numbers"):
        shift(jnp.asarray(x), offsets=Offsets([0.5, *dh[1:]], dw))
