"""See `python evaluate.py --help`, and shiftnet/evaluate.py."""

import sys

from shiftnet.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
