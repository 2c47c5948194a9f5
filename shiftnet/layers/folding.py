"""Batch norms folded into convolutions, and networks folded once they are trained."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from shiftnet.kernels.implementations import platform
from shiftnet.kernels.layouts import wide_dtype
from shiftnet.layers import moments
from shiftnet.layers.batch_norm import BatchNorm
from shiftnet.layers.conv import Conv
from shiftnet.layers.learned_shift import LearnedShift
from shiftnet.layers.linear import Linear
from shiftnet.quantizers import Activation, Float, LowBitWeight, QuantizedWeight, Weight


def fold_batch_norm(
    conv: Conv,
    norm: BatchNorm,
    x: jax.Array,
    *,
    train: bool = False,
    offsets: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into the 1x1 convolution before it: `norm(conv(x)) = x @ matrix + bias`.

    In evaluation the running statistics give the factor of each output channel. In training the
    batch's do, and those of `x @ kernel` follow from the mean and the covariance of `x`, so the
    convolution need not run for them (see `shiftnet.layers.moments`, also for the error bound); the
    running statistics are updated as by calling `norm`.

    Args:
      conv: a 1x1 convolution of stride 1, or at the pixels that it keeps.
      norm: of its result.
      x: `[N, H, W, in_features]`; in evaluation its dtype alone matters.
      train: as in calling `norm`.
      offsets: of a shift between the two, `(dh, dw)`, int `[out_features]` each:
        `norm(shift(conv(x))) = shift(x @ matrix) + bias`.

    Returns:
      The matrix, `[in_features, out_features]` in the dtype of `x`, and the bias, `[out_features]`
      in float32 or wider.
    """
    wide = wide_dtype(x.dtype)
    kernel = conv.matrix.astype(wide)
    if train:
        if offsets is None:
            mean, var = moments.of_product(x, kernel)
        else:
            mean, var = moments.of_shifted_product(x, kernel, *offsets)
        norm.update(mean, var, moments.pixels(x))
        scale, bias = norm.scale_and_bias(wide, (mean, var))
    else:
        scale, bias = norm.scale_and_bias(wide)
        if norm.mean is not None:
            # Without the barrier XLA computes the bias again for every value that it is added to.
            # The scale has none: where the kernel is a constant XLA multiplies them once.
            bias = jax.lax.optimization_barrier(bias)
    return (kernel * scale).astype(x.dtype), bias


def computed_once(x: jax.Array) -> jax.Array:
    """Returns `x`, which XLA's CPU backend then does not compute again for each of its readers."""
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def fold_batch_norms(network: nnx.Module) -> None:
    """Folds all that training changes beside weights into constants; training is over then.

    These are the statistics of batch norms and of activation forms, and rounded offsets of shifts.
    """
    for _, module in nnx.iter_modules(network):
        if isinstance(module, BatchNorm | Activation | LearnedShift):
            module.fold()


def fix_weights(
    network: nnx.Module,
    fix: Callable[[LowBitWeight], Weight | QuantizedWeight] = Float.of,
) -> None:
    """Replaces every low-bit weight by the same weight without latents.

    Args:
      network: changed in place.
      fix: `Float.of`, or `LowBitWeight.quantized` for codes of a byte.
    """
    for _, layer in list(nnx.iter_modules(network)):
        if isinstance(layer, Conv | Linear) and isinstance(layer.weight, LowBitWeight):
            layer.weight = nnx.data(fix(layer.weight))  # type: ignore[assignment]
