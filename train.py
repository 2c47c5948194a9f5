"""See `python train.py --help`, and shiftnet/train.py."""

import sys

from shiftnet.train import main

if __name__ == "__main__":
    sys.exit(main())
