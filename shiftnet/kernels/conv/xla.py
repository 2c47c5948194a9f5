"""Convolutions in plain XLA, for any device and dtype."""

import jax

from shiftnet.kernels.layouts import pointwise_conv, subsample


def forward(
    x: jax.Array, w: jax.Array, packed: jax.Array | None = None, *, stride: int, groups: int
) -> jax.Array:
    """Convolves `x`, `[N, H, W, C]`, with `w`, `[k, k, C / groups, K]`."""
    del packed
    if w.shape[:2] == (1, 1) and groups == 1:
        return pointwise_conv(subsample(x, stride), w[0, 0])
    pads = tuple((side // 2, side // 2) for side in w.shape[:2])
    return jax.lax.conv_general_dilated(
        x,
        w,
        window_strides=(stride, stride),
        padding=pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
