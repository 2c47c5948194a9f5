"""Batch norm in C++ on a CPU, with what follows it, against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from shiftnet.kernels import implementations
from shiftnet.kernels.batch_norm import batch_norm
from shiftnet.kernels.operation import choices
from tests.kernels.test_conv import needs_library

EPSILON = 1e-5


def operands(shape, seed=0, centre=0.0):
    """Random `x`, scale, bias, residual and the result's gradient."""
    rng = np.random.default_rng(seed)
    x, residual, dy = (rng.standard_normal(shape, np.float32) for _ in range(3))
    scale, bias = (rng.standard_normal(shape[-1:], np.float32) for _ in range(2))
    return x + np.float32(centre), scale, bias, residual, dy


def by_formula(x, scale, bias, residual, dy, relu):
    """Result, mean, variance and gradients in float64; `relu` is which ReLU there is."""
    x, scale, bias, residual, dy = (
        np.asarray(a, np.float64) for a in (x, scale, bias, residual, dy)
    )
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    mean, var = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(var + EPSILON)
    normalized = (x - mean) * inverse
    value = normalized * scale + bias
    if relu == "last":
        y = np.maximum(value + residual, 0)
        dresidual = g = np.where(value + residual > 0, dy, 0)
    else:
        y = (np.maximum(value, 0) if relu else value) + residual
        dresidual, g = dy, np.where(value > 0, dy, 0) if relu else dy
    dbias, dscale = g.sum(axes), (g * normalized).sum(axes)
    dx = scale * inverse * (g - dbias / count - normalized * dscale / count)
    return y, mean, var, dx, dscale, dbias, dresidual


def found(x, scale, bias, residual, dy, relu, implementation="cpu"):
    """What the operation makes of it."""

    @jax.jit
    def run(x, scale, bias, residual, dy):
        def apply(x, scale, bias, residual):
            y, *statistics = batch_norm(
                x,
                scale,
                bias,
                epsilon=EPSILON,
                out_relu=relu,
                residual=residual,
                implementation=implementation,
            )
            return y, statistics

        y, pull, statistics = jax.vjp(apply, x, scale, bias, residual, has_aux=True)
        return y, *statistics, *pull(dy)

    return run(x, scale, bias, residual, dy)


NAMES = ("y", "mean", "var", "dx", "dscale", "dbias", "dresidual")


def check(arrays, relu):
    x, scale, _, residual, dy = arrays
    variance = x.astype(np.float64).var(tuple(range(x.ndim - 1)))
    # A value that rounding may move over the ReLU's zero has either gradient.
    normalized = by_formula(*arrays, False)[0] - residual
    before = normalized + residual if relu == "last" else normalized
    close = np.abs(before) < 1e-4 * (1 + np.abs(x).max())
    if relu and close.any():
        arrays = (*arrays[:4], np.where(close, 0, dy).astype(np.float32))
    for name, ours, expected in zip(
        NAMES, found(*arrays, relu), by_formula(*arrays, relu), strict=True
    ):
        assert ours.dtype == jnp.float32
        largest = np.abs(expected).max(initial=1e-6)
        if name == "dx":  # the terms that it is the difference of
            largest = np.abs(dy * scale / np.sqrt(variance + EPSILON)).max()
        np.testing.assert_allclose(ours / largest, expected / largest, atol=2e-5, err_msg=name)


SHAPES = [
    (4, 16, 16, 16),
    (3, 7, 5, 9),  # a period of nine vectors, and pixels after the last whole one
    (2, 5, 3, 42),
    (64, 100),  # no images
    (2, 3, 3, 640),
    (1, 3, 3, 2050),
    (5, 3),  # less than a period
    (130, 33, 32, 3),  # several chunks in a part
]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("relu", [False, True, "last"])
def test_values_and_gradients_are_the_formulas(shape, relu):
    check(operands(shape), relu)


@needs_library
@settings(max_examples=25)
@given(
    st.tuples(st.integers(2, 40), st.integers(1, 9), st.integers(1, 70)),
    st.sampled_from((False, True, "last")),
    st.integers(0, 9),
)
def test_any_shape_is_right(shape, relu, seed):
    check(operands(shape, seed), relu)


@needs_library
def test_values_far_from_zero_lose_no_digits():
    x, *rest = operands((64, 8, 8, 16), centre=1000.0)
    _, mean, var, *_ = found(x, *rest, False)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-5)


@needs_library
@pytest.mark.parametrize("relu", [False, True])
def test_without_an_addition_nothing_is_added(relu):
    x, scale, bias, residual, _ = operands((2, 6, 5, 12))
    apply = functools.partial(batch_norm, x, scale, bias, epsilon=EPSILON, implementation="cpu")
    expected = apply(out_relu=relu, residual=np.zeros_like(residual))[0]
    np.testing.assert_array_equal(apply(out_relu=relu)[0], expected)
    if relu:
        np.testing.assert_array_equal(apply(out_relu="last")[0], expected)


@needs_library
@pytest.mark.parametrize("relu", [True, "last"])
def test_what_is_not_a_number_stays_so(relu):
    x, scale, bias, residual, dy = operands((2, 4, 4, 16))
    x[0, 0, 0, 3] = np.nan
    y, *_ = found(x, scale, bias, residual, dy, relu)
    assert np.isnan(y[..., 3]).all()
    assert np.isfinite(np.delete(y, 3, -1)).all()


@needs_library
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_stacked_networks_are_normalized_one_by_one(axes):
    stacked, (_, scale, bias, *_) = (
        [operands((2, 6, 5, 4), seed) for seed in range(3)],
        operands((4,)),
    )
    x = np.stack([arrays[0] for arrays in stacked])
    scales = np.stack([arrays[1] for arrays in stacked])
    x, scale = (
        array if axis == 0 else array[0] for array, axis in zip((x, scales), axes, strict=True)
    )

    def gradients(implementation):
        def loss(x, scale):
            y, *_ = batch_norm(
                x, scale, bias, epsilon=EPSILON, out_relu=True, implementation=implementation
            )
            return jnp.sin(y).sum()

        return jax.vmap(jax.value_and_grad(loss, (0, 1)), axes)(x, scale)

    jax.tree.map(
        lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4),
        gradients("cpu"),
        gradients("xla"),
    )


@needs_library
@pytest.mark.parametrize("relu", [False, True, "last"])
def test_second_derivatives_are_those_of_the_plain_form(relu):
    x, scale, bias, _, _ = operands((2, 3, 2, 5))

    def of_gradient(implementation):
        def loss(x, scale):
            after = {"out_relu": relu, "residual": x * x - 0.5, "implementation": implementation}
            return jnp.sin(batch_norm(x, scale, bias, epsilon=EPSILON, **after)[0]).sum()

        def size(x):
            return sum(jnp.square(g).sum() for g in jax.grad(loss, (0, 1))(x, scale))

        return jax.jit(jax.grad(size))(x)

    np.testing.assert_allclose(of_gradient("cpu"), of_gradient("xla"), rtol=2e-4, atol=2e-3)


@needs_library
def test_plain_xla_serves_where_the_kernel_does_not():
    def choice(x, **settings):
        with choices() as seen:
            ones = jnp.ones(4)
            text = jax.jit(lambda x: batch_norm(x, ones, ones, epsilon=EPSILON, **settings))
            text = text.lower(x).as_text()
        assert ("shiftnet_batch_norm" in text) == (seen == ["batch_norm: cpu"])
        return seen[0]

    x = jnp.ones((4, 2, 2, 4))
    assert choice(x) == "batch_norm: cpu"
    assert choice(x.astype(jnp.bfloat16)) == "batch_norm: cpu"
    assert "no pixels" in choice(x[:0])
    assert "asked for" in choice(x, implementation="xla")
    with implementations.only_xla():
        assert "asked for" in choice(x)
    with implementations.lowered_for("tpu"):
        assert "no tpu kernel" in choice(x)
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("batch",))):
        assert "divided over devices" in choice(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones(4)}, "at least two axes"),
        ({"x": jnp.ones((2, 4), jnp.int32)}, "floating"),
        ({"scale": jnp.ones(3)}, r"scale of the shape \(4,\)"),
        ({"bias": jnp.ones(4, jnp.bfloat16)}, "bias in float32"),
        ({"residual": jnp.ones((1, 4))}, r"residual of the shape \(2, 4\)"),
        ({"residual": jnp.ones((2, 4), jnp.bfloat16)}, "residual in the dtype of x"),
        ({"implementation": "tpu"}, "unknown implementation 'tpu' of batch_norm; known: xla, cpu"),
        ({"x": jnp.ones((0, 4)), "implementation": "cpu"}, "no 'cpu' for this"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"x": jnp.ones((2, 4)), "scale": jnp.ones(4), "bias": jnp.zeros(4)} | changes
    with pytest.raises(ValueError, match=message):
        batch_norm(**arguments, epsilon=EPSILON)
