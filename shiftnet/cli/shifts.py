"""Draws where the channels of a network's learned shifts went, and prints how many stayed."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

import shiftnet
from shiftnet import config as config_lib
from shiftnet import tables
from shiftnet.cli import add_network, allow_network
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of, write_atomically
from shiftnet.layers import LearnedShift
from shiftnet.layers.learned_shift import REACH
from shiftnet.results import shift_figure
from shiftnet.results.shift_figure import Offsets


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Draws the shifts of the checkpoint that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet shifts", description=__doc__)
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint or a trained network's name, as evaluate takes it",
    )
    parser.add_argument("out", metavar="OUT.svg", help="the figure to write")
    add_network(parser)
    arguments = parser.parse_args(argv)
    allow_network(arguments)
    out = path_of(arguments.out, "OUT.svg")
    if out.suffix != ".svg":
        raise UserError(f"{out} must end in .svg, which it is written as")

    offsets = {
        ".".join(map(str, path)): Offsets(
            *(np.clip(axis[...], -REACH, REACH) for axis in (module.rows, module.columns))
        )
        for path, module in nnx.iter_modules(shiftnet.load(arguments.ckpt).network)
        if isinstance(module, LearnedShift)
    }
    if not offsets:
        raise UserError(f"{arguments.ckpt} has no learned shifts, only fixed ones or none")
    write_atomically(out, shift_figure.svg(offsets))
    print(_table(offsets))
    print(f"\n{out}: one panel per layer, rows downwards, a dot's area by its channels")
    return 0


def _table(offsets: dict[str, Offsets]) -> str:
    rows: list[tuple[object, ...]] = [
        ("layer", "channels", "unmoved", "offsets", "mean distance"),
    ]
    for name, (down, right) in offsets.items():
        nearest = np.rint([down, right])
        unmoved = (nearest == 0).all(0).mean()
        distinct = len(np.unique(nearest, axis=1).T)
        distance = np.hypot(down, right).mean()
        rows.append((name, len(down), f"{unmoved:.1%}", distinct, f"{distance:.2f}"))
    return tables.aligned(rows)
