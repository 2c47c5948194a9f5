"""Prints the table of accuracy and cost by the form of weights and activations.

    python -m benchmarks.combinations [--sweeps results/combinations]

Reads `NETWORK/trials.json` for every network of `NETWORKS`: what `shiftnet sweep` writes when it
tries each form of weights with each of activations. The weights' bytes, bit operations and energy
are `shiftnet count`'s.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from shiftnet import config as config_lib
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of
from shiftnet.models import build
from shiftnet.models.counting import Counts, count

# Folder of its sweep, what it is called, and its recipe.
NETWORKS = {
    "shiftresnet20": (
        "ShiftResNet20, expansion 1",
        "configs/shiftresnet20_c100.py:expansion=1,recipe=short",
    ),
    "resnet20": ("ResNet20", "configs/resnet20_c100.py:recipe=short"),
    "wrn20_1": ("WRN-20-1", "configs/wrn20_10_c100.py:width=1,recipe=short"),
}
FIELDS = ("model.weights", "model.activations")
CLASSES = 100


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = config_lib.Parser(
        prog="python -m benchmarks.combinations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweeps", metavar="DIR", default="results/combinations")
    arguments = parser.parse_args(argv)
    sweeps = path_of(arguments.sweeps, "--sweeps")
    parts = []
    for folder, (title, recipe) in NETWORKS.items():
        file = sweeps / folder / "trials.json"
        if file.exists():
            parts.append(f"## {title}\n\n{table(recipe, trials(file))}\n")
    if not parts:
        raise UserError(f"--sweeps {sweeps}: found no trials.json in {', '.join(NETWORKS)}")
    print("\n".join(parts), end="")
    return 0


def trials(file: Path) -> list[Mapping[str, Any]]:
    """Returns the trials of a sweep that were trained to their end, the best first.

    Raises:
      UserError: if the file lists no such trials, or others.
    """
    try:
        found = [one for one in json.loads(file.read_bytes()) if one["state"] == "complete"]
        if found and all(tuple(sorted(one["params"])) == tuple(sorted(FIELDS)) for one in found):
            return found
    except (ValueError, TypeError, LookupError):
        pass
    raise UserError(f"{file}: expected a sweep's finished trials over {' and '.join(FIELDS)}")


def table(recipe: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table, a line for each trial.

    Args:
      recipe: of all of them.
      found: as `trials` returns them.
    """
    lines = [
        "| weights | activations | top-1, % | bytes | bit operations, millions | energy, µJ |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        forms = [one["params"][field] for field in FIELDS]
        cost = counted(recipe, one["params"])
        numbers = (
            f"{one['validation_accuracy']:.2%}".rstrip("%"),
            f"{cost.weight_bytes:,}",
            f"{cost.bit_operations / 1e6:,.0f}",
            f"{cost.picojoules / 1e6:,.2f}",
        )
        lines.append(f"| {' | '.join([*forms, *numbers])} |")
    return "\n".join(lines)


def counted(recipe: str, settings: Mapping[str, str]) -> Counts:
    """Counts the network of a recipe with these settings."""
    model = config_lib.load(recipe, settings).model
    return count(nnx.eval_shape(lambda: build(model, CLASSES, rngs=nnx.Rngs(0))))


if __name__ == "__main__":
    raise SystemExit(main())
