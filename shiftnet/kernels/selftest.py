"""Whether the kernels can be trusted on this device: they are run once against plain XLA.

Kernels are written for machines that not every developer has. A wrong result must never reach a
user, so the first program that could use a device's kernels runs them on a small batch first.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import Layout, from_nhwc

# Of the largest value: bfloat16 kernels, which round their results and the expanded tensor between,
# against float32. What goes wrong in a kernel is a channel, a row or a column, not a digit.
TOLERANCE = 2.0**-5


@functools.cache
def failure(platform: str) -> str | None:
    """Why the kernels of the default device are not to be used; None when they are right.

    Warns, once, where they are not.

    Args:
      platform: "tpu" or "gpu".
    """
    # In a thread of its own, since this one may be tracing a program.
    with ThreadPoolExecutor(1) as executor:
        reason = executor.submit(_compare, platform).result()
    if reason:
        warnings.warn(
            f"the {platform} kernels are left out, plain XLA is used: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _compare(platform: str) -> str | None:
    run = jax.jit(lambda call, implementation, *x: call(implementation, *x), static_argnums=(0, 1))
    try:
        for name, call, operands in _cases(platform):
            expected = run(call, "xla", *(x.astype(jnp.float32) for x in operands))
            found = run(call, platform, *operands)
            for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                difference = np.abs(a - b).max() / np.abs(a).max()
                if not difference <= TOLERANCE:
                    return f"{name} is off by {difference:.1e} of the largest value"
    except Exception as error:  # a compiler's, an unsupported device's, anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _cases(platform: str) -> Iterator[tuple[str, Callable[..., Any], tuple[jax.Array, ...]]]:
    """Name, `call(implementation, *operands)` and operands that the platform's kernels take."""
    from shiftnet.kernels.shift import shift
    from shiftnet.kernels.shift_block import shift_block
    from shiftnet.kernels.shift_pointwise import shift_pointwise

    layout: Layout = "HWCN" if platform == "tpu" else "NHWC"
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    x, wide = (from_nhwc(array(128, 4, 8, c), layout) for c in (16, 144))
    w1, b1, w2 = array(16, 144), array(144), array(144, 16)

    def with_gradients(operation, implementation, *operands):
        f = partial(operation, layout=layout, implementation=implementation)
        y, pull = jax.vjp(f, *operands)
        return y, pull(y)

    for stride in (1, 2):
        block = partial(shift_block, stride=stride)
        pointwise = partial(shift_pointwise, stride=stride, relu=True, channel_order="grouped")
        for name, operation, operands in (
            ("shift_block", block, (x, w1, b1, w2)),
            ("shift_pointwise", pointwise, (wide, w2)),
        ):
            yield f"{name} at stride {stride}", partial(with_gradients, operation), operands
    yield "shift", partial(with_gradients, shift), (wide,)

    from shiftnet.kernels.packed_matmul import pack, packed_matmul

    def multiply(packed, implementation, x):
        return packed_matmul(x, packed, implementation=implementation)

    for levels in (-1.0, 1.0), (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0):
        packed = pack(rng.integers(0, len(levels), (512, 256)), levels)
        yield f"packed_matmul of {len(levels)} levels", partial(multiply, packed), (array(16, 512),)
