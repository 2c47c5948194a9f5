"""See `python train.py --help`, and shiftnet/cli/train.py."""

import sys

from shiftnet.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
