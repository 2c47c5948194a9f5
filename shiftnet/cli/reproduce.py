"""Trains the rows of the results' tables, several seeds at a time, and keeps what came out.

Without --only, --next and --reevaluate it lists the rows and trains nothing. A row that was
stopped, by --budget or Ctrl-C, continues exactly where it was when it is chosen again.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from shiftnet import config as config_lib
from shiftnet import results
from shiftnet.cli import typed
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of, write_atomically
from shiftnet.results import reproduce
from shiftnet.training.deadline import Deadline
from shiftnet.training.processes import set_up
from shiftnet.zoo.index import FOLDER

MOST_SEEDS = 1000
RESULTS = "results"


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line names; returns the exit code."""
    arguments = _arguments(argv)
    deadline = Deadline(arguments.budget)
    set_up()
    folder = path_of(arguments.results, "--results")
    # Outside of a checkout there is the package's table.
    packaged = arguments.results == RESULTS and not (folder / results.TABLE).exists()
    options = reproduce.Options(
        results=FOLDER if packaged else folder,
        workdir=path_of(arguments.workdir, "--workdir"),
        data_dir=arguments.data_dir,
        pattern=arguments.only or "*",
        seeds=arguments.seeds,
        together=arguments.together,
        epochs=arguments.epochs,
        recipe=arguments.recipe,
    )
    if arguments.list or not (arguments.only or arguments.next or arguments.reevaluate):
        print(reproduce.table(list(reproduce.find(options)), arguments.seeds))
        if not arguments.list:
            print("\nto train some of them: --only PATTERN or --next, see --help")
        return 0
    if packaged:
        next(reproduce.find(options))  # nothing is written where nothing matches
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / results.TABLE, (FOLDER / results.TABLE).read_text())
        options = dataclasses.replace(options, results=folder)
    if arguments.reevaluate:
        return reproduce.reevaluate(options)
    code = reproduce.run(options, deadline, cheapest_first=arguments.next)
    if code > 128:
        print(f"to continue: {typed('reproduce', sys.argv[1:] if argv is None else argv)}")
    return code


def seconds_of(text: str) -> float:
    """Returns the seconds of a time like `"90s"`, `"9m"` or `"2h"`.

    Raises:
      UserError: for another form.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smh])", text)
    if not match or not float(match[1]):
        raise UserError(f"--budget must be a time such as 90s, 9m or 2h, found {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _arguments(argv: Sequence[str] | None) -> Any:
    parser = config_lib.Parser(prog="shiftnet reproduce", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the rows, train nothing")
    parser.add_argument(
        "--reevaluate",
        action="store_true",
        help="train nothing: evaluate the kept networks again, in float32, and write what is found "
        "into their results",
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="train the rows, or tables, of that name, such as 'shiftresnet20_*'",
    )
    parser.add_argument(
        "--next",
        action="store_true",
        help="train the cheapest missing rows that the budget has room for",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="seeds per row (default: 1)"
    )
    parser.add_argument(
        "--together",
        metavar="N",
        type=int,
        help="seeds to train in one program (default: all; on a CPU, which gains nothing, 1)",
    )
    parser.add_argument("--budget", metavar="TIME", help="stop and save within 90s, 9m, 2h, ...")
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        help=f"shorten schedules; results go into {reproduce.SHORT}/",
    )
    parser.add_argument(
        "--recipe",
        choices=("", *config_lib.CIFAR_RECIPES),
        default="",
        metavar="|".join(config_lib.CIFAR_RECIPES),
        help="train by that recipe in place of the rows' own; results go into its folder",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        default=RESULTS,
        help=f"folder of the table and results (default: {RESULTS}, with the package's table)",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        default="runs/reproduce",
        help="where unfinished runs are kept (default: runs/reproduce)",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default="",
        help="folder of prepared data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    arguments = parser.parse_args(argv)
    for name in ("seeds", "together", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    if arguments.seeds > MOST_SEEDS:
        raise UserError(f"--seeds must be at most {MOST_SEEDS}, found {arguments.seeds}")
    if arguments.reevaluate and (arguments.list or arguments.next):
        raise UserError("--reevaluate excludes --list and --next")
    if arguments.only and arguments.next:
        raise UserError("--only and --next exclude each other")
    if arguments.budget is not None:
        arguments.budget = seconds_of(arguments.budget)
    return arguments
