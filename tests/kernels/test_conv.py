"""Convolutions in C++ on a CPU, against sums over the window in float64."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from shiftnet.kernels import implementations, native
from shiftnet.kernels.batch_norm import batch_norm
from shiftnet.kernels.conv import conv, pack
from shiftnet.kernels.covariance import covariance
from shiftnet.kernels.shift_block import shift_block
from tests.kernels import test_shift_block

needs_library = pytest.mark.skipif(
    native.load().library is None, reason=str(native.load().reason or "")
)


@pytest.mark.skipif(
    os.environ.get("SHIFTNET_NATIVE") == "0" or not any(map(shutil.which, native.COMPILERS)),
    reason="no C++ compiler",
)
def test_where_there_is_a_compiler_it_builds_the_library():
    """Or C++ that does not compile would only skip the tests of what it computes."""
    assert native.load().library is not None, native.load().reason


def by_taps(x, w, stride, groups, dy):
    """The convolution and the gradients of `x` and `w` for `dy`, in float64, tap by tap."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    (_, height, width, _), (k, _, inside, out) = x.shape, w.shape
    half, outside = k // 2, out // groups
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    y, dx, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for i, j, g in np.ndindex(k, k, groups):
        ins = slice(g * inside, (g + 1) * inside)
        outs = slice(g * outside, (g + 1) * outside)
        rows, columns = (
            slice(first, first + stride * count, stride)
            for first, count in zip((i, j), dy.shape[1:3], strict=True)
        )
        seen = padded[:, rows, columns, ins]
        y[..., outs] += seen @ w[i, j, :, outs]
        dx[:, rows, columns, ins] += dy[..., outs] @ w[i, j, :, outs].T
        dw[i, j, :, outs] = np.einsum("nhwc,nhwk->ck", seen, dy[..., outs])
    return y, dx[:, half : half + height, half : half + width], dw


def arrays(images, height, width, channels, out, kernel, stride, groups, seed=0):
    """Random `x`, `w` and `dy`."""
    rng = np.random.default_rng(seed)
    shapes = (
        (images, height, width, channels),
        (kernel, kernel, channels // groups, out),
        (images, -(-height // stride), -(-width // stride), out),
    )
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def found(x, w, dy, stride, groups):
    """What the loops make of it."""
    y, pull = jax.vjp(
        lambda x, w: conv(x, w, stride=stride, groups=groups, implementation="cpu"), x, w
    )
    return y, *pull(dy)


def check(case, seed=0):
    *_, stride, groups = case
    x, w, dy = arrays(*case, seed)
    for name, ours, expected in zip(
        ("y", "dx", "dw"),
        found(x, w, dy, stride, groups),
        by_taps(x, w, stride, groups, dy),
        strict=True,
    ):
        assert ours.dtype == jnp.float32
        scale = np.abs(expected).max(initial=1e-30)
        np.testing.assert_allclose(ours / scale, expected / scale, atol=2e-6, err_msg=name)


# Images, height, width, channels in and out, window, stride, groups.
CASES = [
    (3, 32, 32, 3, 16, 3, 1, 1),  # stems
    (1, 41, 30, 3, 64, 7, 2, 1),
    (2, 32, 32, 16, 16, 3, 1, 1),
    (2, 15, 17, 16, 32, 3, 2, 1),
    (3, 8, 8, 64, 64, 3, 1, 1),
    (1, 7, 7, 320, 260, 3, 1, 1),  # weights in slices
    (1, 9, 7, 130, 96, 3, 2, 1),
    (2, 7, 9, 17, 35, 3, 1, 1),  # tiles of 2x2 pixels beyond the image, vectors of channels in part
    (2, 4, 6, 40, 16, 3, 1, 1),
    (3, 9, 8, 37, 45, 3, 1, 1),
    (3, 14, 14, 256, 256, 3, 1, 1),  # several parts and slices
    (2, 2, 3, 16, 16, 3, 1, 1),
    (2, 1, 1, 5, 3, 3, 1, 1),
    (2, 1, 1, 5, 3, 3, 2, 1),
    (1, 3, 2, 1, 1, 7, 1, 1),
    (2, 5, 6, 1, 42, 5, 1, 1),
    (2, 6, 5, 48, 5, 1, 2, 1),  # a window that meets only some pixels
    (1, 7, 9, 4, 6, 3, 3, 1),
    (3, 32, 32, 42, 42, 3, 1, 42),  # depthwise
    (2, 9, 8, 48, 48, 3, 2, 48),
    (2, 6, 7, 5, 5, 5, 1, 5),
    (1, 4, 4, 64, 64, 7, 1, 64),
    (2, 3, 3, 16, 16, 1, 2, 16),
    (2, 8, 8, 12, 24, 3, 1, 12),  # two outputs a channel
    (2, 8, 9, 24, 12, 3, 1, 3),  # groups
    (2, 5, 5, 64, 64, 3, 2, 2),
    (0, 4, 4, 3, 4, 3, 1, 1),
]


@needs_library
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_is_the_sum_over_the_window_and_its_gradients(case):
    check(case)


@needs_library
@settings(max_examples=25)
@given(
    st.tuples(*[st.integers(1, 3)], *[st.integers(1, 20)] * 2),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from((1, 3, 5, 7)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_any_shape_is_right(images, inside, outside, kernel, stride, groups, seed):
    check((*images, inside * groups, outside * groups, kernel, stride, groups), seed)


AFTER = [  # channels in and out, window, stride, groups
    (16, 20, 3, 1, 1),
    (3, 20, 3, 2, 1),
    (20, 35, 1, 2, 1),
    (20, 20, 3, 1, 20),
    (8, 12, 3, 1, 2),
    (16, 12, 1, 2, 4),
]


@needs_library
@pytest.mark.parametrize("case", AFTER, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize(
    ("relu", "left_out"), [(False, "out_scale"), (True, "out_bias"), ("last", None)]
)
def test_what_follows_a_convolution_is_computed_with_it(case, relu, left_out):
    _, outside, _, stride, groups = case
    x, w, dy = arrays(2, 7, 6, *case)
    rng = np.random.default_rng(1)
    after = {
        "out_scale": rng.standard_normal(outside, np.float32),
        "out_bias": rng.standard_normal(outside, np.float32),
        "residual": rng.standard_normal(dy.shape, np.float32),
    }
    after.pop(left_out, None)
    expected = by_taps(x, w, stride, groups, dy)[0]
    expected = expected * after.get("out_scale", 1) + after.get("out_bias", 0)
    expected = np.maximum(expected, 0) if relu is True else expected
    expected = expected + after.get("residual", 0)
    expected = np.maximum(expected, 0) if relu == "last" else expected
    ours = conv(x, w, stride=stride, groups=groups, out_relu=relu, implementation="cpu", **after)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)
    plain = conv(x, w, stride=stride, groups=groups, out_relu=relu, implementation="xla", **after)
    np.testing.assert_allclose(plain, expected, rtol=2e-5, atol=2e-5)


def test_a_relu_is_one_however_it_is_asked_for_and_nothing_else_is_taken():
    x, w = jnp.ones((1, 4, 4, 3)), -jnp.ones((3, 3, 3, 4))
    for relu in (True, np.bool_(True), 1, "last"):
        for implementation in (None, "xla"):
            assert not conv(x, w, out_relu=relu, implementation=implementation).any()
        assert not jax.vjp(lambda x, relu=relu: conv(x, w, out_relu=relu), x)[0].any()
        block = -w[0, 0], jnp.zeros(4), -jnp.ones((4, 5))
        assert not shift_block(x, *block, out_relu=relu).any()
    with pytest.raises(ValueError, match="conv needs False, True or 'last' as out_relu, got 'yes'"):
        conv(x, w, out_relu="yes")
    with pytest.raises(ValueError, match="shift_block has no ReLU after the addition"):
        shift_block(x, *block, out_relu="last", residual=jnp.ones((1, 4, 4, 5)))


@needs_library
def test_gradients_pass_through_what_follows_a_convolution():
    x, w, residual = arrays(1, 5, 4, 16, 16, 3, 1, 1)
    scale, bias = w[0, 0, 0], w[1, 1, 1]

    def gradients(implementation):
        def loss(x, w, scale, bias, residual):
            after = {"out_scale": scale, "out_bias": bias, "residual": residual}
            y = conv(x, w, **after, out_relu="last", implementation=implementation)
            return jnp.sin(y).sum()

        return jax.grad(loss, tuple(range(5)))(x, w, scale, bias, residual)

    jax.tree.map(
        lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4),
        gradients("cpu"),
        gradients("xla"),
    )


@needs_library
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_values_that_are_not_numbers_are_not_rectified_away(implementation):
    x, w, _ = arrays(1, 4, 4, 16, 16, 3, 1, 1)
    x[0, 0, 0, 0] = np.nan
    y = conv(x, w, out_relu="last", implementation=implementation)
    assert np.isnan(y[0, 0, 0]).all()


@needs_library
@pytest.mark.parametrize(
    "case",
    [
        (2, 8, 6, 16, 35, 3, 1, 1),
        (2, 8, 6, 5, 35, 3, 1, 1),
        (2, 8, 6, 16, 16, 3, 2, 1),
        (2, 1, 1, 16, 16, 3, 1, 1),  # too small for the algorithm that the weights are packed for
    ],
)
def test_packed_weights_give_the_same_bits(case):
    x, w, _ = arrays(*case)
    packed = pack(w, stride=case[-2])
    np.testing.assert_array_equal(
        conv(x, np.zeros_like(w) if x.shape[1] > 1 else w, packed=packed, stride=case[-2]),
        conv(x, w, stride=case[-2]),
    )


@needs_library
def test_the_same_bits_for_any_number_of_threads():
    program = "from tests.kernels.test_conv import print_digest; print_digest()"
    digests = {
        threads: subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "NPROC": threads},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(digests["1"]) > 60
    assert len(set(digests.values())) == 1


def print_digest():
    """What the test above runs in processes of its own: a digest of results, each taken twice."""
    digest = hashlib.sha256()
    shapes = [
        (20, 32, 32, 16, 16, 3, 1, 1),
        (9, 16, 16, 32, 64, 3, 2, 1),
        (3, 16, 16, 84, 84, 3, 1, 84),
        (9, 9, 7, 64, 80, 3, 1, 1),
    ]
    for case in shapes:
        x, w, dy = arrays(*case)
        first, again = ([np.asarray(v) for v in found(x, w, dy, *case[-2:])] for _ in range(2))
        for ours, same in zip(first, again, strict=True):
            assert ours.tobytes() == same.tobytes()
            digest.update(ours.tobytes())
    for case in ((20, 32, 32, 16, 48, 16, 1), (9, 16, 16, 32, 64, 64, 2)):
        a = test_shift_block.operands(0, *case)
        y, gradients = test_shift_block.ours(a, stride=case[-1])
        for array in (y, *gradients.values()):
            digest.update(array.tobytes())
    x = np.random.default_rng(0).standard_normal((40, 33, 32, 20), np.float32)
    results, pull = jax.vjp(lambda x: batch_norm(x, x[0, 0, 0], x[0, 0, 1], epsilon=1e-5), x)
    for array in jax.tree.leaves((results, pull(results), covariance(x))):
        digest.update(np.asarray(array).tobytes())
    print(digest.hexdigest())


@needs_library
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_stacked_networks_are_convolved_one_by_one(axes):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 2, 6, 5, 4)), rng.standard_normal((3, 3, 3, 4, 7))
    x, w = (
        jnp.asarray(array if axis == 0 else array[0], jnp.float32)
        for array, axis in zip((x, w), axes, strict=True)
    )

    def gradients(implementation):
        def loss(x, w):
            return jnp.sin(conv(x, w, implementation=implementation)).sum()

        return jax.vmap(jax.value_and_grad(loss, (0, 1)), axes)(x, w)

    jax.tree.map(
        lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4),
        gradients("cpu"),
        gradients("xla"),
    )


@needs_library
def test_two_devices_convolve_half_of_the_batch_each():
    x, w, dy = arrays(4, 9, 8, 5, 6, 3, 2, 1)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))

    def gradients(x, w):
        y, pull = jax.vjp(lambda x, w: conv(x, w, stride=2), x, w)
        return y, *pull(dy)

    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(x, w)
        assert "tensor<2x9x8x5xf32>" in lowered.as_text()  # the operation's own share
        results = lowered.compile()(x, w)
    for ours, expected in zip(results, by_taps(x, w, 2, 1, dy), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@needs_library
def test_second_derivatives_are_those_of_the_plain_form():
    x, w, _ = arrays(1, 5, 4, 3, 2, 3, 1, 1)

    def of_gradient(implementation):
        def loss(w):
            return jnp.sin(conv(x, w, implementation=implementation)).sum()

        return jax.grad(lambda w: jnp.square(jax.grad(loss)(w)).sum())(w)

    np.testing.assert_allclose(of_gradient("cpu"), of_gradient("xla"), rtol=1e-4, atol=1e-4)


@needs_library
def test_programs_for_any_device_hold_no_call_of_the_library():
    x, w, _ = arrays(1, 5, 4, 3, 2, 3, 1, 1)
    assert "shiftnet_conv" in jax.jit(lambda: conv(x, w)).lower().as_text()
    with implementations.only_xla():
        assert "shiftnet_conv" not in jax.jit(lambda: conv(x, w)).lower().as_text()


@pytest.mark.usefixtures("float64")
def test_float64_is_left_to_xla():
    x, w = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 2))
    assert conv(x, w).dtype == jnp.float64
    with pytest.raises(ValueError, match="needs float32, bfloat16 or float16, not float64"):
        conv(x, w, implementation="cpu")


def test_what_a_compiler_says_in_another_encoding_is_shown(fresh, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_bytes(b"#!/bin/sh\nprintf 'Fehler: \xfcbel\\n' >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    outcome = native.load()
    assert outcome.library is None
    assert "Fehler: \ufffdbel" in outcome.reason


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Lets a test decide what is compiled, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    yield monkeypatch
    native.load.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "/no/such/compiler", "No such file"),
        ("CXX", "false", "not compiled"),
        ("CXX", 'g++ "', "which is no command"),
        ("CXX", " ", "which is no command"),
        ("SHIFTNET_NATIVE", "0", "SHIFTNET_NATIVE"),
    ],
)
def test_without_a_compiler_plain_xla_serves(fresh, name, value, reason):
    fresh.setenv(name, value)
    x, w, dy = arrays(1, 5, 4, 3, 2, 3, 1, 1)
    np.testing.assert_allclose(conv(x, w), by_taps(x, w, 1, 1, dy)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=reason):
        conv(x, w, implementation="cpu")


def test_processes_that_start_together_compile_once(fresh, tmp_path):
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-dM*) exit;; esac\n'
        f'for out; do :; done\nbasename "$out" >>{calls}\nsleep 0.2\necho >"$out"\n'
    )
    compiler.chmod(stat.S_IRWXU)
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(native._built([str(compiler)])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert all(map(native._is_whole, paths))
    assert set(paths) == set((tmp_path / "shiftnet").glob("*.so"))
    made = [*(f"{source.stem}.o" for source in native.SOURCES), paths[0].name]
    assert sorted(calls.read_text().split()) == sorted(made)


@pytest.fixture
def compiler(tmp_path):
    """A command that writes "made" into whatever it is told to make."""
    path = tmp_path / "compiler"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) exit;; esac\nfor out; do :; done\necho made >"$out"\n'
    )
    path.chmod(stat.S_IRWXU)
    return [str(path)]


@pytest.mark.parametrize("damage", [b"", b"made\n", b"made\n" + bytes(32)])
def test_a_damaged_library_is_made_anew(fresh, compiler, damage):
    path = native._built(compiler)
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert native._built(compiler) == path
    assert path.read_bytes() == whole


def test_another_command_makes_another_library(fresh, compiler):
    assert native._built(compiler) != native._built([*compiler, "-O0"])


def test_a_library_is_used_where_nothing_can_be_written(fresh, compiler):
    path = native._built(compiler)
    fresh.setattr(native.os, "access", lambda *_: False)  # tests may run as root
    assert native._built(compiler) == path
    path.unlink()
    assert native._built(compiler).parent != path.parent


def test_a_library_that_cannot_be_loaded_is_said(fresh, compiler):
    fresh.setenv("CXX", " ".join(compiler))
    assert "the C++ was not loaded: " in native.load().reason


@pytest.mark.parametrize(
    ("x", "w", "settings", "message"),
    [
        ((1, 4, 4, 3), (3, 3, 4, 2), {}, "C / groups"),
        ((1, 4, 4, 3), (2, 2, 3, 2), {}, "odd k"),
        ((1, 4, 4, 4), (3, 3, 2, 3), {"groups": 2}, "divide K"),
        ((1, 4, 4, 3), (3, 3, 3, 2), {"stride": 0}, "whole stride"),
        ((1, 4, 4, 3), (3, 3, 3, 2), {"out_bias": jnp.ones(3)}, "out_bias"),
        ((1, 4, 4, 3), (3, 3, 3, 2), {"residual": jnp.ones((1, 4, 4, 3))}, "residual"),
    ],
)
def test_what_does_not_fit_is_refused(x, w, settings, message):
    with pytest.raises(ValueError, match=message):
        conv(jnp.ones(x), jnp.ones(w), **settings)
