"""The originals' state-dict names and PyTorch's layouts, to and from our modules.

Modules carry the originals' names, so the map is mechanical: `layer2.0.conv1.kernel` is
`layer2.0.conv1.weight` with its axes moved.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

# Our leaf name -> PyTorch's. `num_batches_tracked` counts steps there and has no use here.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _torch_name(path: tuple) -> str:
    parts = [str(part) for part in path if part != "projection"]
    return ".".join([*parts[:-1], _LEAVES[parts[-1]]])


def _axes_to_torch(path: tuple, ndim: int) -> tuple[int, ...]:
    """Kernels are [kh, kw, in, out] or [in, out] here, [out, in, kh, kw] or [out, in] there."""
    if path[-1] == "kernel":
        return (3, 2, 0, 1) if ndim == 4 else (1, 0)
    return tuple(range(ndim))


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's parameters and running statistics under PyTorch's names and in its layouts."""
    return {
        _torch_name(path): np.transpose(np.asarray(leaf[...]), _axes_to_torch(path, leaf.ndim))
        for path, leaf in _leaves(model)
    }


def from_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters and running statistics, keeping the given arrays' dtypes.

    Args:
      model: changed in place.
      state_dict: arrays by PyTorch's names. Names that the model lacks are ignored.

    Raises:
      KeyError: for a name that is missing.
      ValueError: for an array of the wrong shape.
    """
    for path, leaf in _leaves(model):
        name = _torch_name(path)
        axes = _axes_to_torch(path, leaf.ndim)
        value = np.transpose(state_dict[name], np.argsort(axes))
        if value.shape != leaf.shape:
            raise ValueError(f"{name}: expected shape {leaf.shape}, found {value.shape}")
        leaf.set_value(jax.numpy.asarray(value))


def _leaves(model: nnx.Module) -> list[tuple[tuple, nnx.Variable]]:
    return [
        (path, leaf)
        for path, leaf in nnx.iter_graph(model)
        if isinstance(leaf, nnx.Param | nnx.BatchStat)
    ]
