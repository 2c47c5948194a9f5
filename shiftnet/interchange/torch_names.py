"""The originals' state-dict names and PyTorch's layouts, to and from our modules.

Modules carry the originals' names, so the map is mechanical: `layer2.0.conv1.weight.value` is
`layer2.0.conv1.weight` with its axes moved. Where originals call the same thing differently, a
`Naming` says how.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from shiftnet import quantizers


class Naming(NamedTuple):
    """How one original's names differ from ours.

    Attributes:
      layers: patterns of our paths and what takes their place.
      weight_suffix: what follows a layer's name in the name of its weight.
    """

    layers: tuple[tuple[str, str], ...] = ()
    weight_suffix: str = ".weight"


# All networks of arXiv:1711.08141's code: ShiftResNet, ResNet and its rivals.
SHIFT = Naming(((r"\.projection\b", ""),))
# torchvision's ResNets; S3 takes their names for ImageNet and CIFAR.
TORCHVISION = Naming(((r"\bshortcut\.projection\b", "downsample"), (r"^linear\b", "fc")))
# 1-bit wide ResNets.
WRN = Naming(((r"^(group\d)\.(\d+)", r"\1.block\2"),), weight_suffix="")

# Our names -> PyTorch's. `num_batches_tracked` counts steps there and has no use here.
_LEAVES = {
    "scale": ".weight",
    "bias": ".bias",
    "mean": ".running_mean",
    "var": ".running_var",
}
# Latents of `layer.weight`, as S3's code calls them; it holds the sign twice, under the name of the
# weight and as `weight_sign`. DenseShift's third gate and wider forms go on counting.
_LATENTS = {
    "value": "",
    "latent": "",
    "sign": "",
    "gate": "_val",
    "shift1": "_shift",
}


def _torch_name(path: tuple[str, ...], naming: Naming) -> str:
    latent = is_latent(path)
    layer = ".".join(path[:-2] if latent else path[:-1])
    for pattern, replacement in naming.layers:
        layer = re.sub(pattern, replacement, layer)
    if latent:
        suffix = _LATENTS.get(path[-1], f"_{path[-1]}")
        return f"{layer}{naming.weight_suffix}{suffix}"
    return f"{layer}{_LEAVES[path[-1]]}"


def is_latent(path: tuple[str, ...]) -> bool:
    """Whether the leaf at this path is one that a layer's weight is made of."""
    return len(path) > 1 and path[-2] == "weight"


def weight_name(layer: str, naming: Naming = SHIFT) -> str:
    """PyTorch's name of the weight of one of our layers, such as `layer1.0.conv1`."""
    return _torch_name((*layer.split("."), "weight", "value"), naming)


def low_bit(model: nnx.Module, naming: Naming = SHIFT) -> dict[str, quantizers.LowBitWeight]:
    """The model's low-bit weights by PyTorch's names."""
    return {
        weight_name(layer, naming): weight
        for layer, weight in quantizers.of_layers(model).items()
        if isinstance(weight, quantizers.LowBitWeight)
    }


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """An array of ours in PyTorch's layout."""
    return np.transpose(array, _axes_to_torch(array.ndim))


def _axes_to_torch(ndim: int) -> tuple[int, ...]:
    """Weights are [kh, kw, in, out] or [in, out] here, [out, in, kh, kw] or [out, in] there."""
    return (3, 2, 0, 1) if ndim == 4 else tuple(reversed(range(ndim)))


def to_torch(model: nnx.Module, naming: Naming = SHIFT) -> dict[str, np.ndarray]:
    """The model's parameters and running statistics under PyTorch's names and in its layouts."""
    return {
        _torch_name(path, naming): to_torch_layout(np.asarray(leaf[...]))
        for path, leaf in _leaves(model)
    }


def from_torch(
    model: nnx.Module,
    state_dict: Mapping[str, np.ndarray],
    naming: Naming = SHIFT,
    *,
    codes: Mapping[str, np.ndarray] | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Sets the model's parameters and running statistics, keeping the given arrays' dtypes.

    Args:
      model: changed in place.
      state_dict: arrays by PyTorch's names. Names that the model lacks are ignored.
      naming: whose names they are.
      codes: of low-bit weights whose latents are not in `state_dict`, in PyTorch's layout and by
        the name of the weight; see `LowBitWeight.set_quantized`.
      scales: those of such weights that need one, by the same names.

    Raises:
      KeyError: for a name that is missing.
      ValueError: for an array of the wrong shape.
    """
    coded = set()
    for name, weight in low_bit(model, naming).items():
        if codes and name in codes:
            scale = None if weight.scale_shape is None else (scales or {})[name]
            weight.set_quantized(_from_torch_layout(name, codes[name], weight.shape), scale)
            coded.add(name)
    for path, leaf in _leaves(model):
        if not (is_latent(path) and weight_name(".".join(path[:-2]), naming) in coded):
            name = _torch_name(path, naming)
            leaf.set_value(
                jax.numpy.asarray(_from_torch_layout(name, state_dict[name], leaf.shape))
            )


def _from_torch_layout(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = _axes_to_torch(len(shape))
    expected = tuple(shape[axis] for axis in axes)
    if array.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, found {array.shape}")
    return np.transpose(array, np.argsort(axes))


def names(model: nnx.Module, naming: Naming = SHIFT) -> dict[str, tuple[int, ...]]:
    """PyTorch's name and shape of each of the model's parameters and running statistics."""
    return {
        _torch_name(path, naming): tuple(leaf.shape[axis] for axis in _axes_to_torch(leaf.ndim))
        for path, leaf in _leaves(model)
    }


def _leaves(model: nnx.Module) -> list[tuple[tuple[str, ...], nnx.Variable]]:
    return [
        (tuple(map(str, path)), leaf)
        for path, leaf in nnx.iter_graph(model)
        if isinstance(leaf, nnx.Param | nnx.BatchStat)
    ]
