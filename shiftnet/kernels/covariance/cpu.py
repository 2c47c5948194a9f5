"""Sums of pixels and of their outer products on a CPU in float32, computed by `covariance.cc`."""

import jax
import jax.numpy as jnp


def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes what `xla.forward` does over all pixels, with the mean as the centre."""
    channels = x.shape[-1]
    shapes = (channels,), (channels, channels)
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    # The C++ loops over the leading axes that `jax.vmap` adds.
    call = jax.ffi.ffi_call("shiftnet_covariance", results, vmap_method="broadcast_all")
    total, products = call(x.reshape(-1, channels))
    return total, products
