"""Moments of products do not depend on how the batch lies on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shiftnet.kernels.shift import channel_offsets
from shiftnet.layers import moments


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.usefixtures("float64")
def test_a_mesh_with_explicit_axes_changes_no_moment_and_no_gradient(shifted):
    draw = np.random.default_rng(0)
    x, kernel = jnp.asarray(draw.normal(size=(4, 5, 6, 3))), jnp.asarray(draw.normal(size=(3, 18)))
    dh, dw = channel_offsets(18)

    def loss(x, kernel):
        if shifted:
            mean, var = moments.of_shifted_product(x, kernel, dh, dw)
        else:
            mean, var = moments.of_product(x, kernel)
        return jnp.sin(mean).sum() + jnp.log(var).sum()

    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = both(x, kernel)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
        value, (dx, dkernel) = both(x, kernel)
    assert jax.typeof(dx).sharding.spec[0] == "data"
    for ours, alone in zip((value, dx, dkernel), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shifted", [False, True])
def test_constant_channels_have_finite_variances(shifted):
    """A batch norm with a scale of zero makes such channels, and trained networks have some."""
    x = np.ones((32, 32, 32, 16), np.float32) * (np.arange(1, 17, dtype=np.float32) / 10)
    x[..., 3] = np.random.default_rng(0).normal(size=x.shape[:3])
    kernel = jnp.eye(16, dtype=jnp.float32)
    if shifted:
        var = moments.of_shifted_product(jnp.asarray(x), kernel, *(np.zeros(16, int),) * 2)[1]
    else:
        var = moments.of_product(jnp.asarray(x), kernel)[1]
    expected = np.where(np.arange(16) == 3, x[..., 3].var(), 0)
    np.testing.assert_allclose(var, expected, rtol=1e-4, atol=1e-6)
