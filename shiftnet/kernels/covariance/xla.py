"""Sums of pixels and of their outer products in plain XLA, for any device and dtype."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shiftnet.kernels.layouts import other_axes, pixels, wide_dtype

# Factors that GPUs and TPUs round by default would show in variances much smaller than the largest.
EXACT = jax.lax.Precision.HIGHEST


def forward(
    x: jax.Array, centre: jax.Array | None = None, kept: str = ""
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of `x`, `[C]`, and that of the outer products of `x - centre`, `[C, C]`.

    Both are taken over all pixels of `[..., C]`, or for each row ("h"), column ("w") or both ("hw")
    of `[N, H, W, C]`, which are the first axes then. Without a centre it is the mean.
    """
    wide = x.astype(wide_dtype(x.dtype))
    batch = tuple(map("nhwc".index, kept))
    others = tuple(axis for axis in other_axes(x) if axis not in batch)
    total = wide.sum(others)
    centred = wide - (total / pixels(x) if centre is None else centre)
    if not kept:  # XLA's CPU backend then transposes nothing
        centred, others = centred.reshape(-1, centred.shape[-1]), (0,)
    dimensions = ((others, others), (batch, batch))
    products = jax.lax.dot_general(
        centred, centred, dimensions, precision=EXACT, out_sharding=_replicated(x)
    )
    return total, products


def _replicated(x: jax.Array) -> NamedSharding | None:
    """Returns the sharding of a sum over the batch, which a mesh of explicit axes must be told."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else None
