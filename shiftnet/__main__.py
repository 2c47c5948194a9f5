"""The command `shiftnet SUBCOMMAND`; in a checkout `python -m shiftnet SUBCOMMAND`."""

import importlib
import sys
from collections.abc import Sequence

from shiftnet.cli import COMMANDS
from shiftnet.errors import reported, unknown


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the command line names; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: shiftnet SUBCOMMAND ...   (SUBCOMMAND --help lists its options)\n")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:{width}}  {summary}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise unknown("subcommand", name, COMMANDS)
    command = importlib.import_module(f"shiftnet.cli.{COMMANDS[name][0]}")
    return command.main(rest)


if __name__ == "__main__":
    sys.exit(main())
