"""Convolution without bias."""

from collections.abc import Callable

import jax
from flax import nnx

from shiftnet.kernels.conv import conv
from shiftnet.kernels.layouts import every, product
from shiftnet.weights import Float, Weight
from shiftnet.weights.initializers import torch_uniform


class Conv(nnx.Module):
    """A square two-dimensional convolution without bias, padded by `kernel_size // 2` zeros.

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: side of the kernel, odd.
      stride: in pixels, both ways.
      groups: 1, or `in_features` for a depthwise convolution.
      init: draws the weight, `init(key, shape)`.
      rngs: the `params` stream.

    Its `weight`, `[kernel_size, kernel_size, in_features // groups, out_features]`, is a `Float`
    that another weight form can replace.

    Calling it on `[N, H, W, in_features]` returns
    `[N, ceil(H / stride), ceil(W / stride), out_features]` in the input's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        init: Callable[..., jax.Array] = torch_uniform,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        self.weight: Weight = Float(shape, init=init, rngs=rngs)
        self.stride = stride
        self.groups = groups

    @property
    def matrix(self) -> jax.Array:
        """The weight of a 1x1 convolution, `[in_features, out_features]`."""
        return self.weight()[0, 0]

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight().astype(x.dtype)
        if kernel.shape[:2] == (1, 1) and self.groups == 1:
            return product(every(x, self.stride, "NHWC"), kernel[0, 0], "NHWC")
        return conv(x, kernel, stride=self.stride, groups=self.groups)
