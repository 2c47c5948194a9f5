"""See `python evaluate.py --help`, and shiftnet/cli/evaluate.py."""

import sys

from shiftnet.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
