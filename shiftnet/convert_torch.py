"""`python -m shiftnet.convert_torch`, the promised name of `shiftnet convert`."""

import sys

from shiftnet.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
