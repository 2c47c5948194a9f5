"""See `python train.py --help`, and shiftnet/cli/train.py."""

if __name__ == "__main__":
    import sys

    from shiftnet.__main__ import main

    sys.exit(main(["train", *sys.argv[1:]]))
