"""Evaluates trained networks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shiftnet
import shiftnet.data
from shiftnet import config as config_lib
from shiftnet import zoo
from shiftnet.cli import prog
from shiftnet.data import classes
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of
from shiftnet.inference import Classifier
from shiftnet.training.evaluation import Evaluation, Reading, make_evaluator
from shiftnet.training.mesh import make_mesh
from shiftnet.training.processes import use_compilation_cache


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates what the command line names; returns the exit code."""
    parser = config_lib.Parser(prog=prog("evaluate"), description=__doc__)
    parser.add_argument(
        "--ckpt",
        nargs="+",
        required=True,
        metavar="PATH",
        help="checkpoints: a run's working directory (its last), its best/, one step, a converted "
        "one, a packed .safetensors file, or a glob; or a trained network's name, see shiftnet "
        "models",
    )
    parser.add_argument("--dataset", metavar="NAME", help="default: what each was trained on")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="a folder of images, val/<class>/* or <class>/*, whose classes are matched by name; "
        "or where the data set is prepared; default: as in training",
    )
    parser.add_argument(
        "--on-corrupt",
        choices=("error", "skip"),
        help="what to do about image files that cannot be read; default: as in training",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, help="default: as in training")
    parser.add_argument("--per-class", action="store_true", help="accuracy of every class too")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args(argv)

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, found {arguments.batch_size}")

    use_compilation_cache()
    paths = [path for pattern in arguments.ckpt for path in zoo.find_all(pattern, "--ckpt")]
    rows = []
    for path in paths:
        model = shiftnet.load(path)
        row = evaluate(model, arguments)
        rows.append(row)
        if not arguments.json:
            print(_line(row))
            if "found" in row:
                print(f"  {row['found']}")
            if "skipped" in row:
                print(f"  left out, corrupt: {', '.join(row['skipped'])}")
            for name, accuracy in row.get("per_class", {}).items():
                print(f"  {name:24s} {'no images' if accuracy is None else f'{accuracy:.2%}'}")
    if arguments.json:
        print(json.dumps(rows, indent=2, allow_nan=False))
    return 0


def evaluate(model: Classifier, arguments: Any) -> dict[str, Any]:
    """Returns the row of a checkpoint: its path, its network, and the numbers."""
    data = model.config.data
    name, source, directory = _place(model, arguments)

    def match(found: Sequence[str], dataset: str) -> classes.Matching:
        own_names = data.name in shiftnet.data.IN_MEMORY or data.source == "folder"
        return classes.match(
            model.class_names,
            found,
            numbers=not own_names,
            network=str(model.path),
            dataset=dataset,
        )

    if source == "tfds" and name in shiftnet.data.IN_MEMORY:
        match(shiftnet.data.class_names(name), name)  # before it is downloaded
    test = shiftnet.data.load_test(name, source=source, data_dir=directory, exif=data.exif)
    labels, matched = match(test.class_names, test.name)
    result = make_evaluator(
        model.graphdef,
        classes.relabel(test.part, labels),
        Reading(
            model.preprocess.size,
            model.preprocess.resize,
            data.workers,
            arguments.on_corrupt or data.on_corrupt,
        ),
        mean=model.mean,
        std=model.std,
        batch_size=arguments.batch_size or model.config.eval.batch_size,
        mesh=make_mesh(),
    )(model.params, model.stats)
    row = {
        "checkpoint": str(model.path),
        "arch": model.config.model.arch,
        "dataset": test.name,
        "images": len(result.labels),
        "step": model.metadata["step"],
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no NaN
    }
    if matched:
        row["classes"] = matched
    if "left out" in test.found:
        row["found"] = test.found
    if result.skipped:
        row["skipped"] = list(result.skipped)
    if arguments.per_class:
        row["per_class"] = _per_class(result, model.class_names)
    return row


def _place(model: Classifier, arguments: Any) -> tuple[str, str, str]:
    """Returns `data.name`, `data.source` and `data.dir` of the images to evaluate on.

    By default they are those of training. A directory of images is told from one of prepared data
    sets by what it holds.

    Raises:
      UserError: if neither the command line nor the network says what to evaluate on.
    """
    data, directory = model.config.data, arguments.data_dir
    if arguments.dataset:
        return arguments.dataset, "tfds", directory or ""
    in_tfds = data.source == "tfds" and data.name in shiftnet.data.NAMES
    if directory is None:
        if data.source == "tfds" and not in_tfds:
            raise UserError(
                f"{model.path} does not say which images its network was trained on; name them by "
                "--data-dir or --dataset"
            )
        return data.name, data.source, data.dir
    source = "tfds" if in_tfds and _is_tfds(path_of(directory, "--data-dir")) else "folder"
    return data.name, source, directory


def _is_tfds(directory: Path) -> bool:
    """Tells whether prepared data sets are in a directory, or can be without mixing with others."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return True
    prepared = directory.glob("*/*.*.*/dataset_info.json")
    return (directory / "downloads").is_dir() or any(prepared)


def _per_class(result: Evaluation, names: Sequence[str]) -> dict[str, float | None]:
    accuracies = result.per_class(len(names)).tolist()
    # NaN, for a class without images, is not JSON.
    return {
        name: accuracy if accuracy == accuracy else None
        for name, accuracy in zip(names, accuracies, strict=True)
    }


def _line(row: dict[str, Any]) -> str:
    matched = f" ({row['classes']})" if "classes" in row else ""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    return (
        f"{row['checkpoint']}  {row['arch']} on {row['dataset']}, {row['images']} images{matched}: "
        f"top-1 {row['top1']:.2%}  top-5 {row['top5']:.2%}  loss {loss}"
    )
