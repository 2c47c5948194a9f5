"""`python -m shiftnet.convert_torch`, the promised name of `shiftnet convert`."""

import sys

from shiftnet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
