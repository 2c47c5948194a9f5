"""The command-line options that several benchmarks have."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.protocol import duration


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype` and `--tf32`."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the computation; parameters are float32",
    )
    parser.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let float32 products on CUDA round their inputs to TF32, on both sides",
    )


def add_num_classes(parser: argparse.ArgumentParser) -> None:
    """Adds `--num-classes`."""
    parser.add_argument("--num-classes", type=positive, default=100, help="length of the logits")


def add_rows(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds `--only` and `--list`, for a benchmark of many rows."""
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help=f"rows, such as {example}"
    )
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds `--rounds`."""
    parser.add_argument(
        "--rounds", type=positive, default=default, help="timed rounds of each side"
    )


def add_budget(parser: argparse.ArgumentParser, default: str | None, meaning: str) -> None:
    """Adds `--budget`, in seconds; the help says what it limits."""
    parser.add_argument(
        "--budget",
        type=duration,
        default=default,
        metavar="TIME",
        help=f"such as 8m or 90s{meaning}",
    )


def add_peer(
    parser: argparse.ArgumentParser,
    python: str | None,
    forms: Sequence[str] | None = ("*",),
    meaning: str = "which of the peer's forms to try",
) -> None:
    """Adds `--torch-python` and `--forms`, with their defaults."""
    parser.add_argument(
        "--torch-python", metavar="PATH", default=python, help="a Python that has PyTorch"
    )
    parser.add_argument(
        "--forms", nargs="+", default=forms and list(forms), metavar="PATTERN", help=meaning
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", metavar="OUT", type=Path, help="write all that was measured")


def add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--plot` and `--measured`; `what` is drawn."""
    parser.add_argument("--plot", metavar="OUT", type=Path, help=f"draw the {what} (png or svg)")
    parser.add_argument(
        "--measured", metavar="JSON", type=Path, help="draw this --json of an earlier run instead"
    )


def can_plot(options: argparse.Namespace) -> bool:
    """Whether a plot was asked for and can be drawn; says why not."""
    if options.plot and importlib.util.find_spec("altair") is None:
        print('no plot: altair is not installed (pip install -e ".[report]"); --measured draws')
        return False
    return options.plot is not None
