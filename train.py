"""See `python train.py --help`, and shiftnet/cli/train.py."""

if __name__ == "__main__":  # the processes that decode images import this file too
    import sys

    from shiftnet.__main__ import main

    sys.exit(main(["train", *sys.argv[1:]]))
