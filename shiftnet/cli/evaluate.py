"""Evaluates trained networks."""

import glob
import json
from collections.abc import Sequence
from typing import Any

import shiftnet
import shiftnet.data
from shiftnet import config as config_lib
from shiftnet.cli import prog
from shiftnet.errors import UserError, reported
from shiftnet.inference import Classifier
from shiftnet.training.evaluation import Evaluation, make_evaluator
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
        "one, a packed .safetensors file, or a glob",
    )
    parser.add_argument("--dataset", metavar="NAME", help="default: what each was trained on")
    parser.add_argument("--data-dir", metavar="DIR", help="default: as in training")
    parser.add_argument("--batch-size", metavar="N", type=int, help="default: as in training")
    parser.add_argument("--per-class", action="store_true", help="accuracy of every class too")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args(argv)

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, found {arguments.batch_size}")

    use_compilation_cache()
    paths = [path for pattern in arguments.ckpt for path in _expand(pattern)]
    rows = []
    for path in paths:
        model = shiftnet.load(path)
        row = evaluate(model, arguments)
        rows.append(row)
        if not arguments.json:
            print(_line(row))
            if "skipped" in row:
                print(f"  left out, corrupt: {', '.join(row['skipped'])}")
            for name, accuracy in row.get("per_class", {}).items():
                print(f"  {name:24s} {'no images' if accuracy is None else f'{accuracy:.2%}'}")
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return 0


def evaluate(model: Classifier, arguments: Any) -> dict[str, Any]:
    """One checkpoint's row: its path, what it is, and the numbers."""
    trained_on = model.config.data
    dataset = shiftnet.data.load(
        arguments.dataset or trained_on.name,
        source="tfds" if arguments.dataset else trained_on.source,
        data_dir=arguments.data_dir or trained_on.dir,
    )
    if len(dataset.class_names) != len(model.class_names):
        raise UserError(
            f"{model.path} knows {len(model.class_names)} classes, "
            f"{dataset.name} has {len(dataset.class_names)}"
        )
    result = make_evaluator(
        model.graphdef,
        dataset.test,
        trained_on,
        mean=model.mean,
        std=model.std,
        batch_size=arguments.batch_size or model.config.eval.batch_size,
        mesh=make_mesh(),
    )(model.params, model.stats)
    row = {
        "checkpoint": str(model.path),
        "arch": model.config.model.arch,
        "dataset": dataset.name,
        "images": len(result.labels),
        "step": model.note["step"],
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
    }
    if result.skipped:
        row["skipped"] = list(result.skipped)
    if arguments.per_class:
        row["per_class"] = _per_class(result, dataset.class_names)
    return row


def _per_class(result: Evaluation, names: Sequence[str]) -> dict[str, float | None]:
    accuracies = result.per_class(len(names)).tolist()
    # NaN, for a class without images, is not JSON.
    return {
        name: accuracy if accuracy == accuracy else None
        for name, accuracy in zip(names, accuracies, strict=True)
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['checkpoint']}  {row['arch']} on {row['dataset']}, {row['images']} images: "
        f"top-1 {row['top1']:.2%}  top-5 {row['top5']:.2%}  loss {row['loss']:.4f}"
    )


def _expand(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError(f"no file matches --ckpt {pattern!r}")
    return paths
