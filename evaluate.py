"""See `python evaluate.py --help`, and shiftnet/cli/evaluate.py."""

if __name__ == "__main__":
    import sys

    from shiftnet.__main__ import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
