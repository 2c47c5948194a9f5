"""Sums of pixels and of their outer products."""

import jax

from shiftnet.kernels import checks
from shiftnet.kernels.covariance import cpu, xla
from shiftnet.kernels.whole_batch import Implementation, choose, either

__all__ = ["Implementation", "covariance"]


def covariance(
    x: jax.Array,
    centre: jax.Array | None = None,
    kept: str = "",
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of pixels, and that of the outer products of their distances to a centre.

    On a CPU the pixels are read once, if the sums are those of all and the centre is their mean.

    Args:
      x: `[..., C]`, floating.
      centre: `[C]`; None takes the mean.
      kept: which axes of `[N, H, W, C]` have sums of their own: "h", "w" or "hw"; none of them if
        it is empty.
      implementation: `"cpu"` is C++ compiled at its first use, not for float64; `"xla"` is plain
        XLA. None selects `"cpu"` on a CPU if it supports the arguments, a compiler was found and
        the batch is not divided over devices, else `"xla"`.

    Returns:
      `[C]` and `[C, C]`, after the kept axes, in float32 or the dtype of `x` if that is wider.

    Raises:
      ValueError: if `x` is not floating, or `implementation` is unknown or does not support it.
    """
    checks.same_dtype("covariance", x)
    of_all = centre is None and not kept
    if not of_all and implementation is None:
        return xla.forward(x, centre, kept)
    if choose("covariance", x, implementation) == "xla":
        return xla.forward(x, centre, kept)
    if not of_all:
        raise ValueError("covariance has no 'cpu' for this: it has a centre, or keeps axes")
    return either(cpu.forward, xla.forward, x, always=implementation is not None)
