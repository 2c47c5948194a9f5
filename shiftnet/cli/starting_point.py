"""The options that say from which network a training starts."""

import argparse

from shiftnet import zoo
from shiftnet.errors import UserError
from shiftnet.training.restore import Init


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--init`, `--init-partial` and `--init-fresh-head`."""
    parser.add_argument(
        "--init",
        metavar="CKPT",
        help="a checkpoint or packed file, converted ones too, or a trained network's name, to "
        "start from; in the last layer classes are matched by name",
    )
    parser.add_argument(
        "--init-partial",
        action="store_true",
        help="take what fits from a network of another architecture",
    )
    parser.add_argument(
        "--init-fresh-head", action="store_true", help="do not take the last layer of --init"
    )


def of(arguments: argparse.Namespace) -> Init | None:
    """Returns the network that a command line names, None where it names none.

    Raises:
      UserError: where there is no such network, or the other two options stand without it.
    """
    if arguments.init is not None:
        source = zoo.find_trainable(arguments.init, "--init")
        return Init(source, arguments.init_partial, arguments.init_fresh_head)
    if arguments.init_partial or arguments.init_fresh_head:
        raise UserError("--init-partial and --init-fresh-head say what to take from an --init CKPT")
    return None
