"""The subcommands of `shiftnet`, one file each: they parse, call and print."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Subcommand -> what it does. Each is the function `main` of the module of its name here.
COMMANDS = {
    "train": "train a network, or continue a run",
    "evaluate": "evaluate trained networks on a data set",
    "predict": "classify images",
    "models": "list the trained networks that can be named",
    "prepare": "resize images once, for faster training",
    "count": "count parameters, multiply-adds, bits and bytes",
    "convert": "convert a checkpoint of the original PyTorch codes",
    "pack": "write a network with its low-bit weights at their true width",
    "export": "write a C program, StableHLO, ONNX, a folder for the Hugging Face hub, or arrays",
    "shifts": "draw where the channels of learned shifts went",
    "sweep": "search a recipe's settings on held-out images",
    "reproduce": "train rows of the results table",
    "report": "draw runs and results as a page or as tables",
}
# Scripts that are a subcommand under another name: file -> how people call it.
SCRIPTS = {
    "train.py": "train.py",
    "evaluate.py": "evaluate.py",
    "convert_torch.py": "python -m shiftnet.convert_torch",
}


def prog(subcommand: str) -> str:
    """Returns what the running command is called: `"shiftnet train"`, or `"train.py"`."""
    return SCRIPTS.get(Path(sys.argv[0]).name, f"shiftnet {subcommand}")


def typed(subcommand: str, arguments: Sequence[str], *, program: str | None = None) -> str:
    """Returns a command line for a shell, that calls `subcommand` as the running one was called.

    Args:
      subcommand: such as `"train"`.
      arguments: what follows it.
      program: how the running command was called; None: by `sys.argv[0]`.
    """
    name = Path(program or sys.argv[0]).name
    if name in SCRIPTS and f"{subcommand}.py" in SCRIPTS:
        start = ["python", f"{subcommand}.py"]
    elif name in ("__main__.py", *SCRIPTS):
        start = ["python", "-m", "shiftnet", subcommand]
    else:
        start = ["shiftnet", subcommand]
    return shlex.join([*start, *arguments])


def finite(number: float) -> float | None:
    """Returns a number for JSON, which has no NaN and no infinity: None in their place."""
    return number if math.isfinite(number) else None


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--network` of commands that read checkpoints."""
    parser.add_argument(
        "--network",
        metavar="FILE.py:CLASS",
        help="the class of a network of your own; the file is run, whatever checkpoints name",
    )


def allow_network(arguments: argparse.Namespace) -> None:
    """Lets the network be built that `--network` names, if it does.

    Raises:
      UserError: where there is no such class.
    """
    if arguments.network:
        from shiftnet.models import own  # imports JAX, which listing the commands should not

        own.allow(arguments.network)
