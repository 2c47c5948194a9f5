"""The shift block on a CPU, computed by `shift_block.cc`.

In float64, and on machines without a compiler, it is `few_images`, which is plain XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import native
from shiftnet.kernels.shift_block import few_images

# The C++ goes over the stride's square, in half a second for 18 channels, however small the images.
MOST_STRIDE = 1024


def unsupported(x: jax.Array, w1: jax.Array, w2: jax.Array, **settings: Any) -> str | None:
    """Returns why these arguments are not supported, in one clause, or None."""
    if settings["stride"] > MOST_STRIDE:
        return f"the stride is more than {MOST_STRIDE}"
    return None if _is_compiled(x) else few_images.unsupported(x, w1, w2, **settings)


def forward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    out_bias: jax.Array | None = None,
    out_relu: bool = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Computes `shift_block` in NHWC."""
    if not _is_compiled(x):
        moves: dict[str, Any] = {"dh": dh, "dw": dw, "stride": stride}
        after: dict[str, Any] = {"out_bias": out_bias, "out_relu": out_relu, "residual": residual}
        return few_images.forward(x, w1, b1, w2, **moves, **after)
    size = (-(-length // stride) for length in x.shape[1:3])
    result = jax.ShapeDtypeStruct((len(x), *size, w2.shape[1]), x.dtype)
    nothing = jnp.zeros(0, jnp.float32)
    bias = nothing if out_bias is None else out_bias
    added = nothing if residual is None else residual
    operands = (x, w1, b1, w2, bias, added)
    settings = _moves(dh, dw, stride) | {"relu": out_relu}
    return native.call("shiftnet_shift_block", result, *operands, **settings)


def backward(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    dout: jax.Array,
    *,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `x`, `w1`, `b1` and `w2`; `dout` is that of the second product."""
    if not _is_compiled(x):
        return few_images.backward(x, w1, b1, w2, dout, dh=dh, dw=dw, stride=stride)
    operands = (x, w1, b1, w2)
    results = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in operands)
    settings = _moves(dh, dw, stride)
    return native.call("shiftnet_shift_block_gradients", results, *operands, dout, **settings)


def _is_compiled(x: jax.Array) -> bool:
    return native.unsupported(x.dtype) is None


def _moves(dh: np.ndarray, dw: np.ndarray, stride: int) -> dict[str, Any]:
    return {"dh": dh.astype(np.int64), "dw": dw.astype(np.int64), "stride": np.int64(stride)}
