"""Maxima of windows, and where their gradients go, against loops."""

import jax
import numpy as np
import pytest

from shiftnet.layers.pooling import max_pool


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 7, 5, 2), (1, 1, 2, 1)])
def test_the_gradient_goes_to_the_first_of_equal_maxima(shape):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, shape).astype(np.float32)  # many are equal
    dy = rng.standard_normal((shape[0], -(-shape[1] // 2), -(-shape[2] // 2), shape[3]), np.float32)
    y, dx = np.full(dy.shape, -np.inf, np.float32), np.zeros_like(x)
    for n, i, j, c in np.ndindex(dy.shape):
        rows = range(max(2 * i - 1, 0), min(2 * i + 2, shape[1]))
        columns = range(max(2 * j - 1, 0), min(2 * j + 2, shape[2]))
        row, column = max(
            ((row, column) for row in rows for column in columns),
            key=lambda at: x[n, *at, c],  # the first of equal ones
        )
        y[n, i, j, c] = x[n, row, column, c]
        dx[n, row, column, c] += dy[n, i, j, c]

    def both(x):
        y, pull = jax.vjp(max_pool, x)
        return y, *pull(dy)

    ours = jax.jit(both)(x)
    np.testing.assert_array_equal(ours[0], y)
    np.testing.assert_allclose(ours[1], dx, rtol=1e-6, atol=1e-6)
