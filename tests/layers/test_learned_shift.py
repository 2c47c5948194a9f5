"""Learned shifts interpolate, round and learn as their papers say; frozen ones take the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.layers import LearnedShift
from shiftnet.layers.folding import fold_batch_norms
from shiftnet.layers.learned_shift import ACTIVE_RATE, REACH, shift_penalty
from shiftnet.layers.shift import constants
from shiftnet.models.counting import count
from tests import networks
from tests.models.test_build import config


def bilinear(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Each value from the four pixels around where it reads; zeros outside of the image."""
    _, height, width, channels = x.shape
    y = np.zeros_like(x)
    for c in range(channels):
        top, left = int(np.floor(rows[c])), int(np.floor(columns[c]))
        for i, j in np.ndindex(2, 2):
            down, right = rows[c] - top, columns[c] - left
            weight = (down if i else 1 - down) * (right if j else 1 - right)
            for h, w in np.ndindex(height, width):
                if 0 <= h + top + i < height and 0 <= w + left + j < width:
                    y[:, h, w, c] += weight * x[:, h + top + i, w + left + j, c]
    return y


def made(kind: str, rows: np.ndarray, columns: np.ndarray) -> LearnedShift:
    layer = LearnedShift(len(rows), kind, rngs=nnx.Rngs(0))
    layer.rows.set_value(jnp.asarray(rows))
    layer.columns.set_value(jnp.asarray(columns))
    return layer


def pulled(layer: LearnedShift, x: np.ndarray, cotangent: np.ndarray):
    """Values, and gradients of sum(values * cotangent) by `x`, rows and columns."""
    graphdef, params = nnx.split(layer)

    def total(params, x):
        y = nnx.merge(graphdef, params)(x, train=True)
        return (y * cotangent).sum(), y

    (_, y), (grads, dx) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        params, jnp.asarray(x)
    )
    return np.asarray(y), np.asarray(dx), *(np.asarray(grads[n][...]) for n in ("rows", "columns"))


# Between pixels, on them, half between two, at and beyond the reach.
ROWS = np.array([0.3, -1.7, 0.0, 2.0, -0.5, 1.5, 3.0, 4.2])
COLUMNS = np.array([-0.4, 2.6, 0.0, -1.0, 0.5, -2.5, -3.0, 0.2])


def problem():
    draw = np.random.default_rng(0)
    return draw.normal(size=(2, 5, 6, 8)), draw.normal(size=(2, 5, 6, 8))


def slopes(x, cotangent, rows, columns):
    """Central differences of the bilinear shift; at kinks they are the mean of both slopes."""
    step, found = 1e-6, []
    for by_row, by_column in ((step, 0), (0, step)):
        more = bilinear(x, rows + by_row, columns + by_column)
        less = bilinear(x, rows - by_row, columns - by_column)
        found.append(((more - less) * cotangent).sum((0, 1, 2)) / (2 * step))
    return np.array(found)


def adjoint(cotangent: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return bilinear(cotangent, -rows, -columns)


@pytest.mark.usefixtures("float64")
def test_an_active_shift_interpolates_and_learns_the_direction_of_its_offsets():
    x, cotangent = problem()
    y, dx, *grads = pulled(made("active", ROWS, COLUMNS), x, cotangent)
    rows, columns = (np.clip(offsets, -REACH, REACH) for offsets in (ROWS, COLUMNS))
    np.testing.assert_allclose(y, bilinear(x, rows, columns), atol=1e-14)
    np.testing.assert_allclose(dx, adjoint(cotangent, rows, columns), atol=1e-14)
    expected = slopes(x, cotangent, rows, columns)
    expected *= ACTIVE_RATE / np.hypot(*expected)
    inside = [0, 1, 2, 3, 4, 5]  # beyond the reach there are no pixels to interpolate with
    np.testing.assert_allclose(np.array(grads)[:, inside], expected[:, inside], rtol=1e-6)
    np.testing.assert_allclose(np.hypot(*grads), ACTIVE_RATE, rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_a_sparse_shift_moves_by_rounded_offsets_and_learns_through_the_bilinear_one():
    x, cotangent = problem()
    layer = made("sparse", ROWS, COLUMNS)
    y, dx, *grads = pulled(layer, x, cotangent)
    rows, columns = (np.clip(np.rint(offsets), -REACH, REACH) for offsets in (ROWS, COLUMNS))
    np.testing.assert_array_equal(y, bilinear(x, rows, columns))
    np.testing.assert_allclose(dx, adjoint(cotangent, rows, columns), atol=1e-14)
    expected = slopes(x, cotangent, ROWS, COLUMNS)
    inside = [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(np.array(grads)[:, inside], expected[:, inside], rtol=1e-6)
    # In evaluation, and once folded, it is the same shift.
    np.testing.assert_array_equal(layer(jnp.asarray(x)), y)
    assert layer(jnp.asarray(x[:0])).shape == x[:0].shape
    layer.fold()
    assert layer.offsets.dh == (0, -2, 0, 2, 0, 2, 3, 3)
    np.testing.assert_array_equal(layer(jnp.asarray(x)), y)


@pytest.mark.parametrize("offset", [2.5, 3.0, 4.0, -3.0, -4.0])
def test_offsets_at_and_beyond_the_reach_learn_as_those_within(offset):
    ramp = np.broadcast_to(np.arange(21.0)[:, None], (1, 21, 21))[..., None].astype(np.float32)
    middle = np.zeros_like(ramp)
    middle[0, 8:13, 8:13] = 1 / 25

    def slope(kind, x):
        return pulled(made(kind, np.array([offset]), np.zeros(1)), x, middle)[2][0]

    assert slope("sparse", ramp) == pytest.approx(1, rel=1e-4)
    assert slope("active", ramp) == pytest.approx(ACTIVE_RATE, rel=1e-4)
    assert slope("sparse", np.ones_like(ramp)) == pytest.approx(0, abs=1e-5)


@pytest.mark.usefixtures("float64")
def test_a_channel_without_gradient_stays():
    x, cotangent = problem()
    _, _, *grads = pulled(made("active", ROWS, COLUMNS), np.zeros_like(x), cotangent)
    np.testing.assert_array_equal(grads, np.zeros((2, 8)))


def test_the_penalty_is_the_sum_of_all_sparse_offsets():
    network = networks.random(config("shiftresnet8", shift="sparse"), 10)
    shifts = [m for _, m in nnx.iter_modules(network) if isinstance(m, LearnedShift)]
    assert len(shifts) == 3
    expected = sum(np.abs(np.asarray(o[...])).sum() for s in shifts for o in (s.rows, s.columns))
    np.testing.assert_allclose(shift_penalty(network), expected, rtol=1e-6)
    assert shift_penalty(networks.abstract(config("shiftresnet8", shift="active"), 10)) == 0


@pytest.mark.parametrize(
    ("arch", "activations"),
    [
        ("shiftresnet8", "float"),
        ("shiftresnet8", "int4"),
        pytest.param("shiftnet_b", "float", marks=pytest.mark.slow),
    ],
)
def test_frozen_shifts_run_in_the_fused_operations_and_compute_the_same(arch, activations):
    network = networks.random(config(arch, shift="sparse", activations=activations), 10)
    size = 32 if arch == "shiftnet_b" else 12
    x = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)
    before = networks.evaluate(network, x)
    fold_batch_norms(network)
    shifts = [m for _, m in nnx.iter_modules(network) if isinstance(m, LearnedShift)]
    assert all(constants(shift) is not None for shift in shifts)
    after = networks.evaluate(network, x)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())
    # It costs as many multiply-adds as the fixed shift: none.
    fixed = networks.abstract(config(arch), 10)
    learned = networks.abstract(config(arch, shift="sparse"), 10)
    counts = [count(n, (size, size, 3)).multiply_adds for n in (fixed, learned)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["active", "sparse"])
def test_a_network_learns_its_shifts(kind):
    network = networks.random(config("shiftresnet8", shift=kind), 10)
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    @jax.jit
    def gradients(params):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits = model(jnp.asarray(networks.channels_last(x)), train=True)
            return networks.cross_entropy(np.arange(2))(logits)

        return jax.grad(loss)(params)

    found = {path: leaf for path, leaf in nnx.to_flat_state(gradients(params)) if "shift" in path}
    assert len(found) == 6
    for path, gradient in found.items():
        assert np.abs(gradient[...]).max() > 0, path
