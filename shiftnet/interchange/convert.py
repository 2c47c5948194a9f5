"""A file of another code becomes a network with a checkpoint's metadata."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from shiftnet import config as config_lib
from shiftnet import data, models, tables
from shiftnet.data.cifar import NORMALIZATION as CIFAR_NORMALIZATION
from shiftnet.data.cifar import WRN_NORMALIZATION
from shiftnet.errors import UserError
from shiftnet.interchange import Foreign, originals, torch_names
from shiftnet.interchange.recognition import Recognised, codes_of, recognise

# `data.name` of a network that was trained on nothing that is here by name.
UNKNOWN = "unknown"
# By the side of an architecture's images in pixels, and the number of classes.
DATASETS = {(32, 10): "cifar10", (32, 100): "cifar100", (224, 1000): data.IMAGENET}

# What an accuracy is called in checkpoints, in percent.
ACCURACIES = ("acc", "best_acc1", "acc1", "best_acc", "best_prec1")


@dataclasses.dataclass(frozen=True)
class Options:
    """What people know of a file that is not in it; None where it is to be found out.

    Attributes:
      dataset: one of `shiftnet.data.NAMES`.
      weights: as of `recognise`.
      mean, std: of each channel, for pixels in [0, 1].
      class_names: by class number.
    """

    dataset: str | None = None
    weights: str | None = None
    mean: data.RGB | None = None
    std: data.RGB | None = None
    class_names: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network, its checkpoint's metadata, and what was taken and assumed, for people."""

    network: nnx.Module
    metadata: Mapping[str, Any]
    report: str


Rows = list[tuple[object, ...]]


def convert(file: Foreign, name: str, options: Options) -> Converted:
    """Builds the network of a file.

    Args:
      file: from `interchange.read`.
      name: of the file.
      options: what the command line says.

    Raises:
      UserError: where it is of no network that is here, or what the options say cannot be.
    """
    found = originals.described(file.facts)
    if found is None:
        recognised = recognise(file.arrays, weights=options.weights)
    else:
        recognised = originals.recognise_described(file.arrays, found)
        if options.weights not in (None, recognised.model["weights"]):
            raise UserError(
                f"--weights is {options.weights}, the file says {recognised.model['weights']}"
            )
    network, rows, unused = fill(recognised)
    metadata, assumed = describe(recognised, found, options)
    metadata["converted_from"] = {"file": name, "format": file.format, **recorded(file.facts)}
    return Converted(
        network, metadata, _report(recognised, file, network, rows, unused, metadata, assumed)
    )


def fill(found: Recognised) -> tuple[nnx.Module, Rows, list[str]]:
    """Builds the network and sets its numbers.

    Returns:
      The network, a row for each array that went into it, and the names of those left over.

    Raises:
      UserError: for an array that is missing, has the wrong shape, or holds what it cannot.
    """
    network = nnx.eval_shape(lambda: models.build(found.model, found.num_classes, rngs=nnx.Rngs(0)))
    needed = torch_names.names(network, found.naming)
    codes = dict(found.codes)
    scales: dict[str, Any] = {}
    for name, weight in torch_names.low_bit(network, found.naming).items():
        array = found.arrays.get(name)
        if array is not None and array.dtype.kind in "iu":
            codes[name] = codes_of(name, array, weight.levels)
            scales[name] = _scale(found.arrays, f"{name}_scale", weight.scale_shape)
        elif name in codes and weight.scale_shape is not None:
            raise UserError(f"{name} is packed in bits; expected a {found.model['weights']} weight")
    coded = {
        name
        for name in needed
        if any(name == weight or name.startswith(f"{weight}_") for weight in codes)
    }
    for name in needed:
        if name not in coded and name not in found.arrays:
            if scales and not any("running_" in given for given in found.arrays):
                raise UserError(
                    "it holds the integers of a packed network, whose batch norms are folded "
                    f"(there is no {name}): export --integers of the checkpoint that was packed, "
                    "or use the packed file itself"
                )
            raise UserError(f"{name} is missing; {found.model['arch']} needs it")
    used = {name: found.arrays[name] for name in needed if name not in coded}
    for name, array in used.items():
        if array.dtype.kind != "f":
            raise UserError(f"{name} holds {array.dtype}; expected floating numbers")
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds {array[~np.isfinite(array)].flat[0]}")
        if name.endswith("running_var") and array.min(initial=0) < 0:
            raise UserError(f"{name} holds {array.min():g}; a variance is not negative")
    wide = {name: array.astype(np.float32) for name, array in used.items()}
    try:
        torch_names.from_torch(network, wide, found.naming, codes=codes, scales=scales)
    except ValueError as error:
        raise UserError(str(error)) from error
    arrays = {**used, **codes}
    rows: Rows = [
        (name, _shape(arrays[name]), "levels" if name in codes else str(arrays[name].dtype))
        for name in {**found.arrays, **codes}
        if name in arrays
    ]
    unused = [
        name
        for name in found.arrays
        if name not in arrays
        and name.removesuffix("_scale") not in scales
        and not name.endswith("_tracked")
    ]
    return network, rows, unused


def _scale(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None) -> Any:
    """Returns the scale of a weight's levels; a form with a constant one (None) has its own."""
    scale = arrays.get(name)
    if shape is None:
        return None
    if scale is None or scale.shape != shape or scale.dtype.kind != "f":
        found = "nothing" if scale is None else f"{scale.dtype} {scale.shape}"
        raise UserError(f"{name} must be floating numbers of shape {shape}, found {found}")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise UserError(f"{name} holds {scale.flat[0]:g}; a scale is finite and above 0")
    return scale.astype(np.float32)


def describe(
    recognised: Recognised, found: Mapping[str, Any] | None, options: Options
) -> tuple[dict[str, Any], str]:
    """The checkpoint's metadata, and a line that says how its facts about images were found.

    Args:
      recognised: the network.
      found: the file's description of it, see `originals.described`.
      options: overrule both.

    Raises:
      UserError: for a data set or names of other classes than the network has.
    """
    classes = recognised.num_classes
    side = models.image_size(recognised.model["arch"])
    recipe = config_lib.default_config()
    if found is not None:
        recipe = config_lib.from_json(found["config"])
    recipe.model.update(recognised.model)

    if found is not None and options.dataset is None:
        names, mean, std = found["class_names"], found["mean"], found["std"]
        source = "as the file says"
    else:
        name = options.dataset or DATASETS.get((side, classes), UNKNOWN)
        recipe.data.name, recipe.data.source = name, "tfds"
        names = [str(label) for label in range(classes)]
        source = f"those of {name}"
        if name == UNKNOWN:
            # Files of an unknown data set are as large as the architecture's own.
            mean, std = _assumed(recognised, side)
            source = f"those of {'CIFAR' if side == 32 else 'ImageNet'}, which is a guess"
        else:
            mean, std = data.normalization(name)
            if name in CIFAR_NORMALIZATION:
                mean, std = _assumed(recognised, 32)
            expected = classes
            if name in data.IN_MEMORY:
                names = list(data.class_names(name))
                expected = len(names)
            elif name == data.IMAGENET:
                expected = 1000
            if classes != expected:
                raise UserError(f"it knows {classes} classes, --dataset {name} has {expected}")
    if options.class_names is not None:
        names = list(options.class_names)
        if len(names) != classes:
            raise UserError(f"it knows {classes} classes, --class-names has {len(names)}")
        if len(set(names)) < len(names):
            raise UserError("--class-names has a name twice")
    mean, std = options.mean or mean, options.std or std
    if options.mean or options.std:
        source = "as given" if options.mean and options.std else f"one as given, one {source}"
    if found is None or (mean, std) != (found["mean"], found["std"]):
        recipe.data.mean, recipe.data.std = tuple(mean), tuple(std)
    metadata = {
        "config": config_lib.to_json(recipe),
        "class_names": list(names),
        "mean": list(mean),
        "std": list(std),
        "step": 0,
    }
    where = data.described(recipe.data)
    if recipe.data.name == UNKNOWN:
        where = "unknown (--dataset names it)"
    elif found is None and options.dataset is None:
        where += ", by its architecture and number of classes"
    return metadata, f"data set: {where}; mean and standard deviation: {source}"


def _assumed(recognised: Recognised, side: int) -> tuple[data.RGB, data.RGB]:
    """The mean and standard deviation that a code trains with, on images of this side."""
    if side != 32:
        return data.IMAGENET_NORMALIZATION
    if recognised.naming is torch_names.WRN:
        return WRN_NORMALIZATION
    return CIFAR_NORMALIZATION["cifar10"]


def recorded(facts: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy and the epoch that the file names, where they can be ones."""
    result: dict[str, float] = {}
    for ours, theirs, most in (("accuracy", ACCURACIES, 100.0), ("epoch", ("epoch",), 1e6)):
        for name in theirs:
            value = facts.get(name)
            if isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most:
                result.setdefault(ours, value)
    return result


def names_of(text: str) -> list[str]:
    """Class names as people give them: a file of one a line or a JSON list, or `cat,dog`.

    Raises:
      UserError: for a file that cannot be read so, or an empty name.
    """
    path = Path(text)
    try:
        is_file = path.is_file()
        content = path.read_text("utf-8-sig") if is_file else text
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names {text}: cannot be read, {error}") from None
    names = content.splitlines() if is_file else content.split(",")
    if content.lstrip().startswith("["):
        try:
            names = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--class-names {text}: it is no JSON list, {error}") from None
    elif is_file and names and not names[-1].strip():
        names.pop()
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"--class-names {text}: expected names of one or more characters each")
    return [name.strip() for name in names]


def _report(
    found: Recognised,
    file: Foreign,
    network: nnx.Module,
    rows: Rows,
    unused: Sequence[str],
    metadata: Mapping[str, Any],
    assumed: str,
) -> str:
    """What was found and taken, for people."""
    model = found.model
    fields = [
        f"{name} {model[name]:g}"
        for name in ("expansion", "reduction", "width")
        if model[name] != 1
    ]
    fields += [] if model["depthwise_skip"] else ["without skip"]
    bits = f"{model['weight_bits']}-bit " if model["weight_bits"] else ""
    count = sum(
        math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))
    )
    facts = metadata["converted_from"]
    lines = [
        tables.aligned([("array", "shape", "type"), *rows]),
        "",
        f"{facts['file']}: {file.format}",
        " ".join([model["arch"], *fields, f"with {bits}{model['weights']} weights,"])
        + f" {found.num_classes} classes, {count:,} parameters"
        + ("" if model["weights"] == "float" else " (latents included)"),
        assumed,
        f"  mean {_numbers(metadata['mean'])}, std {_numbers(metadata['std'])} "
        "(--mean and --std give others)",
        f"classes: {', '.join(metadata['class_names'][:5])}{', …' * (found.num_classes > 5)}",
    ]
    if "accuracy" in facts:
        epoch = f" at epoch {facts['epoch']}" if "epoch" in facts else ""
        lines.append(f"recorded accuracy: {facts['accuracy']:g} %{epoch}")
    else:
        lines.append("no accuracy is recorded")
    strange = [name for name in (*ACCURACIES, "epoch") if name in file.facts]
    strange = [name for name in strange if file.facts[name] not in facts.values()]
    if strange:
        lines.append(
            "not taken over: " + ", ".join(f"{name} {file.facts[name]!r}" for name in strange)
        )
    if unused:
        lines.append(f"not used: {', '.join(unused)}")
    if file.ignored:
        lines.append(f"left out: {', '.join(file.ignored)}")
    if file.networks:
        lines.append(f"{file.networks[0]} holds a network too; --entry {file.networks[0]} takes it")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _shape(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape)) or "()"
