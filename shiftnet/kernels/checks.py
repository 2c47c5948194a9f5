"""What the operations ask of their arguments, beside what is their own; all raise `ValueError`."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.shift.offsets import ChannelOrder


def is_whole(*values: Any) -> bool:
    """Whether all are whole numbers of at least 1."""
    return all(isinstance(value, int | np.integer) and value >= 1 for value in values)


def known(operation: str, channel_order: ChannelOrder) -> None:
    """For a channel order that there is not."""
    orders = get_args(ChannelOrder)
    if channel_order not in orders:
        raise ValueError(
            f"unknown channel_order {channel_order!r} of {operation}; known: {', '.join(orders)}"
        )


def same_dtype(operation: str, x: jax.Array, **arrays: jax.Array | None) -> None:
    """For an `x` that is not floating, and `arrays` of another dtype than its."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{operation} needs a floating x, got {x.dtype}")
    for name, array in arrays.items():
        if array is not None and array.dtype != x.dtype:
            raise ValueError(
                f"{operation} needs {name} in the dtype of x, {x.dtype}, got {array.dtype}"
            )


def shaped(operation: str, shape: tuple[int, ...], **arrays: jax.Array | None) -> None:
    """For `arrays` that are not of the shape."""
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{operation} needs {name} of the shape {shape}, got {array.shape}")


def result_shape(x: jax.Array, features: int, stride: int) -> tuple[int, ...]:
    """Of what a 1x1 convolution at a stride makes of `x`, `[N, H, W, C]`."""
    images, height, width, _ = x.shape
    return images, -(-height // stride), -(-width // stride), features
