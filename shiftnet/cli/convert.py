"""Converts a checkpoint of the original PyTorch codes, without PyTorch and running none of it.

Takes what ShiftResNet's, the 1-bit wide ResNet's and S3's code write (.t7, .pth, .pth.tar, of any
Python and PyTorch since 2017), torchvision's ResNets, and the same arrays as .safetensors or .npz.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from shiftnet import checkpoint, data, interchange, models, tables
from shiftnet import config as config_lib
from shiftnet.cli import prog
from shiftnet.data.cifar import WRN_NORMALIZATION
from shiftnet.errors import UserError, reported
from shiftnet.interchange import torch_names
from shiftnet.interchange.recognition import Recognised, recognise

# The data set that so many classes mean, where the command line names none.
DATASETS = {10: "cifar10", 100: "cifar100", 1000: "imagenet2012"}


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Converts the file that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog=prog("convert"), description=__doc__)
    parser.add_argument("file", metavar="FILE", help="the original checkpoint")
    parser.add_argument(
        "--out", metavar="DIR", help="the checkpoint to write (default: converted/ and FILE's name)"
    )
    parser.add_argument(
        "--dataset",
        choices=data.NAMES,
        help="what it was trained on (default: by its number of classes)",
    )
    parser.add_argument(
        "--weights",
        choices=("float", "sign"),
        help="of a wide ResNet's training checkpoint, which does not show it (default: sign)",
    )
    arguments = parser.parse_args(argv)

    path = Path(arguments.file)
    file = interchange.read(path)
    try:
        found = recognise(file.arrays, weights=arguments.weights)
        network, rows, unused = fill(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    note = describe(found, file, path, arguments.dataset)
    directory = checkpoint.write(
        arguments.out or Path("converted") / path.name,
        checkpoint.to_arrays(*nnx.split(network, nnx.Param, nnx.BatchStat)[1:]),
        note,
    )
    print(report(found, file, network, rows, unused, note))
    print(f"\nwritten: {directory}\nevaluate it: python evaluate.py --ckpt {directory}")
    return 0


Rows = list[tuple[object, ...]]


def fill(found: Recognised) -> tuple[nnx.Module, Rows, list[str]]:
    """Builds the network and sets its numbers.

    Returns:
      The network, a row for each array that went into it, and the names of those left over.

    Raises:
      UserError: for an array that is missing, has the wrong shape, or holds what it cannot.
    """
    network = nnx.eval_shape(lambda: models.build(found.model, found.num_classes, rngs=nnx.Rngs(0)))
    needed = torch_names.names(network, found.naming)
    coded = {
        name
        for name in needed
        if any(name == weight or name.startswith(f"{weight}_") for weight in found.codes)
    }
    for name in needed:
        if name not in coded and name not in found.arrays:
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
        torch_names.from_torch(network, wide, found.naming, codes=found.codes)
    except ValueError as error:
        raise UserError(str(error)) from error
    arrays = {**used, **found.codes}
    rows: Rows = [
        (name, _shape(arrays[name]), "levels" if name in found.codes else str(arrays[name].dtype))
        for name in {**found.arrays, **found.codes}
        if name in arrays
    ]
    unused = [name for name in found.arrays if name not in used and not name.endswith("_tracked")]
    return network, rows, unused


def describe(
    found: Recognised, file: interchange.Foreign, path: Path, dataset: str | None
) -> dict[str, Any]:
    """The checkpoint's note."""
    recipe = config_lib.default_config()
    recipe.model.update(found.model)
    name = dataset or DATASETS.get(found.num_classes)
    names = [str(label) for label in range(found.num_classes)]
    mean, std = data.IMAGENET_NORMALIZATION
    if name:
        recipe.data.name = name
        mean, std = data.normalization(name)
        if name in data.IN_MEMORY:
            names = list(data.class_names(name))
    if len(names) != found.num_classes:
        raise UserError(
            f"{path} knows {found.num_classes} classes, --dataset {dataset} has {len(names)}"
        )
    if found.naming is torch_names.WRN:
        mean, std = WRN_NORMALIZATION  # the others take their data set's own
    recipe.data.mean, recipe.data.std = mean, std
    return {
        "config": config_lib.to_json(recipe),
        "class_names": names,
        "mean": list(mean),
        "std": list(std),
        "step": 0,
        "converted_from": {"file": path.name, "format": file.format, **recorded(file.facts)},
    }


def recorded(facts: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy and the epoch that the file names, where they can be ones."""
    result: dict[str, float] = {}
    for ours, theirs, most in (
        ("accuracy", ("acc", "best_acc1", "acc1"), 100.0),
        ("epoch", ("epoch",), 1e6),
    ):
        for name in theirs:
            value = facts.get(name)
            if isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most:
                result.setdefault(ours, value)
    return result


def report(
    found: Recognised,
    file: interchange.Foreign,
    network: nnx.Module,
    rows: Rows,
    unused: Sequence[str],
    note: Mapping[str, Any],
) -> str:
    """What was found and taken, for people."""
    model = found.model
    fields = [
        f"{name} {model[name]:g}"
        for name in ("expansion", "reduction", "width")
        if model[name] != 1
    ]
    count = sum(math.prod(leaf.shape) for leaf in _parameters(network))
    facts = note["converted_from"]
    lines = [
        tables.aligned([("array", "shape", "type"), *rows]),
        "",
        f"{facts['file']}: {file.format}",
        " ".join([model["arch"], *fields, f"with {model['weights']} weights,"])
        + f" {found.num_classes} classes, {count:,} parameters"
        + ("" if model["weights"] == "float" else " (latents included)"),
    ]
    if "accuracy" in facts:
        epoch = f" at epoch {facts['epoch']}" if "epoch" in facts else ""
        lines.append(f"recorded accuracy: {facts['accuracy']:g} %{epoch}")
    else:
        lines.append("no accuracy is recorded")
    strange = [name for name in ("acc", "best_acc1", "epoch") if name in file.facts]
    strange = [name for name in strange if file.facts[name] not in facts.values()]
    if strange:
        lines.append(
            "not taken over: " + ", ".join(f"{name} {file.facts[name]!r}" for name in strange)
        )
    if unused:
        lines.append(f"not used: {', '.join(unused)}")
    if file.ignored:
        lines.append(f"left out: {', '.join(file.ignored)}")
    return "\n".join(lines)


def _parameters(network: nnx.Module) -> list[nnx.Variable]:
    return [leaf for _, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))]


def _shape(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape)) or "()"
