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
from shiftnet.models import imagenet_resnet, shuffleresnet
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
        layout; see `QuantizedWeight`.
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
      weights: `"float"` or `"sign"` where the arrays do not show which they are: a layer has one
        array in both. None is sign for a wide ResNet's training checkpoint, else float.

    Raises:
      UserError: where nothing here has such names; it names what they look like.
    """
    scales = [name for name in arrays if name.endswith("_scale")]
    if scales:
        raise UserError(
            f"it holds integers and their scales ({scales[0]}, …), but lost the description of "
            "the network that was exported with them"
        )
    unrounded = [name for name in arrays if name.endswith("_unrounded")]
    if unrounded:
        raise UserError(
            f"it holds weights before they are rounded ({unrounded[0]}, …), but lost the "
            "description of the network that was exported with them"
        )
    if (reason := _near_miss(arrays)) is not None:
        raise UserError(reason)
    if "conv_last" in arrays and "group0.block0.conv0" in arrays:
        found = _wrn(arrays, weights)
    elif "fc.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        found = _torchvision(arrays, weights)
    elif "linear.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        found = _shift_family(arrays, weights)
    else:
        names = ", ".join(list(arrays)[:3])
        raise UserError(
            "no network here has such arrays; expected the names of ShiftResNet, of a 1-bit wide "
            f"ResNet, of S3 or of torchvision's ResNets, found {len(arrays)} arrays ({names}, …)"
        )
    if weights not in (None, found.model["weights"]):
        raise UserError(
            f"--weights is {weights}, but the arrays are those of {found.model['weights']} weights"
        )
    return found


# What a state dict looks like that is no network here: names in it, and what they are.
_NEAR_MISSES = (
    (
        r"resnet\.embedder\.",
        "it has the names of Hugging Face's ResNets; expected torchvision's or timm's names",
    ),
    (
        r".*\.weight_orig$",
        "it is pruned by torch.nn.utils.prune (weight_orig and weight_mask); expected whole "
        "weights, as after prune.remove",
    ),
    (
        r".*\.parametrizations\.|.*\.weight_g$",
        "its weights are parametrised (as by weight_norm); expected whole weights, as after "
        "parametrize.remove_parametrizations",
    ),
    (
        r"conv1\.\d+\.weight$",
        "its first layer is of several convolutions, as in timm's and MXNet's ResNet-C and -D; "
        "there are torchvision's, with one",
    ),
)


def _near_miss(arrays: Arrays) -> str | None:
    """What the arrays look like, where they are of a network that is not here."""
    for pattern, sentence in _NEAR_MISSES:
        if any(re.match(pattern, name) for name in arrays):
            return sentence
    if "layer1.0.conv1.weight" not in arrays:
        return None
    if "fc.weight" not in arrays and "linear.weight" not in arrays:
        return "its last layer is missing (fc or linear): a backbone alone classifies nothing"
    if "linear.weight" in arrays:
        if any(name.startswith("layer4.") for name in arrays):
            return (
                "it has four stages and the names of Kuang Liu's ResNets for CIFAR (ResNet-18 and "
                "wider); those here have three stages of 16, 32 and 64 channels, such as resnet20"
            )
        if "layer2.0.conv1.weight" in arrays and "layer2.0.shortcut.0.weight" not in arrays:
            shift = arrays["layer1.0.conv1.weight"].shape[2:] == (1, 1)
            if not shift and "layer1.0.conv2.weight" in arrays:
                return (
                    "its shortcuts have no weights (option A of arXiv:1512.03385, as in "
                    "akamaster's pytorch_resnet_cifar10); here they are 1x1 convolutions"
                )
    return None


def codes_of(name: str, array: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """The index of each level, uint8.

    Raises:
      UserError: for a number that is no level.
    """
    known = np.array(levels)
    code = np.searchsorted(known, array).clip(0, len(known) - 1)
    wrong = array[known[code] != array]
    if wrong.size:
        raise UserError(
            f"{name} holds {wrong.flat[0]:g}; expected one of {', '.join(map(str, levels))}"
        )
    return code.astype(np.uint8)


def _form(arrays: Arrays, first: str, weights: str | None) -> dict[str, Any]:
    """The fields of `config.model` that say how weights are made, from the names of the latents.

    S3 has a gate (`_val`) and 0, 2 or 6 shifts, DenseShift 1, 3 or 7 shifts and no gate.

    Args:
      arrays: the state dict.
      first: the name of the first layer's weight.
      weights: the form where there are no such names.
    """
    suffixes = {m[1] for name in arrays if (m := re.search(r"_(val|shift\d*)$", name))}
    if not suffixes:
        return {"weights": weights or "float"}
    gated = "val" in suffixes
    shifts = len(suffixes) - gated
    bits = ({0: 2, 2: 3, 6: 4} if gated else {1: 2, 3: 3, 7: 4}).get(shifts)
    if bits is None:
        raise UserError(
            f"its weights have {shifts} shift latents and {'a' if gated else 'no'} gate; expected "
            "0, 2 or 6 with one (S3), or 1, 3 or 7 without (DenseShift)"
        )
    return {
        "weights": "s3" if gated else "denseshift",
        "weight_bits": 0 if bits == 3 else bits,
        "quantize_first_last": any(f"{first}_{suffix}" in arrays for suffix in suffixes),
    }


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
    depth = 6 * _blocks(arrays, r"group0\.block(\d+)\.") + 2
    model = _model(
        arch=f"wrn{depth}",
        width=_shape(arrays, "conv0", 4)[0] / 16,
        **_form(arrays, "conv0", weights or "sign"),
    )
    codes = {}
    for name, array in packed.items():
        # The published code packs the axis of the input channels, whose number 8 divides.
        codes[name] = np.unpackbits(array, axis=1) if array.ndim == 4 else array
    rest = {name: array for name, array in arrays.items() if name not in packed}
    return Recognised(model, _shape(arrays, "conv_last", 4)[0], WRN, rest, codes)


def _torchvision(arrays: Arrays, weights: str | None) -> Recognised:
    convolutions = {
        name: array
        for name, array in arrays.items()
        if array.ndim == 4 and re.match(r"layer\d", name) and name.endswith(".weight")
    }
    form = _form(arrays, "conv1.weight", weights)
    whole = [name for name, array in convolutions.items() if _is_whole(array)]
    # Weights that are all whole numbers are S3's, deployed; one that is not breaks the rule.
    deployed = form["weights"] == "float" and 2 * len(whole) > len(convolutions)
    codes = {}
    for name in convolutions if deployed else ():
        codes[name] = codes_of(name, convolutions[name], S3_LEVELS)
    form = {"weights": "s3"} if deployed else form
    model = _model(arch=_torchvision_arch(arrays), **form)
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
            if (reason := _other_width(arrays)) is not None:
                raise UserError(f"it has the blocks of imagenet_resnet{depth}, but {reason}")
            return f"imagenet_resnet{depth}"
    raise UserError(f"no ResNet for ImageNet has stages of {', '.join(map(str, counts))} blocks")


def _other_width(arrays: Arrays) -> str | None:
    """How the first block differs from a ResNet's, as those of its relatives do."""
    out, each = _shape(arrays, "layer1.0.conv2.weight", 4)[:2]
    if (before := _shape(arrays, "layer1.0.conv1.weight", 4)[0]) != each:
        return f"its 3x3 convolutions have {before // each} groups: a ResNeXt, which is not here"
    if out == 128:
        return "twice the middle channels: a wide ResNet of torchvision, which is not here"
    return None


def _shift_family(arrays: Arrays, weights: str | None) -> Recognised:
    depth = 6 * _blocks(arrays, r"layer1\.(\d+)\.") + 2
    first = _shape(arrays, "layer1.0.conv1.weight", 4)
    family = "resnet"
    if "layer1.0.depth1.weight" in arrays:
        family = "mobileresnet"
    elif "layer1.0.depth.weight" in arrays:
        grouped = first[1] < _shape(arrays, "conv1.weight", 4)[0]
        family = "shuffleresnet" if grouped else "depthwiseresnet"
    elif first[2:] == (1, 1):
        family = "shiftresnet"
    stages = [f"layer{stage}.0" for stage in (1, 2, 3)]
    last = "conv3" if family in ("depthwiseresnet", "shuffleresnet") else "conv2"
    outputs = [_shape(arrays, f"{stage}.{last}.weight", 4)[0] for stage in stages]
    middles = [_shape(arrays, f"{stage}.conv1.weight", 4)[0] for stage in stages]
    fields = {"arch": f"{family}{depth}", **_form(arrays, "conv1.weight", weights)}
    if outputs != list(WIDTHS):
        # int(16 / sqrt(r)) and so on
        bounds = [((w / (o + 1)) ** 2, (w / o) ** 2) for w, o in zip(WIDTHS, outputs, strict=True)]
        fields |= {"reduction": _simplest(bounds, open_below=True), "reduction_mode": "net"}
    if family == "depthwiseresnet":  # blocks of both kinds had one class name in the original
        fields["depthwise_skip"] = any(".shortcut." in name for name in arrays)
    pairs = list(zip(outputs, middles, strict=True))
    if family == "shiftresnet":
        fields["expansion"] = _simplest([(m / o, (m + 1) / o) for o, m in pairs], open_below=False)
    elif middles != outputs:
        step = shuffleresnet.GROUPS if family == "shuffleresnet" else 1
        bounds = [(o / (m + step), o / m) for o, m in pairs]
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
