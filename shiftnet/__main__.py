"""The command `shiftnet SUBCOMMAND`, in a checkout `python -m shiftnet SUBCOMMAND`."""

import importlib
import sys
from collections.abc import Sequence

from shiftnet import __version__
from shiftnet.cli import COMMANDS
from shiftnet.errors import UserError, interrupts_end, interrupts_end_at_once, reported, unknown

USAGE = """\
usage: shiftnet SUBCOMMAND ...

Trains and uses shift networks and networks with low-bit weights.

{}

shiftnet SUBCOMMAND --help lists a subcommand's options; shiftnet --version prints the version.
"""


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the command line names; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {command:{width}}  {summary}" for command, summary in COMMANDS.items())
        print(USAGE.format("\n".join(lines)), end="")
        return 0
    if name == "--version":
        print(f"shiftnet {__version__}")
        return 0
    if name not in COMMANDS:
        raise unknown("subcommand", name, COMMANDS)
    with interrupts_end_at_once():
        try:
            command = importlib.import_module(f"shiftnet.cli.{name}")
        except ModuleNotFoundError as error:
            if not error.name or error.name.partition(".")[0] == "shiftnet":
                raise
            raise UserError(
                f"{error.name} is not installed for {sys.executable}; docs/install.md says how, "
                "and in a checkout `. .venv/bin/activate` takes the Python that `make quickstart` "
                "set up"
            ) from error
    with interrupts_end():
        return command.main(rest)


if __name__ == "__main__":
    sys.exit(main())
