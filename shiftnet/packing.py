"""Networks in small files: low-bit weights at their true width, in one `.safetensors` file.

Such a file holds, by the names that the arrays have in the network,

- `<layer>.weight`: the codes of low-bit weights, packed (`shiftnet.quantizers.bits`), uint8
  `[bytes]`; float weights as they are;
- `<layer>.weight_scale`: float32, for low-bit weights whose scale does not follow from their shape
  (`LowBitWeight.scale_shape`);
- `<layer>.activation.step` or `.threshold`, for layers that quantize their input;
- `<layer>.bias`, and the `scale` and `bias` of every batch norm, folded (`BatchNorm.fold`);
- in the metadata: the recipe, the names of the classes, the normalisation, and a SHA-256 of each
  tensor and of the other metadata.
"""

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet import config, models, quantizers, tensor_file
from shiftnet.errors import UserError
from shiftnet.files import write_atomically
from shiftnet.layers import BatchNorm
from shiftnet.layers.folding import fold_batch_norms
from shiftnet.quantizers import Activation, Fixed, Float, LowBitWeight, bits

FORMAT = "shiftnet packed 1"
RESTS = ("float32", "float16")
# The fields of a checkpoint's metadata that are kept, as JSON.
NOTE = ("config", "class_names", "mean", "std", "step")
UNDIVIDED = "undivided"  # by which held-out images are found again; older checkpoints have none


def write(
    path: str | PathLike[str], network: nnx.Module, note: Mapping[str, Any], rest: str = "float32"
) -> None:
    """Writes a network; its batch norms are folded, so it is changed.

    Args:
      path: the file; replaced once the new one is complete.
      network: with numbers.
      note: a checkpoint's.
      rest: dtype of what is not packed, `"float32"` or `"float16"`.

    Raises:
      UserError: where the file cannot be written, or `rest` cannot hold a number.
    """
    fold_batch_norms(network)
    tensors = {name: _narrowed(name, array, rest) for name, array in _tensors(network).items()}
    kept = [*NOTE, UNDIVIDED] if UNDIVIDED in note else NOTE
    metadata = {name: json.dumps(note[name]) for name in kept}
    write_atomically(Path(path), tensor_file.to_bytes(tensors, metadata, FORMAT))


def read(path: str | PathLike[str]) -> tuple[nnx.Module, dict[str, Any]]:
    """Reads a file that `write` wrote: the network and the note.

    The network's batch norms are folded, and its low-bit weights are `Fixed`.

    Raises:
      UserError: where it is not one, or was cut off or changed; it names the tensor.
    """
    path = Path(path)
    tensors, metadata = tensor_file.read(path, FORMAT)
    try:
        kept = [*NOTE, UNDIVIDED] if UNDIVIDED in metadata else NOTE
        note = {name: json.loads(metadata[name]) for name in kept}
        for name in {"config", UNDIVIDED} & note.keys():
            if not isinstance(note[name], str):
                raise TypeError(f"{name} is not a text")
        kinds = [(note["class_names"], str), (note["mean"], float), (note["std"], float)]
        if not all(values and all(isinstance(v, kind) for v in values) for values, kind in kinds):
            raise TypeError("class_names, mean or std is not a list of what it should be")
        if {len(note["mean"]), len(note["std"])} != {3} or not all(
            math.isfinite(value) and (value > 0 or values is note["mean"])
            for values in (note["mean"], note["std"])
            for value in values
        ):
            raise ValueError(f"mean {note['mean']} and std {note['std']} cannot normalize colours")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} has metadata that cannot be read: {error}") from error
    try:
        recipe = config.from_json(note["config"])
        data = recipe.data
        if 0 < data.resize < data.size:
            raise UserError(f"data.resize is {data.resize}, below data.size, which is {data.size}")
        network = _abstract(recipe.model, len(note["class_names"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _fill(network, tensors, path)
    return network, note


def _narrowed(name: str, array: np.ndarray, rest: str) -> np.ndarray:
    if array.dtype != np.float32 or name.endswith((".weight_scale", ".activation.step")):
        return array
    with np.errstate(over="ignore"):
        narrowed = array.astype(rest)
    if np.isinf(narrowed).any() and not np.isinf(array).any():
        largest = np.abs(array).max()
        raise UserError(
            f"{name} has a value of {largest:.3g}, more than {rest} holds; take float32"
        )
    return narrowed


def _abstract(model: Mapping[str, Any], num_classes: int) -> nnx.Module:
    def build() -> nnx.Module:
        network = models.build(model, num_classes, rngs=nnx.Rngs(0))
        for _, module in nnx.iter_modules(network):
            if isinstance(module, BatchNorm):
                module.set_folded(jnp.ones(module.features), jnp.zeros(module.features))
            elif isinstance(module, Activation):
                module.fold()
        return network

    return nnx.eval_shape(build)


def _tensors(network: nnx.Module) -> dict[str, np.ndarray]:
    forms = quantizers.of_layers(network)
    tensors = {}
    for layer, weight in forms.items():
        if isinstance(weight, LowBitWeight):
            quantized = weight.quantized()
            tensors[f"{layer}.weight"] = bits.pack(np.asarray(quantized.codes), quantized.bits)
            if weight.scale_shape is not None:
                tensors[f"{layer}.weight_scale"] = np.asarray(quantized.scale)
        else:
            tensors[f"{layer}.weight"] = np.asarray(weight())
    for name, leaf in _rest(network, quantizers.latents_of(network)):
        tensors[name] = np.asarray(leaf[...])
    return tensors


def _fill(network: nnx.Module, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Sets the numbers of a network from a file's tensors, whose digests are right."""
    forms, latents = quantizers.of_layers(network), quantizers.latents_of(network)

    def take(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> jnp.ndarray:
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "nothing"
            raise UserError(f"{path}: the network needs {name!r} of shape {shape}, found {found}")
        return jnp.asarray(tensors[name].astype(dtype))

    def fixed(weight: LowBitWeight) -> Fixed:
        name = names[id(weight)]
        try:
            codes = bits.unpack(tensors[name], weight.bits, weight.shape)
            scale = None
            if weight.scale_shape is not None:
                scale = np.asarray(take(f"{name}_scale", weight.scale_shape))
            return Fixed(weight, codes, scale)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"{path}: the packed weights {name!r} do not fit: {error}") from None

    names = {id(weight): f"{layer}.weight" for layer, weight in forms.items()}
    for _, layer in list(nnx.iter_modules(network)):  # of any kind in networks of people's own
        for attribute, weight in list(vars(layer).items()):
            if isinstance(weight, LowBitWeight):
                setattr(layer, attribute, nnx.data(fixed(weight)))
    for name, weight in forms.items():
        if isinstance(weight, Float):
            weight.value.set_value(take(f"{name}.weight", weight.shape))
    for name, leaf in _rest(network, latents):
        leaf.set_value(take(name, leaf.shape, leaf.dtype))


def _rest(network: nnx.Module, latents: tuple[str, ...]) -> list[tuple[str, nnx.Variable]]:
    """Returns the parameters other than weights, and batch statistics, by dotted name."""
    found = [
        (".".join(map(str, path)), leaf)
        # After folding only own networks have batch statistics.
        for path, leaf in nnx.to_flat_state(nnx.state(network, (nnx.Param, nnx.BatchStat)))
    ]
    return [(name, leaf) for name, leaf in found if not name.startswith(latents)]
