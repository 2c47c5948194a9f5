"""Convolution without bias."""

import jax
from flax import nnx

from shiftnet import quantizers
from shiftnet.kernels.layouts import every, product
from shiftnet.quantizers.form import Form, Init
from shiftnet.quantizers.initializers import torch_uniform


class Conv(nnx.Module):
    """A square two-dimensional convolution without bias, padded by `kernel_size // 2` zeros.

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: side of the kernel, odd.
      stride: in pixels, both ways.
      groups: 1, or `in_features` for a depthwise convolution.
      weights: the form of the weight: a name in `shiftnet.quantizers.FORMS`, or what makes one.
      bits: bits per weight, where the named form has a choice; 0 for its own number.
      init: draws a float weight, `init(key, shape)`.
      rngs: the `params` stream.

    Attributes:
      weight: `[kernel_size, kernel_size, in_features // groups, out_features]`.

    Calling it on `[N, H, W, in_features]` returns
    `[N, ceil(H / stride), ceil(W / stride), out_features]` in the input's dtype.

    Raises:
      UserError: for a form, or a number of bits, that does not exist.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        weights: str | Form = "float",
        bits: int = 0,
        init: Init = torch_uniform,
        rngs: nnx.Rngs,
    ):
        form = quantizers.make(weights, bits) if isinstance(weights, str) else weights
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        self.weight = form(shape, init=init, rngs=rngs)
        self.stride = stride
        self.groups = groups

    @property
    def matrix(self) -> jax.Array:
        """The weight of a 1x1 convolution, `[in_features, out_features]`."""
        return self.weight()[0, 0]

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight().astype(x.dtype)
        if kernel.shape[:2] == (1, 1) and self.groups == 1:
            return product(every(x, self.stride), kernel[0, 0])
        pad = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
