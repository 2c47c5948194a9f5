"""Trains a network, or continues training it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from shiftnet import config as config_lib
from shiftnet import zoo
from shiftnet.cli import prog, starting_point, typed
from shiftnet.config import Config
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of
from shiftnet.models import own
from shiftnet.planning import plan
from shiftnet.training.engine import Outcome, train
from shiftnet.training.processes import join, leaving, set_up


@leaving
@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line names; returns the exit code."""
    parser = config_lib.Parser(
        prog=prog("train"),
        description=__doc__,
        usage="%(prog)s --config FILE[:ARGUMENT] [--config.FIELD VALUE ...] [--workdir DIR]",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="where checkpoints and metrics go, and where a run is continued from "
        "(default: runs/ and the recipe's name)",
    )
    starting_point.add_arguments(parser)
    parser.add_argument(
        "--plan",
        metavar="TOPOLOGY[,TOPOLOGY ...]",
        help="train nothing: estimate memory, speed and the largest batch on devices that need not "
        "be here, such as v5e:4x4, v6e:16x16 or h200:8; exits with 1 where it does not fit",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few steps for TensorBoard's profile page, into the workdir",
    )
    config_lib.add_arguments(parser)
    processes = parser.add_argument_group(
        "several processes",
        "found without these under SLURM, in a Kubernetes Indexed Job and on Cloud TPU; elsewhere "
        "all three",
    )
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="the first process's address")
    processes.add_argument("--num-processes", metavar="N", type=int)
    processes.add_argument("--process-id", metavar="I", type=int, help="from 0")
    arguments = parser.parse_args(argv)
    config = config_lib.from_arguments(arguments)
    if own.is_own(config.model.arch):  # by the command line, or by a recipe that it names
        own.allow(config.model.arch)
    init = starting_point.of(arguments)
    if arguments.plan is not None:
        if arguments.profile:
            raise UserError("--profile does not apply to --plan, which runs nothing")
        return _plan(config, arguments.plan)
    set_up()
    join(arguments.coordinator, arguments.num_processes, arguments.process_id)

    workdir = path_of(arguments.workdir or _default_workdir(arguments.config), "--workdir")
    if jax.process_index() == 0:
        data = config.data.dir if config.data.source == "folder" else config.data.name
        print(f"{config.model.arch} in {workdir}: reading {data} ...", flush=True)
    outcome = train(config, workdir, init=init, profile=arguments.profile, find=zoo.find)
    if jax.process_index() == 0:
        given = sys.argv[1:] if argv is None else argv
        print(_report(outcome, workdir, _command(given, workdir)))
    return 0 if outcome.finished else 128 + outcome.signal


def _plan(config: Config, topologies: str) -> int:
    jax.config.update("jax_platforms", "cpu")  # nothing is run: look for no accelerator
    names = plan.parse(topologies)
    estimates = plan.plan(config, names, lambda text: print(f"{text} ...", file=sys.stderr))
    print(plan.report(config, estimates))
    too_small = [one.topology for one in estimates if not one.fits]
    if too_small:
        print(f"error: does not fit into the memory of {', '.join(too_small)}", file=sys.stderr)
    return 1 if too_small else 0


def _default_workdir(recipe: str) -> str:
    file, argument = config_lib.split_recipe(recipe)
    name = Path(file).stem
    return os.path.join("runs", f"{name}-{argument}" if argument else name)


def _command(argv: Sequence[str], workdir: Path) -> str:
    """Returns the command that was given, with its working directory, for a shell."""
    named = any(word.partition("=")[0] == "--workdir" for word in argv)
    return typed("train", [*argv, *([] if named else [f"--workdir={workdir}"])])


def _report(outcome: Outcome, workdir: Path, again: str) -> str:
    final, best = outcome.final[0], outcome.best[0]
    lines = [outcome.weights, ""] if outcome.weights and outcome.finished else []
    if final is not None:
        lines.append(f"test accuracy {final:.2%} after the last epoch")
    if best:
        chosen = f"best epoch {best['epoch']}, chosen on the {outcome.chosen_on} images: "
        lines.append(f"{chosen}test accuracy {best['test_accuracy']:.2%}")
    if outcome.finished:
        lines.append(f"evaluate it: {typed('evaluate', [str(workdir)])}")
    else:
        lines.append(f"stopped after step {outcome.step}, saved; to continue: {again}")
    return "\n".join(lines)
