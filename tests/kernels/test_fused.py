"""`shift_pointwise` and `shift_block` in XLA, against plain restatements.

Their kernels are tested by test_tpu.py and test_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shiftnet.kernels.shift import Offsets, shift
from shiftnet.kernels.shift_block import cpu, few_images, shift_block
from shiftnet.kernels.shift_pointwise import shift_pointwise


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def arrays(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def pointwise_by_layers(k, d, stride, relu, out_relu, a):
    """What the docstring of `shift_pointwise` says, in its order."""
    x = a["x"] * a["scale"] + a["bias"]
    x = shift(jnp.maximum(x, 0) if relu else x, k, d, implementation="gather")
    y = jnp.einsum("nhwc,ck->nhwk", x[:, ::stride, ::stride], a["w"])
    y = y * a["out_scale"] + a["out_bias"]
    return (jnp.maximum(y, 0) if out_relu else y) + a["residual"]


def block_by_layers(k, d, stride, out_relu, a, shift_first=False):
    """What the docstring of `shift_block` says, in its order."""
    y = jnp.einsum("nhwc,ce->nhwe", a["x"], a["w1"])
    if shift_first:
        y = jnp.maximum(shift(y, k, d, implementation="gather") + a["b1"], 0)
    else:
        y = shift(jnp.maximum(y + a["b1"], 0), k, d, implementation="gather")
    y = y[:, ::stride, ::stride]
    y = jnp.einsum("nhwe,ek->nhwk", y, a["w2"]) + a["out_bias"]
    return (jnp.maximum(y, 0) if out_relu else y) + a["residual"]


def assert_same(ours, by_layers, a):
    """Values, and gradients with respect to every array, to float64's precision."""
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=a["residual"].shape))

    def both(a, f):
        y, pull = jax.vjp(f, a)
        return y, pull(cotangent)[0]

    found, gradients = jax.jit(functools.partial(both, f=ours))(a)
    values, expected = jax.jit(functools.partial(both, f=by_layers))(a)
    np.testing.assert_allclose(found, values, rtol=0, atol=1e-12 * np.abs(values).max())
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-12 * scale + 1e-13)


# batch, height, width, channels, outputs, kernel size, dilation, stride
SHAPES = [
    (2, 5, 4, 20, 3, 3, 1, 1),
    (1, 5, 4, 21, 3, 3, 1, 2),
    (3, 1, 2, 9, 1, 3, 2, 1),
    (2, 6, 7, 8, 4, 3, 1, 3),
    (1, 4, 3, 27, 2, 5, 1, 2),
    (2, 6, 7, 50, 2, 5, 1, 1),
    (2, 3, 3, 5, 2, 2, 2, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
relus = pytest.mark.parametrize("relu", [True, False])


@shapes
@relus
@pytest.mark.covering
def test_shift_pointwise_is_its_layers(shape, relu):
    batch, height, width, channels, outputs, k, d, stride = shape
    out = (batch, -(-height // stride), -(-width // stride), outputs)
    a = arrays(
        height,
        x=(batch, height, width, channels),
        w=(channels, outputs),
        scale=(channels,),
        bias=(channels,),
        out_scale=(outputs,),
        out_bias=(outputs,),
        residual=out,
    )

    def ours(a):
        a = dict(a)
        x, w = a.pop("x"), a.pop("w")
        return shift_pointwise(x, w, k, d, stride=stride, relu=relu, out_relu=relu, **a)

    assert_same(ours, functools.partial(pointwise_by_layers, k, d, stride, relu, relu), a)


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_both_take_any_whole_offset_of_every_channel(stride):
    dh, dw = np.random.default_rng(0).integers(-3, 4, (2, 20)).tolist()
    offsets = Offsets(dh, dw)
    a = arrays(
        stride,
        x=(2, 6, 5, 3),
        w1=(3, 20),
        b1=(20,),
        w2=(20, 4),
        residual=(2, 6 // stride, -(-5 // stride), 4),
    )

    def moved(y):
        return shift(y, offsets=offsets, implementation="gather")[:, ::stride, ::stride]

    for name in ("xla", "cpu"):
        assert_same(
            lambda a: shift_block(
                *(a[name] for name in ("x", "w1", "b1", "w2")),
                offsets=offsets,
                stride=stride,
                residual=a["residual"],
                implementation=name,
            ),
            lambda a: moved(jnp.maximum(a["x"] @ a["w1"] + a["b1"], 0)) @ a["w2"] + a["residual"],
            a,
        )
    assert_same(
        lambda a: shift_pointwise(
            jnp.tanh(a["x"] @ a["w1"] + a["b1"]),
            a["w2"],
            offsets=offsets,
            stride=stride,
            residual=a["residual"],
        ),
        lambda a: moved(jnp.tanh(a["x"] @ a["w1"] + a["b1"])) @ a["w2"] + a["residual"],
        a,
    )


@shapes
@pytest.mark.parametrize(
    ("relu", "shift_first"),
    [(True, False), (False, True), pytest.param(True, True, marks=pytest.mark.slow)],
)
@pytest.mark.covering
def test_shift_block_is_its_layers(shape, relu, shift_first):
    batch, height, width, channels, outputs, k, d, stride = shape
    inputs = 3
    out = (batch, -(-height // stride), -(-width // stride), outputs)
    a = arrays(
        width,
        x=(batch, height, width, inputs),
        w1=(inputs, channels),
        b1=(channels,),
        w2=(channels, outputs),
        out_bias=(outputs,),
        residual=out,
    )

    def ours(a):
        a = dict(a)
        operands = [a.pop(name) for name in ("x", "w1", "b1", "w2")]
        how = {"stride": stride, "out_relu": relu, "shift_first": shift_first}
        return shift_block(*operands, k, d, **how, **a)

    by_layers = functools.partial(block_by_layers, k, d, stride, relu, shift_first=shift_first)
    assert_same(ours, by_layers, a)


@pytest.mark.parametrize("images", [2, 6])
@pytest.mark.parametrize(
    ("stride", "features", "expanded"),
    [(1, 2, 20), (1, 3, 20), (1, 3, 30), (2, 2, 20), (3, 2, 20)],  # 30: each row is a phase
)
@pytest.mark.covering
def test_a_few_images_at_a_time_give_the_same(images, stride, features, expanded, monkeypatch):
    for name in ("FORWARD_BYTES", "BACKWARD_BYTES"):
        monkeypatch.setattr(few_images, name, images * 5 * 4 * expanded * 8)
    out = (6, -(-5 // stride), -(-4 // stride), features)
    w1, b1, w2 = (3, expanded), (expanded,), (expanded, features)
    a = arrays(0, x=(6, 5, 4, 3), w1=w1, b1=b1, w2=w2, out_bias=(features,), residual=out)

    def ours(a):
        a = dict(a)
        operands = [a.pop(name) for name in ("x", "w1", "b1", "w2")]
        return shift_block(*operands, stride=stride, out_relu=True, implementation="cpu", **a)

    assert_same(ours, functools.partial(block_by_layers, 3, 1, stride, True), a)
    assert ("scan[" in str(jax.make_jaxpr(ours)(a))) == (images < 6)


@pytest.mark.parametrize(
    ("x", "expanded", "reason"),
    [
        ((2, 8, 8, 16), 32, "few channels"),
        ((2, 1, 8, 16), 144, "fewer rows or columns"),
        ((0, 8, 8, 16), 144, "without any element"),
        ((2, 0, 8, 16), 144, "without any element"),
    ],
)
def test_what_a_cpu_leaves_to_xla(x, expanded, reason):
    a = arrays(0, x=x, w1=(16, expanded), b1=(expanded,), w2=(expanded, 32))
    with pytest.raises(ValueError, match=reason):
        shift_block(*a.values(), stride=2, implementation="cpu")
    assert shift_block(*a.values(), stride=2).shape == (x[0], -(-x[1] // 2), 4, 32)
    gradients = jax.grad(lambda *a: shift_block(*a, stride=2).sum(), (0, 1, 2, 3))(*a.values())
    assert all(np.isfinite(gradient).all() for gradient in gradients)


MESHES = {
    "data": ((2,), ("data",), AxisType.Auto),
    "data, model": ((2, 1), ("data", "model"), AxisType.Auto),
    "explicit data": ((2,), ("data",), AxisType.Explicit),
}


@pytest.mark.parametrize("images", [4, 3])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("operation", ["shift", "shift_pointwise", "shift_block"])
@pytest.mark.covering
def test_devices_work_on_their_own_images(operation, mesh, images):
    shape, names, kind = MESHES[mesh]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    a = arrays(0, x=(images, 4, 3, 10), w=(10, 10), w1=(10, 10), b1=(10,), w2=(10, 10))
    operations = {
        "shift": lambda a: shift(a["x"]),
        "shift_pointwise": lambda a: shift_pointwise(a["x"], a["w"]),
        "shift_block": lambda a: shift_block(a["x"], a["w1"], a["b1"], a["w2"]),
    }

    def loss(a):
        return (operations[operation](a) * jnp.linspace(0, 1, 4 * 3 * 10).reshape(4, 3, 10)).sum()

    expected = jax.value_and_grad(loss)(a)
    with jax.set_mesh(mesh):
        a = jax.device_put(a, NamedSharding(mesh, PartitionSpec()))
        if images == 4:  # 3 do not divide: each device takes them all
            a["x"] = jax.device_put(a["x"], NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(jax.value_and_grad(loss))(a)
        text = str(jax.make_jaxpr(jax.grad(loss))(a))
    assert "shard_map" in text
    if images == 4:
        assert found[1]["x"].sharding.spec[0] == "data"
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-9), found, expected
    )


def test_an_operation_within_a_shard_map_is_not_divided_again():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, batch = arrays(0, x=(4, 4, 3, 10))["x"], PartitionSpec("data")
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(shift, in_specs=batch, out_specs=batch))(x)
    np.testing.assert_array_equal(found, shift(x))


def test_half_precision_sums_in_float32():
    a = arrays(0, x=(2, 4, 4, 900), w=(900, 2), residual=(2, 4, 4, 2))
    half = {name: value.astype(jnp.bfloat16) for name, value in a.items()}
    found = shift_pointwise(half["x"], half["w"], implementation="xla")
    wide = {name: value.astype(jnp.float32) for name, value in half.items()}
    expected = shift_pointwise(wide["x"], wide["w"], implementation="xla")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.fixture(params=["xla", "cpu", "cpu without a compiler"])
def implementation(request, monkeypatch):
    if request.param == "cpu without a compiler":
        monkeypatch.setattr(cpu, "_is_compiled", lambda x: False)
    return request.param.split()[0]


def test_half_precision_sums_over_rows_of_channels_in_float32(implementation):
    """256 + 1 - 256, each from channels of a row of their own; bfloat16 has no 257."""
    x, w1, b1 = jnp.ones((1, 5, 1, 1), jnp.bfloat16), jnp.ones((1, 9), jnp.bfloat16), jnp.zeros(9)
    w2 = jnp.array([256, 0, 0, 1, 0, 0, -256, 0, 0], jnp.bfloat16)[:, None]
    offsets = Offsets((-1,) * 3 + (0,) * 3 + (1,) * 3, (0,) * 9)

    def results(x):
        y = shift_block(x, w1, b1, w2, offsets=offsets, implementation=implementation)
        return y.sum(), y

    dx, y = jax.grad(results, has_aux=True)(x)
    assert y[0, 2, 0, 0] == 1
    assert dx[0, 2, 0, 0] == 1


def test_half_precision_gradients_are_wide_sums(implementation, monkeypatch):
    """Over 16,384 pixels; 8 bits of precision would stop growing at 256."""
    monkeypatch.setattr(few_images, "BACKWARD_BYTES", 16 * 16 * 16 * 8 * 2)
    a = arrays(0, x=(64, 16, 16, 4), w1=(4, 8), b1=(8,), w2=(8, 2))
    a = {name: jnp.abs(value).astype(jnp.bfloat16) for name, value in a.items()}

    def gradients(a, implementation):
        def loss(a):
            y = shift_block(a["x"], a["w1"], a["b1"], a["w2"], implementation=implementation)
            return y.astype(jnp.float32).sum()

        return jax.grad(loss)(a)

    found = gradients(a, implementation)
    wide = {name: value.astype(jnp.float32) for name, value in a.items()}
    for name, expected in gradients(wide, "xla").items():
        assert found[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(found[name].astype(jnp.float32), expected, rtol=2e-2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: shift_pointwise(x, jnp.ones((8, 2))),
            r"w \[C, K\] of the same C, got x \(1, 2,",
        ),
        (lambda x: shift_pointwise(x, jnp.ones((9, 2)), 0), "kernel_size 0 and dilation 1"),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2)), stride=0),
            "whole stride of at least 1, got 0",
        ),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2)), implementation="cuda"),
            "unknown implementation 'cuda' of shift_pointwise; known: xla, tpu, gpu",
        ),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2)), implementation="tpu"),
            "no 'tpu' for this: the dtype is float64, not float32 or bfloat16",
        ),
        (
            lambda x: shift_block(x, jnp.ones((9, 2)), jnp.ones(3), jnp.ones((3, 2))),
            r"w1 \[C, E\], b1 \[E\] and w2 \[E, K\], got x \(1, 2, 3, 9\), w1 \(9, 2\)",
        ),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2)), 2.5),
            "whole kernel_size.* got kernel_size 2.5",
        ),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2)), residual=jnp.ones((1, 1, 1, 2))),
            r"residual of the shape \(1, 2, 3, 2\), got \(1, 1, 1, 2\)",
        ),
        (
            lambda x: shift_block(
                x, jnp.ones((9, 3)), jnp.ones(3), jnp.ones((3, 2)), out_bias=jnp.ones(1)
            ),
            r"out_bias of the shape \(2,\), got \(1,\)",
        ),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2), jnp.float32)),
            "w in the dtype of x, float64, got float32",
        ),
        (
            lambda x: shift_pointwise(x.astype(int), jnp.ones((9, 2))),
            "a floating x, got int64",
        ),
        (
            lambda x: shift_pointwise(x, jnp.ones((9, 2)), channel_order="sorted"),
            "unknown channel_order 'sorted'",
        ),
        (lambda x: shift_pointwise(x[..., :0], jnp.ones((0, 2))), r"got x \(1, 2, 3, 0\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((1, 2, 3, 9)))
