"""The shift block on a CPU in float32, computed by `shift_block.cc`.

Other dtypes, and machines without a compiler, use `few_images`, which is plain XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels import native
from shiftnet.kernels.shift_block import few_images


def unsupported(x: jax.Array, w1: jax.Array, w2: jax.Array, **settings: Any) -> str | None:
    """Returns why these arguments are not supported, in one clause, or None."""
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
    moves: dict[str, Any] = {"dh": dh, "dw": dw, "stride": stride}
    if not _is_compiled(x):
        after: dict[str, Any] = {"out_bias": out_bias, "out_relu": out_relu, "residual": residual}
        return few_images.forward(x, w1, b1, w2, **moves, **after)
    size = (-(-length // stride) for length in x.shape[1:3])
    result = jax.ShapeDtypeStruct((len(x), *size, w2.shape[1]), x.dtype)
    nothing = jnp.zeros(0, x.dtype)
    bias = nothing if out_bias is None else out_bias
    added = nothing if residual is None else residual
    operands = (x, w1, b1, w2, bias, added)
    return _call("shiftnet_shift_block", result, *operands, **moves, relu=out_relu)


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
    moves: dict[str, Any] = {"dh": dh, "dw": dw, "stride": stride}
    if not _is_compiled(x):
        return few_images.backward(x, w1, b1, w2, dout, **moves)
    results = tuple(jax.ShapeDtypeStruct(array.shape, x.dtype) for array in (x, w1, b1, w2))
    operands = (x, w1, b1, w2, dout)
    dx, dw1, db1, dw2 = _call("shiftnet_shift_block_gradients", results, *operands, **moves)
    return dx, dw1, db1.astype(b1.dtype), dw2


def _is_compiled(x: jax.Array) -> bool:
    return x.dtype == jnp.float32 and native.load().reason is None


def _call(
    name: str,
    results: Any,
    *arrays: jax.Array,
    dh: np.ndarray,
    dw: np.ndarray,
    stride: int,
    **settings: Any,
) -> Any:
    # The C++ loops over the leading axes that `jax.vmap` adds.
    call = jax.ffi.ffi_call(name, results, vmap_method="broadcast_all")
    moves = {"dh": dh.astype(np.int64), "dw": dw.astype(np.int64), "stride": np.int64(stride)}
    return call(*(array.astype(jnp.float32) for array in arrays), **moves, **settings)
