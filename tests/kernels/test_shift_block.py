"""The shift block's loops in C++ against its layers in NumPy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.kernels import native
from shiftnet.kernels.operation import choices
from shiftnet.kernels.shift.offsets import channel_offsets
from shiftnet.kernels.shift_block import shift_block

pytestmark = pytest.mark.skipif(
    native.load().library is None, reason=f"no C++ compiler: {native.load().reason}"
)
GRADIENTS = ("x", "w1", "b1", "w2")


def operands(seed, images, height, width, inputs, expanded, outputs, stride, leading=()):
    rng = np.random.default_rng(seed)
    out = (images, -(-height // stride), -(-width // stride), outputs)
    shapes = {
        "x": (images, height, width, inputs),
        "w1": (inputs, expanded),
        "b1": (expanded,),
        "w2": (expanded, outputs),
        "out_bias": (outputs,),
        "residual": out,
        "dy": out,
    }
    return {
        name: rng.standard_normal((*leading, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def by_layers(a, dh, dw, stride):
    """The second product and the gradients, each pixel of each channel looked up by itself."""
    a = {name: value.astype(np.float64) for name, value in a.items()}
    x, dy = a["x"], a["dy"]
    height, width = x.shape[1:3]
    before = x @ a["w1"] + a["b1"]
    rows = np.arange(0, height, stride)[:, None] + dh  # [H', E]
    columns = np.arange(0, width, stride)[:, None] + dw
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    at = np.ix_(np.arange(len(x)), range(len(rows)), range(len(columns)), range(len(dh)))
    i, j = np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)[None]
    place = (at[0], i[None], j[None], at[3])
    shifted = np.where(inside, np.maximum(before, 0)[place], 0)
    y = shifted @ a["w2"]
    dbefore = np.zeros_like(before)
    np.add.at(dbefore, place, np.where(inside, dy @ a["w2"].T, 0))
    dbefore *= before > 0
    return y, {
        "x": dbefore @ a["w1"].T,
        "w1": np.einsum("nhwc,nhwe->ce", x, dbefore),
        "b1": dbefore.sum((0, 1, 2)),
        "w2": np.einsum("nhwe,nhwk->ek", shifted, dy),
    }


def ours(a, after=(), **settings):
    """The result, with what is to come after it, and the gradients without."""

    def block(*arrays):
        return shift_block(*arrays, implementation="cpu", **settings)

    arrays = [a[name] for name in GRADIENTS]
    after = {name: a[name] for name in after}
    y = jax.jit(block)(*arrays)
    gradients = jax.jit(lambda arrays, dy: jax.vjp(block, *arrays)[1](dy))(arrays, a["dy"])
    if after:
        relu = "out_bias" in after
        y = jax.jit(
            lambda arrays, after: shift_block(
                *arrays, implementation="cpu", out_relu=relu, **settings, **after
            )
        )(arrays, after)
    return np.asarray(y), dict(zip(GRADIENTS, map(np.asarray, gradients), strict=True))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("shape", "kernel_size", "dilation"),
    [
        ((3, 8, 8, 16, 16, 16, 1), 3, 1),
        ((2, 9, 7, 5, 23, 11, 1), 3, 1),  # nothing is a whole vector
        ((2, 9, 7, 5, 50, 11, 2), 3, 1),  # four phases
        ((2, 6, 5, 3, 70, 4, 3), 5, 2),  # offsets longer than an image's half
        ((2, 3, 3, 4, 40, 7, 1), 7, 3),  # most offsets are beyond the image
        ((2, 2, 1, 4, 40, 7, 4), 3, 1),  # phases without a pixel
        ((40, 8, 8, 4, 10, 4, 1), 3, 1),  # more images than parts of the sums
    ],
)
@pytest.mark.parametrize("after", [(), ("residual",), ("out_bias", "residual")])
@pytest.mark.covering
def test_values_and_gradients_are_the_layers(shape, kernel_size, dilation, after):
    a, stride = operands(0, *shape), shape[-1]
    dh, dw = channel_offsets(shape[4], kernel_size, dilation)
    y, gradients = ours(a, after, stride=stride, kernel_size=kernel_size, dilation=dilation)
    expected_y, expected = by_layers(a, dh, dw, stride)
    if "out_bias" in after:
        expected_y = np.maximum(expected_y + a["out_bias"], 0)
    if "residual" in after:
        expected_y = expected_y + a["residual"]
    assert_close(y, expected_y)
    for name in GRADIENTS:
        assert_close(gradients[name], expected[name])


def test_learned_offsets_in_any_order_are_followed():
    a = operands(1, 2, 6, 6, 4, 37, 5, 2)
    rng = np.random.default_rng(2)
    dh, dw = rng.integers(-7, 8, (2, 37))
    offsets = (tuple(dh.tolist()), tuple(dw.tolist()))
    y, gradients = ours(a, stride=2, offsets=offsets)
    expected_y, expected = by_layers(a, dh, dw, 2)
    assert_close(y, expected_y)
    for name in GRADIENTS:
        assert_close(gradients[name], expected[name])


def test_stacked_networks_are_computed_one_by_one():
    a = operands(3, 4, 5, 5, 6, 18, 7, 1, leading=(3,))

    def both(x, w1, b1, w2, dy):
        y, pull = jax.vjp(functools.partial(shift_block, implementation="cpu"), x, w1, b1, w2)
        return y, *pull(dy)

    arrays = [a[name] for name in (*GRADIENTS, "dy")]
    together = jax.jit(jax.vmap(both))(*arrays)
    for i in range(3):
        alone = jax.jit(both)(*(array[i] for array in arrays))
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found[i], expected)


def test_no_images_have_gradients_of_zero():
    a = operands(0, 0, 5, 5, 6, 18, 7, 1)
    y, gradients = ours(a)
    assert y.shape == (0, 5, 5, 7)
    assert not any(gradients[name].any() for name in ("w1", "b1", "w2"))


def test_a_stride_far_beyond_the_images_is_left_to_xla():
    a = {name: jnp.asarray(value) for name, value in operands(0, 1, 4, 4, 3, 9, 2, 5000).items()}
    arrays = [a[name] for name in GRADIENTS]
    assert shift_block(*arrays, stride=5000).shape == (1, 1, 1, 2)
    with pytest.raises(ValueError, match="the stride is more than 1024"):
        shift_block(*arrays, stride=5000, implementation="cpu")


def test_what_is_not_a_number_stays_so():
    a = operands(0, 1, 4, 4, 3, 9, 2, 1)
    a["x"][0, 1, 2] = np.nan
    y, gradients = ours(a)
    assert np.isnan(y[0, 1, 2]).all()
    assert np.isnan(gradients["w2"]).any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_all_but_float64_is_computed_by_the_library(dtype):
    a = operands(0, 2, 4, 4, 3, 9, 2, 1)
    arrays = [jnp.asarray(a[name], dtype) for name in GRADIENTS]
    with choices() as seen:
        text = str(jax.make_jaxpr(shift_block)(*arrays))
    assert seen == ["shift_block: cpu"]
    assert ("shiftnet_shift_block" in text) == (dtype != jnp.float64)
