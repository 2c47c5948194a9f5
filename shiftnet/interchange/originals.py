"""A network's arrays under its original's names, and the files that carry them.

The arrays alone do not say everything: 1-bit latents look like float weights, and nothing in them
names the classes or the normalisation. So a file carries a description beside them, where a
PyTorch program that loads the state dict does not meet it:

| file | where the description lies |
|---|---|
| .safetensors | in the metadata, under `shiftnet.model` |
| .npz | likewise, in the zip archive's comment, a JSON object |
| .pth | under `shiftnet.model`, beside `state_dict` |

It is a JSON object of `config` (the recipe, as text), `class_names`, `mean` and `std`.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from shiftnet import config as config_lib
from shiftnet import data
from shiftnet.errors import UserError
from shiftnet.interchange import torch_names
from shiftnet.interchange.recognition import Arrays, Recognised
from shiftnet.layers import LearnedShift
from shiftnet.models import parse_arch
from shiftnet.quantizers import activations_of_layers

ENDINGS = (".safetensors", ".npz", ".pth")
DESCRIPTION = "shiftnet.model"
DESCRIBED = ("config", "class_names", "mean", "std")
_MOST_COMMENT = 65_535  # bytes of a zip's comment


def naming(model: Mapping[str, Any]) -> torch_names.Naming:
    """How the original of a network calls its arrays.

    Args:
      model: a recipe's `config.model`.
    """
    family, _ = parse_arch(model["arch"])
    if family == "wrn":
        return torch_names.WRN
    # S3's CIFAR networks are ResNets under torchvision's names.
    is_s3 = family == "resnet" and model["weights"] in ("s3", "denseshift")
    is_shift_codes = family.endswith("resnet") and family != "imagenet_resnet"
    return torch_names.SHIFT if is_shift_codes and not is_s3 else torch_names.TORCHVISION


def arrays(network: nnx.Module, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The network's parameters and running statistics, in PyTorch's layouts.

    Low-bit weights are there as their latents. Every batch norm has a `num_batches_tracked` of 0,
    which PyTorch expects and nothing here counts.

    Args:
      network: with batch norms.
      model: the recipe's `config.model` that it was built by.

    Raises:
      UserError: for a packed network, whose batch norms are folded, quantized activations
        or learned shifts.
    """
    if not nnx.to_flat_state(nnx.state(network, nnx.BatchStat)):
        raise UserError(
            "the network is packed: its batch norms are no longer the original's; --integers "
            "writes it as it is"
        )
    refuse_new_layers(network)
    return _counted(torch_names.to_torch(network, naming(model)))


def refuse_new_layers(network: nnx.Module) -> None:
    """Raises a `UserError` for quantized activations and learned shifts, which no original has."""
    for layer, form in activations_of_layers(network).items():
        raise UserError(
            f"{layer} has {form.bits}-bit activations, which the originals' formats cannot hold"
        )
    if any(isinstance(module, LearnedShift) for _, module in nnx.iter_modules(network)):
        raise UserError(
            "the network's shifts are learned, which the originals' formats cannot hold"
        )


def packed(network: nnx.Module, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A 1-bit wide ResNet as its original packs it: `arrays` with the prefix `module.`.

    The signs of every 1-bit convolution are bits, 1 for plus, packed along the input channels:
    uint8 `[out, in / 8, 3, 3]`.

    Raises:
      UserError: for another network, or one whose channels 8 does not divide.
    """
    if naming(model) is not torch_names.WRN or model["weights"] != "sign":
        raise UserError(f"--packed is for 1-bit wide ResNets, this is a {model['arch']}")
    if model["quantize_first_last"]:
        raise UserError("--packed has no 1-bit first and last layer, this network has; --integers")
    if model["weights_first_last"] or model["weights_of"]:
        raise UserError("--packed has one form of weights, this network has several; --integers")
    result = arrays(network, model)
    for name, array in result.items():
        if name.startswith("group") and ".conv" in name:
            if array.shape[1] % 8:
                raise UserError(f"--packed needs channels that 8 divides, {name} has {array.shape}")
            result[name] = np.packbits(array >= 0, axis=1)
    return {f"module.{name}": array for name, array in result.items()}


def integers(network: nnx.Module, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The network with its low-bit weights as integers, for hardware.

    By the original's names and in PyTorch's layouts (`[out, in, kh, kw]`, `[out, in]`):

    - `<layer>.weight`: of a low-bit layer the levels, int8 (int16 for 4-bit DenseShift, whose
      largest is 128, and for 5-bit pot), and `<layer>.weight_scale`, a float32 number: the layer
      computes with `weight * weight_scale`. Of a float layer the float32 weights.
    - `<layer>.bias` of a linear layer, float32.
    - of a batch norm `weight`, `bias`, `running_mean`, `running_var`, float32 `[channels]`, and
      `num_batches_tracked`: `(x - running_mean) / sqrt(running_var + 1e-5) * weight + bias`. A wide
      ResNet's have no weight and bias (1 and 0). In a network that was read from a packed file
      they have nothing else: `x * weight + bias`.

    A wide ResNet's layers are called `group0.block0.conv0`, without `.weight`.

    Raises:
      UserError: for a network without low-bit weights, or with quantized
        activations or learned shifts.
    """
    refuse_new_layers(network)
    names = naming(model)
    result: dict[str, np.ndarray] = {}
    weights = torch_names.low_bit(network, names)
    if not weights:
        raise UserError(f"--integers is for low-bit weights, this {model['arch']}'s are float")
    for name, array in torch_names.to_torch(network, names).items():
        owner = next((w for w in weights if name == w or name.startswith(f"{w}_")), None)
        if owner is None:
            result[name] = array
        elif owner not in result:
            weight = weights[owner].quantized()
            dtype = np.int8 if max(weight.levels) <= np.iinfo(np.int8).max else np.int16
            levels = np.asarray(weight.levels, dtype)[np.asarray(weight.codes)]
            result[owner] = torch_names.to_torch_layout(levels)
            result[f"{owner}_scale"] = np.asarray(weight.scale, np.float32)
    return _counted(result)


def _counted(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    counts = {
        name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
        for name in named
        if name.endswith(".running_var")
    }
    return {name: np.array(array, order="C") for name, array in {**named, **counts}.items()}


# Files.


def description(metadata: Mapping[str, Any]) -> str:
    """What a file says of the network whose arrays it holds.

    Args:
      metadata: a checkpoint's.
    """
    return json.dumps({name: metadata[name] for name in DESCRIBED})


def to_bytes(named: Mapping[str, np.ndarray], text: str, ending: str, *, bare: bool) -> bytes:
    """The content of a file of arrays.

    Args:
      named: the arrays.
      text: from `description`.
      ending: one of `ENDINGS`; `.pth` needs PyTorch.
      bare: whether a `.pth` is the state dict itself, with no place for the description, as the
        1-bit wide ResNet's code reads its packed files.

    Raises:
      UserError: where the description does not fit.
    """
    file = io.BytesIO()
    if ending == ".npz":
        np.savez(file, **named)  # type: ignore[arg-type]
        return _with_comment(file.getvalue(), text)
    if ending == ".safetensors":
        import safetensors.numpy

        return safetensors.numpy.save(dict(named), {"format": "pt", DESCRIPTION: text})
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in named.items()}
    torch.save(tensors if bare else {"state_dict": tensors, DESCRIPTION: text}, file)
    return file.getvalue()


def _with_comment(archive: bytes, text: str) -> bytes:
    """A zip archive without a comment, with one."""
    comment = json.dumps({DESCRIPTION: text}).encode()
    if len(comment) > _MOST_COMMENT:
        raise UserError(
            f"the recipe and the class names take {len(comment)} bytes, of which an .npz can hold "
            f"{_MOST_COMMENT}; take .safetensors"
        )
    return archive[:-2] + len(comment).to_bytes(2, "little") + comment


def described(facts: Mapping[str, object]) -> dict[str, Any] | None:
    """The description among what a file says beside its arrays; None where it has none.

    Raises:
      UserError: where it is damaged.
    """
    text = facts.get(DESCRIPTION)
    if text is None:
        return None
    try:
        if not isinstance(text, str):
            raise TypeError(f"found {type(text).__name__}")
        found = json.loads(text)
        found = {name: found[name] for name in DESCRIBED}
        names = found["class_names"]
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("class_names is not a list of texts")
        config_lib.from_json(found["config"])
        data.normalization(data.IMAGENET, found["mean"], found["std"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # UserError is a ValueError
        raise UserError(f"its description of the network cannot be read: {error}") from error
    return found


def recognise_described(named: Arrays, found: Mapping[str, Any]) -> Recognised:
    """The network that a file's description names, with the file's arrays.

    Args:
      named: the arrays, without the prefix `module.`.
      found: from `described`.

    Raises:
      UserError: where the arrays cannot be such a network's.
    """
    model = config_lib.from_json(found["config"]).model
    classes = len(found["class_names"])
    _, depth = parse_arch(model.arch)
    if depth and depth > len(named):  # before a network of any depth is built
        raise UserError(f"{model.arch} is described, which has more than {len(named)} arrays")
    names = naming(model)
    codes = {
        name: np.unpackbits(array, axis=1)
        for name, array in named.items()
        if array.dtype == np.uint8 and array.ndim == 4  # as `packed` writes them
    }
    rest = {name: array for name, array in named.items() if name not in codes}
    return Recognised(model.to_dict(), classes, names, rest, codes)
