"""Which network some arrays under an original's names belong to."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shiftnet.config import default_config
from shiftnet.errors import UserError
from shiftnet.interchange.torch_names import SHIFT, TORCHVISION, WRN, Naming
from shiftnet.models import imagenet_resnet
from shiftnet.models.resnet import WIDTHS

Arrays = Mapping[str, np.ndarray]

S3_LEVELS = (-4, -2, -1, 0, 1, 2, 4)  # of the only width that S3's authors released

MOST_BLOCKS = 400  # in a stage: the deepest ResNet for CIFAR that was published has 200


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What some arrays are.

    Attributes:
      model: as a recipe's `config.model`.
      num_classes: length of the logits.
      naming: whose names the arrays have.
      arrays: those with numbers, by these names.
      codes: of weights that are there without their latents, by these names and in PyTorch's
        layout; see `LowBitWeight.codes`.
    """

    model: Mapping[str, Any]
    num_classes: int
    naming: Naming
    arrays: Arrays
    codes: Arrays


def recognise(arrays: Arrays, *, weights: str | None = None) -> Recognised:
    """Finds the network from names, shapes and values.

    Args:
      arrays: by an original's names, without the prefix `module.`.
      weights: `"float"` or `"sign"` for a wide ResNet's training checkpoint, whose latents say
        nothing of how they are used; None is sign. Any other network shows its form.

    Raises:
      UserError: where nothing here has such names.
    """
    if "conv_last" in arrays and "group0.block0.conv0" in arrays:
        return _wrn(arrays, weights)
    if weights is not None:
        raise UserError("--weights is for wide ResNets, these arrays are not one's")
    if "fc.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        return _torchvision(arrays)
    if "linear.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        return _shift_family(arrays)
    names = ", ".join(list(arrays)[:3])
    raise UserError(
        "no network here has such arrays; expected the names of ShiftResNet, of a 1-bit wide "
        f"ResNet, of S3 or of torchvision's ResNets, found {len(arrays)} arrays ({names}, …)"
    )


def _model(**fields: Any) -> dict[str, Any]:
    return {**default_config().model, **fields}


def _shape(arrays: Arrays, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of an array that the network cannot be told without."""
    if name not in arrays:
        raise UserError(f"{name} is missing")
    shape = arrays[name].shape
    if len(shape) != ndim or 0 in shape:
        raise UserError(f"{name} has shape {shape}; expected {ndim} dimensions, none of them 0")
    return shape


def _blocks(arrays: Arrays, pattern: str) -> int:
    """How many blocks a stage has, from the numbers that `pattern` finds in the names."""
    numbers = {match[1] for name in arrays if (match := re.match(pattern, name))}
    # By their count and not the largest, which a file could choose as it likes.
    if not 0 < len(numbers) <= MOST_BLOCKS:
        raise UserError(
            f"{len(numbers)} blocks have names like {pattern}; expected 1 to {MOST_BLOCKS}"
        )
    return len(numbers)


def _wrn(arrays: Arrays, weights: str | None) -> Recognised:
    blocks = {n: a for n, a in arrays.items() if re.fullmatch(r"group\d\.block\d+\.conv[01]", n)}
    packed = {name: array for name, array in blocks.items() if array.dtype == np.uint8}
    if packed and weights == "float":
        raise UserError("the weights are packed in bits; they cannot be float")
    if packed and len(packed) < len(blocks):
        (name, *_) = [name for name in blocks if name not in packed]
        raise UserError(f"{name} is not packed, though {len(packed)} others are")
    form = weights or "sign"
    depth = 6 * _blocks(arrays, r"group0\.block(\d+)\.") + 2
    model = _model(
        arch=f"wrn{depth}",
        width=_shape(arrays, "conv0", 4)[0] / 16,
        weights=form,
    )
    codes = {}
    for name, array in packed.items():
        # The published code packs the axis of the input channels, whose number 8 divides.
        codes[name] = np.unpackbits(array, axis=1) if array.ndim == 4 else array
    rest = {name: array for name, array in arrays.items() if name not in packed}
    return Recognised(model, _shape(arrays, "conv_last", 4)[0], WRN, rest, codes)


def _torchvision(arrays: Arrays) -> Recognised:
    convolutions = {
        name: array
        for name, array in arrays.items()
        if array.ndim == 4 and re.match(r"layer\d", name) and name.endswith(".weight")
    }
    latent = any(name.endswith(".weight_val") for name in arrays)
    whole = [name for name, array in convolutions.items() if _is_whole(array)]
    # Weights that are all whole numbers are S3's, deployed; one that is not breaks the rule.
    deployed = not latent and 2 * len(whole) > len(convolutions)
    codes = {}
    for name in convolutions if deployed else ():
        levels, array = np.array(S3_LEVELS), convolutions[name]
        code = np.searchsorted(levels, array).clip(0, len(levels) - 1)
        wrong = array[levels[code] != array]
        if wrong.size:
            raise UserError(
                f"{name} holds {wrong.flat[0]:g}; expected the levels of 3-bit S3 weights, "
                f"{', '.join(map(str, S3_LEVELS))}"
            )
        codes[name] = code.astype(np.uint8)
    model = _model(arch=_torchvision_arch(arrays), weights="s3" if latent or deployed else "float")
    rest = {
        name: array
        for name, array in arrays.items()
        if name not in codes and not name.endswith(".weight_sign")
    }
    return Recognised(model, _shape(arrays, "fc.weight", 2)[0], TORCHVISION, rest, codes)


def _is_whole(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all() and (array == np.round(array)).all() and array.any())


def _torchvision_arch(arrays: Arrays) -> str:
    counts = [_blocks(arrays, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3)]
    if not any(name.startswith("layer4.") for name in arrays):
        return f"resnet{6 * counts[0] + 2}"
    counts.append(_blocks(arrays, r"layer4\.(\d+)\."))
    bottleneck = "layer1.0.conv3.weight" in arrays
    for depth, (block, known) in imagenet_resnet.STAGES.items():
        if known == tuple(counts) and (block is imagenet_resnet.Bottleneck) == bottleneck:
            return f"imagenet_resnet{depth}"
    raise UserError(f"no ResNet for ImageNet has stages of {', '.join(map(str, counts))} blocks")


def _shift_family(arrays: Arrays) -> Recognised:
    depth = 6 * _blocks(arrays, r"layer1\.(\d+)\.") + 2
    first = _shape(arrays, "layer1.0.conv1.weight", 4)
    family = "resnet"
    if "layer1.0.depth.weight" in arrays:
        family = "depthwiseresnet"
    elif first[2:] == (1, 1):
        family = "shiftresnet"
    stages = [f"layer{stage}.0" for stage in (1, 2, 3)]
    last = "conv3" if family == "depthwiseresnet" else "conv2"
    outputs = [_shape(arrays, f"{stage}.{last}.weight", 4)[0] for stage in stages]
    middles = [_shape(arrays, f"{stage}.conv1.weight", 4)[0] for stage in stages]
    fields: dict[str, Any] = {"arch": f"{family}{depth}"}
    if outputs != list(WIDTHS):
        # int(16 / sqrt(r)) and so on
        bounds = [((w / (o + 1)) ** 2, (w / o) ** 2) for w, o in zip(WIDTHS, outputs, strict=True)]
        fields |= {"reduction": _simplest(bounds, open_below=True), "reduction_mode": "net"}
    pairs = list(zip(outputs, middles, strict=True))
    if family == "shiftresnet":
        fields["expansion"] = _simplest([(m / o, (m + 1) / o) for o, m in pairs], open_below=False)
    elif middles != outputs:
        bounds = [(o / (m + 1), o / m) for o, m in pairs]
        fields |= {"reduction": _simplest(bounds, open_below=True), "reduction_mode": "block"}
    model = _model(**fields)
    return Recognised(model, _shape(arrays, "linear.weight", 2)[0], SHIFT, arrays, {})


def _simplest(bounds: Sequence[tuple[float, float]], *, open_below: bool) -> float:
    """The number of fewest decimals that lies within all bounds, one end of which is left out.

    Raises:
      UserError: where there is none, so that no such network was ever built.
    """
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    for decimals in range(12):
        unit = 10.0**-decimals
        candidate = round(math.ceil(low / unit - 1e-9) * unit, decimals)
        if open_below and candidate <= low:
            candidate = round(candidate + unit, decimals)
        if candidate < high or (open_below and candidate == high):
            return candidate
    raise UserError("the channels of its stages fit no expansion and no reduction")
