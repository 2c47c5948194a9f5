"""What is written in C++ on a CPU, in 16 bits: computed in float32, then rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.kernels import native
from shiftnet.kernels.batch_norm import batch_norm
from shiftnet.kernels.conv import conv
from shiftnet.kernels.covariance import covariance
from shiftnet.kernels.shift_block import shift_block

IMAGES = (3, 6, 5, 4)
# Function, shapes of the operands, and how many of them must be in float32.
OPERATIONS = {
    "conv": (lambda *a: conv(*a, stride=2, implementation="cpu"), [IMAGES, (3, 3, 4, 7)], 0),
    "shift_block": (
        lambda x, w1, w2, b1: shift_block(x, w1, b1, w2, stride=2, implementation="cpu"),
        [IMAGES, (4, 18), (18, 7), (18,)],
        1,
    ),
    "batch_norm": (
        lambda x, residual, scale, bias: batch_norm(
            *(x, scale, bias),
            epsilon=1e-5,
            out_relu="last",
            residual=residual,
            implementation="cpu",
        ),
        [IMAGES, IMAGES, (4,), (4,)],
        2,
    ),
    "covariance": (lambda x: covariance(x, implementation="cpu"), [IMAGES], 0),
}


@pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.covering
def test_results_and_gradients_are_those_of_float32_rounded(name, dtype):
    function, shapes, wide = OPERATIONS[name]
    rng = np.random.default_rng(0)
    dtypes = [dtype] * (len(shapes) - wide) + [jnp.float32] * wide
    operands = [
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    exact = [array.astype(jnp.float32) for array in operands]
    # Of a result that is rounded the gradient is, too; statistics have none.
    results, pull = jax.vjp(function, *operands)
    wanted, pull_exact = jax.vjp(function, *exact)
    first = jax.tree.leaves(results)[0]
    cotangent = jnp.asarray(rng.normal(size=first.shape), first.dtype)

    def cotangents(results):
        first, *rest = jax.tree.leaves(results)
        zeros = [jnp.zeros_like(array) for array in rest]
        arrays = [cotangent.astype(first.dtype), *zeros]
        return jax.tree.unflatten(jax.tree.structure(results), arrays)

    rounded = jax.tree.map(lambda want, found: want.astype(found.dtype), wanted, results)
    jax.tree.map(np.testing.assert_array_equal, results, rounded)
    gradients, expected = pull(cotangents(results)), pull_exact(cotangents(wanted))
    for gradient, want, array in zip(gradients, expected, operands, strict=True):
        assert gradient.dtype == array.dtype
        np.testing.assert_array_equal(gradient, want.astype(array.dtype))
    assert first.dtype == (jnp.float32 if name == "covariance" else dtype)
