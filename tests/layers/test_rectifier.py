"""ReActNet's RPReLU, against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shiftnet.layers import RPReLU


@pytest.mark.usefixtures("float64")
def test_rprelu_and_its_gradients_are_the_papers():
    draw = np.random.default_rng(0)
    x, cotangent = draw.normal(size=(2, 2, 4, 4, 3))
    slope, shift_in, shift_out = (draw.normal(size=3).astype(np.float32) for _ in range(3))
    x[0, 0, 0] = shift_in  # the kink
    layer = RPReLU(3)
    for name, value in (("slope", slope), ("shift_in", shift_in), ("shift_out", shift_out)):
        getattr(layer, name).set_value(jnp.asarray(value))
    graphdef, params = nnx.split(layer)
    y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, jnp.asarray(x))
    grads, dx = pull(jnp.asarray(cotangent))
    centred, above = x - shift_in, x > shift_in
    np.testing.assert_allclose(y, np.where(above, centred, slope * centred) + shift_out, rtol=1e-14)
    by_x = np.where(above, 1, slope) * cotangent
    np.testing.assert_allclose(dx, by_x, rtol=1e-14)
    expected = {
        "slope": np.where(above, 0, centred * cotangent),
        "shift_in": -by_x,
        "shift_out": cotangent,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(grads[name][...], value.sum((0, 1, 2)), rtol=1e-5, err_msg=name)
