"""Second derivatives: of programs for devices, whose first ones are kernels of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.kernels.implementations import lowered_for, only_xla
from shiftnet.kernels.shift import shift
from shiftnet.kernels.shift_block import shift_block
from shiftnet.kernels.shift_pointwise import shift_pointwise

PLATFORMS = {"tpu": jnp.float32, "gpu": jnp.bfloat16}
KERNELS = ("pallas_call", "core_map", "mpmd_map")  # as JAX's versions have called them
OPERATIONS = {
    "shift": lambda x, w1, b1, w2: shift(x),
    "shift_pointwise": lambda x, w1, b1, w2: shift_pointwise(
        jnp.concatenate([x] * 9, 3), w2, channel_order="grouped"
    ),
    "shift_block": shift_block,
}


def products_with_hessian(operation, dtype):
    """Gradients of the gradients' sum, after a nonlinear function of the result."""
    rng = np.random.default_rng(0)
    shapes = [(128, 4, 4, 16), (16, 144), (144,), (144, 16)]
    x, w1, b1, w2 = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    operands = (x, w1, b1.astype(jnp.float32), w2)

    def loss(*operands):
        return jnp.square(OPERATIONS[operation](*operands).astype(jnp.float32)).mean()

    def sum_of_gradients(*operands):
        gradients = jax.grad(loss, (0, 1, 2, 3))(*operands)
        return sum(jnp.sum(gradient.astype(jnp.float32)) for gradient in gradients)

    return jax.make_jaxpr(sum_of_gradients)(*operands), jax.jit(
        jax.grad(sum_of_gradients, (0, 1, 2, 3))
    )(*operands)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.covering
def test_second_derivatives_go_through_kernels(operation, platform):
    with only_xla():
        _, expected = products_with_hessian(operation, PLATFORMS[platform])
    with lowered_for(platform):  # on this CPU plain XLA serves in the end
        program, found = products_with_hessian(operation, PLATFORMS[platform])
    assert any(kernel in str(program) for kernel in KERNELS)
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=1e-5, atol=1e-6
        )
