"""Searches the settings of a recipe for the best accuracy on held-out training images.

    shiftnet sweep --config configs/shiftresnet20_c100.py:recipe=short \\
        --config.data.validation=5000 --over optimizer.muon_lr=0.02..0.2:log --over data.pad=0,2,4

Each trial is a run in a directory of its own. The same command continues a sweep that was stopped.
"""

import argparse
import sys
from collections.abc import Sequence

from shiftnet import config as config_lib
from shiftnet import zoo
from shiftnet.cli import prog, starting_point, typed
from shiftnet.cli.reproduce import MOST_SEEDS, seconds_of
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of
from shiftnet.models import own
from shiftnet.training import sweep
from shiftnet.training.deadline import Deadline
from shiftnet.training.processes import set_up


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Trains the trials of what the command line names; returns the exit code."""
    parser = config_lib.Parser(
        prog=prog("sweep"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config FILE[:ARGUMENT] --over FIELD=VALUES [--over ...] [...]",
    )
    parser.add_argument(
        "--over",
        metavar="FIELD=VALUES",
        action="append",
        default=[],
        help="a setting to search: A,B,... for a list, LOW..HIGH for a range of numbers, "
        "LOW..HIGH:log for one on a logarithmic scale; with lists alone every combination is tried "
        "once",
    )
    parser.add_argument(
        "--trials",
        metavar="N",
        type=int,
        default=20,
        help="number of trials, earlier ones included (default: 20)",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        default=1,
        help="seeds per trial, trained in one program; for a large chip (default: 1)",
    )
    parser.add_argument(
        "--no-prune", action="store_true", help="train every trial to its end, also poor ones"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        default="runs/sweep",
        help="where the trials go, and where a sweep is continued from (default: runs/sweep)",
    )
    starting_point.add_arguments(parser)
    parser.add_argument("--budget", metavar="TIME", help="stop and save within 90s, 9m, 2h, ...")
    config_lib.add_arguments(parser)
    arguments = parser.parse_args(argv)
    deadline = Deadline(seconds_of(arguments.budget) if arguments.budget else None)
    if not arguments.over:
        raise UserError("--over is missing: name a setting to search, see --help")
    for name, most in (("trials", 10**6), ("seeds", MOST_SEEDS)):
        if not 1 <= getattr(arguments, name) <= most:
            found = getattr(arguments, name)
            raise UserError(f"--{name} must be from 1 to {most}, found {found}")
    space = [sweep.Values.parse(text) for text in arguments.over]
    fields = [values.field for values in space]
    if twice := {field for field in fields if fields.count(field) > 1}:
        raise UserError(f"--over names {min(twice)} twice")
    config = config_lib.from_arguments(arguments)
    if own.is_own(config.model.arch):  # by the command line, or by a recipe that it names
        own.allow(config.model.arch)
    options = sweep.Options(
        config=config,
        space=space,
        workdir=path_of(arguments.workdir, "--workdir"),
        trials=arguments.trials,
        seeds=arguments.seeds,
        prune=not arguments.no_prune,
        init=starting_point.of(arguments),
        find=zoo.find,
    )
    set_up()
    code = sweep.run(options, deadline)
    if code > 128:
        print(f"to continue: {typed('sweep', sys.argv[1:] if argv is None else argv)}")
    return code
