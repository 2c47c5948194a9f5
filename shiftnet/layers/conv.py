"""Convolution without bias."""

from typing import Any

import jax
from flax import nnx

from shiftnet import quantizers
from shiftnet.kernels import checks
from shiftnet.kernels.conv import conv
from shiftnet.kernels.layouts import pointwise_conv, subsample
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
      activations: the form of the input: a name in `shiftnet.quantizers.ACTIVATIONS`.
      rectified: whether the input has no negative values, because a ReLU comes last before it.
      init: draws a float weight, `init(key, shape)`.
      rngs: the `params` stream.

    Attributes:
      weight: `[kernel_size, kernel_size, in_features // groups, out_features]`.
      activation: what quantizes the input; None for `"float"`.
      packed: of a network that only predicts, what `shiftnet.kernels.conv.pack` makes of the
        weight, a variable; else None.

    Calling it on `[N, H, W, in_features]` returns
    `[N, ceil(H / stride), ceil(W / stride), out_features]` in the input's dtype; with `train` the
    activation form updates its statistics. `after` is what `shiftnet.kernels.conv` does to the
    result: `out_scale`, `out_bias`, `out_relu` and `residual`.

    Raises:
      UserError: for a form, or a number of bits, that does not exist.
      ValueError: for sizes that do not fit, and when called on an input that is not floating or has
        other axes or channels.
    """

    activation: quantizers.Activation | None

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
        activations: str = "float",
        rectified: bool = False,
        init: Init = torch_uniform,
        rngs: nnx.Rngs,
    ):
        if not checks.is_whole(kernel_size, stride, groups) or kernel_size % 2 == 0:
            raise ValueError(
                "Conv needs an odd kernel_size, a stride and groups, whole numbers of at least 1, "
                f"got {kernel_size}, {stride} and {groups}"
            )
        if in_features % groups or out_features % groups:
            raise ValueError(
                f"Conv needs groups that divide its {in_features} and {out_features} channels, "
                f"got {groups}"
            )
        form = quantizers.make(weights, bits) if isinstance(weights, str) else weights
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        self.weight = form(shape, init=init, rngs=rngs)
        quantizer = quantizers.activation(activations, in_features, rectified=rectified)
        self.activation = nnx.data(quantizer)
        self.stride = stride
        self.groups = groups
        self.packed: Any = nnx.data(None)

    @property
    def matrix(self) -> jax.Array:
        """The weight of a 1x1 convolution, `[in_features, out_features]`."""
        return self.weight()[0, 0]

    def read(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the input as the layer computes with it, quantized where it has a form."""
        return x if self.activation is None else self.activation(x, train=train)

    def __call__(self, x: jax.Array, *, train: bool = False, **after: Any) -> jax.Array:
        checks.images("Conv", x, self.weight.shape[2] * self.groups)
        kernel = self.weight().astype(x.dtype)
        if kernel.shape[:2] == (1, 1) and self.groups == 1 and not after:
            return pointwise_conv(self.read(subsample(x, self.stride), train=train), kernel[0, 0])
        x = self.read(x, train=train)
        packed = None if self.packed is None else self.packed[...]
        return conv(x, kernel, stride=self.stride, groups=self.groups, packed=packed, **after)
