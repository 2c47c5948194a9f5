"""Evaluates trained networks."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import shiftnet
import shiftnet.data
from shiftnet import config as config_lib
from shiftnet import zoo
from shiftnet.cli import add_network, allow_network, finite, prog
from shiftnet.config import DataConfig
from shiftnet.data import Source, Split, TestSet, classes, digits
from shiftnet.errors import UserError, reported
from shiftnet.files import check_place, path_of, write_atomically
from shiftnet.inference import Classifier
from shiftnet.interchange.convert import UNKNOWN
from shiftnet.training.evaluation import Evaluation, Reading, make_evaluator
from shiftnet.training.mesh import make_mesh
from shiftnet.training.processes import set_up


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates what the command line names; returns the exit code."""
    parser = config_lib.Parser(prog=prog("evaluate"), description=__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help="a run's working directory (its last checkpoint), its best/, one step, a converted "
        "checkpoint, a packed .safetensors file, or a glob; or a trained network's name, which "
        "shiftnet models lists",
    )
    parser.add_argument(
        "--ckpt",
        nargs="+",
        default=[],
        metavar="PATH",
        help="the same, as an option",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="data set to evaluate on (default: the one of training)"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="a folder of images, val/<class>/* or <class>/*, whose classes are matched by name; "
        "or where the data set is prepared (default: as in training)",
    )
    parser.add_argument(
        "--labels",
        metavar="CSV",
        help="a file that lists images of --data-dir and their classes, one FILE,CLASS per line",
    )
    parser.add_argument(
        "--on-corrupt",
        choices=("error", "skip"),
        help="what to do about image files that cannot be read (default: as in training)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, help="images per step (default: as in training)"
    )
    parser.add_argument(
        "--per-class", action="store_true", help="print precision, recall and F1 of every class too"
    )
    parser.add_argument(
        "--confused",
        metavar="N",
        type=int,
        default=0,
        help="print the N most confused pairs of classes",
    )
    parser.add_argument(
        "--wrong",
        metavar="N",
        type=int,
        default=0,
        help="print the N most confident wrong predictions",
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE.csv",
        help="write every image's name, class, prediction and confidence; one checkpoint only",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    add_network(parser)
    arguments = parser.parse_args(argv)
    allow_network(arguments)

    patterns = [*arguments.checkpoints, *arguments.ckpt]
    if not patterns:
        raise UserError("no checkpoint is named; expected evaluate CKPT, or --ckpt CKPT")
    if arguments.labels and not arguments.data_dir:
        raise UserError("--labels needs --data-dir, the folder of the images that it lists")
    if arguments.labels and arguments.dataset:
        raise UserError("--dataset does not apply to --labels, which lists images of --data-dir")
    for option, least in (("batch_size", 1), ("confused", 0), ("wrong", 0)):
        found = getattr(arguments, option)
        if found is not None and found < least:
            raise UserError(f"--{option.replace('_', '-')} must be at least {least}, found {found}")

    if arguments.predictions:
        _check_predictions(arguments)
    set_up()
    paths = [path for pattern in patterns for path in zoo.find_all(pattern, "--ckpt")]
    if arguments.predictions and len(paths) > 1:
        raise UserError(f"--predictions takes one checkpoint, found {len(paths)}")
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
            for line in _details(row):
                print(f"  {line}")
    if arguments.json:
        print(json.dumps(rows, indent=2, allow_nan=False))
    return 0


def evaluate(model: Classifier, arguments: Any) -> dict[str, Any]:
    """Returns the row of a checkpoint: its path, its network, and the numbers."""
    data = model.config.data
    name, source, directory = _place(model, arguments)

    def match(found: Sequence[str], dataset: str) -> classes.Matching:
        own_names = data.name in shiftnet.data.IN_MEMORY or data.source != "tfds"
        return classes.match(
            model.class_names,
            found,
            numbers=not own_names,
            network=str(model.path),
            dataset=dataset,
        )

    if source == "tfds" and name in shiftnet.data.IN_MEMORY:
        match(shiftnet.data.class_names(name), name)  # before it is downloaded
    test = shiftnet.data.load_test(
        name,
        source=source,
        data_dir=directory,
        exif=data.exif,
        size=model.preprocess.size,
        trained_on=source == data.source and _same_place(name, directory, data),
        undivided=model.metadata.get("undivided", ""),
        listing=arguments.labels or "",
    )
    if test.held_out and _has_changed(test, model):
        raise UserError(
            f"{test.name} is not as it was when {model.path} was trained: the {len(test.part)} of "
            "its images that would be held out for the test now may have been trained on"
        )
    labels, matched = match(test.class_names, test.name)
    part = classes.relabel(test.part, labels)
    result = make_evaluator(
        model.graphdef,
        part,
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
        "num_classes": len(model.class_names),
        "step": model.metadata["step"],
        "top1": result.top1,
        "top5": result.top5,
        "loss": finite(result.loss),
        "calibration_error": finite(result.calibration_error()),
    }
    names = model.class_names
    if matched:
        row["classes"] = matched
    if "left out" in test.found:
        row["found"] = test.found
    if result.skipped:
        row["skipped"] = list(result.skipped)
    if arguments.per_class:
        row["per_class"] = _per_class(result, names)
    if arguments.confused:
        row["confused"] = _confused(result, names, arguments.confused)
    if arguments.wrong or arguments.predictions:
        predictions = _predictions(result, part, names)
        wrong = [one for one in predictions if one["class"] != one["prediction"]]
        wrong.sort(key=lambda one: -(one["confidence"] or 0))
        row |= {"wrong": wrong[: arguments.wrong]} if arguments.wrong else {}
        if arguments.predictions:
            text = io.StringIO()
            writer = csv.DictWriter(text, predictions[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(predictions)
            write_atomically(path_of(arguments.predictions, "--predictions"), text.getvalue())
    return row


def _check_predictions(arguments: Any) -> None:
    """Refuses, before anything is evaluated, to write predictions over what is read."""
    out = path_of(arguments.predictions, "--predictions")
    check_place(out, "--predictions")
    is_special = out.exists() and not out.is_file()  # a pipe, or /dev/stdout
    if out.suffix.lower() != ".csv" and not is_special:
        raise UserError(f"--predictions {out} must end in .csv")
    if arguments.labels and out.resolve() == path_of(arguments.labels, "--labels").resolve():
        raise UserError(f"--predictions {out} is the list of --labels; take another name")


def _same_place(name: str, directory: str, data: DataConfig) -> bool:
    """Whether images are those that a recipe's `config.data` names."""
    if not directory or not data.dir:
        return directory == data.dir and name == data.name
    return path_of(directory, "--data-dir").resolve() == path_of(data.dir, "data.dir").resolve()


def _has_changed(test: TestSet, model: Classifier) -> bool:
    """Whether images that are held out now were not when the network was trained."""
    if (then := model.metadata.get("undivided")) is not None:  # "": there were images for the test
        return test.undivided != then
    # Older checkpoints have the numbers alone, which corrupt images were not counted in.
    count = (model.metadata.get("images") or {}).get("test", len(test.part))
    return model.config.data.on_corrupt == "error" and count != len(test.part)


def _place(model: Classifier, arguments: Any) -> tuple[str, str, str]:
    """Returns `data.name`, `data.source` and `data.dir` of the images to evaluate on.

    By default they are those of training. A directory of images is told from one of prepared data
    sets by what it holds.

    Raises:
      UserError: if neither the command line nor the network says what to evaluate on.
    """
    data, directory = model.config.data, arguments.data_dir
    if arguments.labels:
        return data.name, "folder", directory
    if arguments.dataset:
        if directory is not None and arguments.dataset in digits.NAMES:
            raise UserError("--data-dir does not apply to the digits, which are in this package")
        if directory is not None:
            any(_listing(directory))  # refuses what is not there
        return arguments.dataset, "tfds", directory or ""
    if directory is not None and not any(_listing(directory)):
        raise UserError(f"--data-dir {directory} is empty; expected images, or prepared data sets")
    if directory is None:
        if data.source == "tfds" and data.name == UNKNOWN:
            raise UserError(
                f"{model.path} does not say which images its network was trained on; name them by "
                "--data-dir or --dataset"
            )
        return data.name, data.source, data.dir
    return data.name, shiftnet.data.source_of(path_of(directory, "--data-dir"), data), directory


def _listing(directory: str) -> Iterator[Path]:
    path = path_of(directory, "--data-dir")
    try:
        yield from path.iterdir()
    except OSError as error:
        raise UserError(f"--data-dir {path} cannot be read: {error.strerror}") from error


def _per_class(result: Evaluation, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Returns the scores of each class, by its name; None where there is nothing to divide by."""
    scores = result.per_class(len(names))
    columns = {
        "images": scores.images,
        "accuracy": scores.recall,
        "precision": scores.precision,
        "recall": scores.recall,
        "f1": scores.f1,
    }
    return {
        name: {column: finite(values[label].item()) for column, values in columns.items()}
        for label, name in enumerate(names)
    }


def _confused(result: Evaluation, names: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Returns the pairs of classes that are taken for one another most often."""
    wrong = [pair for pair in result.confusion() if pair[0] != pair[1]]
    wrong.sort(key=lambda pair: -pair[2])
    return [
        {"class": names[label], "prediction": names[prediction], "images": count}
        for label, prediction, count in wrong[:most]
    ]


def _predictions(
    result: Evaluation, part: Split | Source, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns a row of every image; those of a data set in memory are called by their number."""
    return [
        {
            "image": str(index) if isinstance(part, Split) else part.name(index),
            "class": names[label],
            "prediction": names[prediction],
            "confidence": finite(round(float(confidence), 6)),
        }
        for index, label, prediction, confidence in zip(
            result.indices, result.labels, result.predictions, result.confidences, strict=True
        )
    ]


def _line(row: dict[str, Any]) -> str:
    matched = f" ({row['classes']})" if "classes" in row else ""
    loss, error = row["loss"], row["calibration_error"]
    numbers = "loss not finite" if loss is None else f"loss {loss:.4f}"
    if error is not None:
        numbers += f"  calibration error {error:.2%}"
    top5 = f"top-5 {row['top5']:.2%}  " if row["num_classes"] > 5 else ""
    return (
        f"{row['checkpoint']}  {row['arch']} on {row['dataset']}, {row['images']} images{matched}: "
        f"top-1 {row['top1']:.2%}  {top5}{numbers}"
    )


def _details(row: dict[str, Any]) -> Iterator[str]:
    """Yields the lines that were asked for besides."""
    if scores := row.get("per_class"):
        width = max(5, *map(len, scores))
        yield f"{'class':{width}s}  images  precision  recall      F1"
        for name, score in scores.items():
            numbers = (score["precision"], score["recall"], score["f1"])
            texts = [f"{'-' if number is None else f'{number:.2%}':>9s}" for number in numbers]
            yield f"{name:{width}s}  {score['images']:6d}  {texts[0]} {texts[1][1:]} {texts[2][1:]}"
    for pair in row.get("confused", ()):
        yield f"{pair['class']} taken for {pair['prediction']}: {pair['images']} images"
    for one in row.get("wrong", ()):
        image, name, prediction, confidence = one.values()
        yield f"{image}: {name} taken for {prediction}, {confidence or 0:.1%}"
