"""Checks of arguments that several operations share; all raise `ValueError`."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.shift.offsets import ChannelOrder, Neighbourhood, Offsets


def is_whole(*values: Any) -> bool:
    """Returns whether all values are integers of at least 1."""
    return all(isinstance(value, int | np.integer) and value >= 1 for value in values)


def moves(
    operation: str,
    channels: int,
    kernel_size: int,
    dilation: int,
    channel_order: ChannelOrder = "interleaved",
    offsets: Offsets | None = None,
) -> Offsets | Neighbourhood:
    """Returns the channels' offsets; raises if a size or the number of offsets is wrong."""
    if offsets is not None:
        dh, dw = offsets
        if len(dh) != channels or len(dw) != channels:
            raise ValueError(
                f"{operation} needs two offsets for each of {channels} channels, "
                f"got {len(dh)} and {len(dw)}"
            )
        if not all(isinstance(offset, int | np.integer) for offset in (*dh, *dw)):
            raise ValueError(f"{operation} needs offsets that are whole numbers")
        return Offsets(tuple(map(int, dh)), tuple(map(int, dw)))
    _known(operation, channel_order)
    if not is_whole(kernel_size, dilation):
        raise ValueError(
            f"{operation} needs a whole kernel_size and dilation of at least 1, "
            f"got kernel_size {kernel_size} and dilation {dilation}"
        )
    return Neighbourhood(kernel_size, dilation, channel_order)


def stride(operation: str, value: int) -> None:
    """Raises if the stride is not an integer of at least 1."""
    if not is_whole(value):
        raise ValueError(f"{operation} needs a whole stride of at least 1, got {value}")


def _known(operation: str, channel_order: ChannelOrder) -> None:
    orders = get_args(ChannelOrder)
    if channel_order not in orders:
        raise ValueError(
            f"unknown channel_order {channel_order!r} of {operation}; known: {', '.join(orders)}"
        )


def same_dtype(operation: str, x: jax.Array, **arrays: jax.Array | None) -> None:
    """Raises if `x` is not floating point or one of `arrays` has another dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{operation} needs a floating x, got {x.dtype}")
    for name, array in arrays.items():
        if array is not None and array.dtype != x.dtype:
            raise ValueError(
                f"{operation} needs {name} in the dtype of x, {x.dtype}, got {array.dtype}"
            )


def channels(operation: str, x: jax.Array, features: int) -> None:
    """Raises if `x` is not floating point or has another number of channels."""
    same_dtype(operation, x)
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"{operation} needs x of {features} channels, got the shape {x.shape}")


def images(operation: str, x: jax.Array, features: int) -> None:
    """Raises if `x` is not `[N, H, W, features]`, floating point."""
    channels(operation, x, features)
    if x.ndim != 4:
        raise ValueError(f"{operation} needs x [N, H, W, C], got the shape {x.shape}")


def shaped(operation: str, shape: tuple[int, ...], **arrays: jax.Array | None) -> None:
    """Raises if one of `arrays` has another shape."""
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{operation} needs {name} of the shape {shape}, got {array.shape}")


def result_shape(x: jax.Array, features: int, stride: int) -> tuple[int, ...]:
    """Returns the shape of a strided 1x1 convolution of `x`, `[N, H, W, C]`."""
    images, height, width, _ = x.shape
    return images, -(-height // stride), -(-width // stride), features
