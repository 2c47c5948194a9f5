"""Sums of pixels and of their outer products on a CPU, computed by `covariance.cc`."""

import jax
import jax.numpy as jnp

from shiftnet.kernels import native


def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes what `xla.forward` does over all pixels, with the mean as the centre."""
    channels = x.shape[-1]
    shapes = (channels,), (channels, channels)
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return native.call("shiftnet_covariance", results, x.reshape(-1, channels))
