"""float32 rows as three bfloat16 rows each, for kernels whose products are of bfloat16.

A float32 has 24 significant bits, a bfloat16 8, so three of them hold it exactly, and a product
with weights that are exact in bfloat16 loses nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np


def split(x: jax.Array) -> jax.Array:
    """float32 `[N, K]` as bfloat16 `[3 N, K]`, whose three parts add up to it (see `join`)."""
    parts, rest = [], x
    for _ in range(3):
        # Cut off, not rounded, so that no finite number becomes infinite.
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & np.int32(-0x10000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part)
        rest = rest - part
    finite = jnp.isfinite(x)
    parts = [jnp.where(finite, parts[0], x), *(jnp.where(finite, p, 0) for p in parts[1:])]
    return jnp.concatenate(parts).astype(jnp.bfloat16)


def join(y: jax.Array) -> jax.Array:
    """The sum of the three parts of float32 `[3 N, M]`."""
    first, second, third = jnp.split(y, 3)
    return first + (second + third)
