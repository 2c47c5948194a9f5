"""Batch norms folded into convolutions, and networks folded once they are trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet.kernels.conv import pack
from shiftnet.kernels.implementations import platform
from shiftnet.kernels.layouts import pixels, wide_dtype
from shiftnet.layers import moments
from shiftnet.layers.batch_norm import BatchNorm
from shiftnet.layers.conv import Conv
from shiftnet.layers.learned_shift import LearnedShift
from shiftnet.layers.linear import Linear
from shiftnet.layers.rectifier import relu
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
        norm.update(mean, var, pixels(x))
        scale, bias = norm.scale_and_bias(wide, (mean, var))
    else:
        scale, bias = norm.scale_and_bias(wide)
        if norm.mean is not None:
            # Without the barrier XLA computes the bias again for every value that it is added to.
            # The scale has none: where the kernel is a constant XLA multiplies them once.
            bias = jax.lax.optimization_barrier(bias)
    return (kernel * scale).astype(x.dtype), bias


def convolve(
    conv: Conv,
    norm: BatchNorm | None,
    x: jax.Array,
    rectify: Callable[[jax.Array], jax.Array] | None = None,
    *,
    residual: jax.Array | None = None,
    train: bool,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Computes `rectify(norm(conv(x)) + residual)`, in evaluation as one operation.

    In training all but the convolution is one.

    Layers of a class of their own, such as those that record what they return, are called.

    Args:
      conv: any convolution.
      norm: of its result; None for none.
      x: `[N, H, W, in_features]`.
      rectify: as `rectifier` returns it; None for none.
      residual: in the shape of the result; None adds nothing.
      train: as in calling the layers.
      drop: in training, applied before the residual is added, such as `drop_path`; None for none.
    """
    own = type(conv) is not Conv or type(norm) not in (BatchNorm, type(None))
    if own or rectify not in (None, relu) or (train and (norm is None or drop is not None)):
        y = conv(x, train=train)
        y = y if norm is None else norm(y, train=train)
        if residual is not None:
            y = (y if drop is None else drop(y)) + residual
        return y if rectify is None else rectify(y)
    after: dict[str, Any] = {"residual": residual, "out_relu": "last" if rectify else False}
    if train and norm is not None:
        return norm(conv(x, train=True), train=True, **after)
    if norm is not None:
        after["out_scale"], after["out_bias"] = norm.scale_and_bias(wide_dtype(x.dtype))
    return conv(x, **after)


def normalize(
    norm: BatchNorm, x: jax.Array, rectify: Callable[[jax.Array], jax.Array], *, train: bool
) -> jax.Array:
    """Computes `rectify(norm(x))`, in training with a ReLU as one operation.

    Args:
      norm: of a class of its own it is called by itself.
      x: `[..., features]`.
      rectify: as `rectifier` returns it.
      train: as in calling the layer.
    """
    if type(norm) is BatchNorm and rectify is relu:
        return norm(x, train=train, out_relu=True)
    return rectify(norm(x, train=train))


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


class Packed(nnx.Variable):
    """Weights that `pack_weights` arranged."""


def pack_weights(network: nnx.Module) -> None:
    """Packs the float32 weights of convolutions, so that programs on a CPU need not do it again.

    They are for predictions only: later changes of the weights have no effect on them. They take up
    to 1.8 times as much memory as the weights, which stay for other dtypes and devices.
    """
    if platform() != "cpu":
        return
    for _, layer in nnx.iter_modules(network):
        if not isinstance(layer, Conv) or not isinstance(layer.weight, Float):
            continue
        if layer.groups == 1 < layer.weight.shape[0]:  # there is little to pack in 1x1 ones
            packed = pack(np.asarray(layer.weight()), stride=layer.stride)
            if packed is not None:
                layer.packed = nnx.data(Packed(jnp.asarray(packed)))
