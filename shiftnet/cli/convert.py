"""Converts a checkpoint of the original PyTorch codes, without PyTorch and running none of it.

Takes what ShiftResNet's, the 1-bit wide ResNet's and S3's code write (.t7, .pth, .pth.tar, of any
Python and PyTorch since 2017), torchvision's ResNets, and the same arrays as .safetensors or .npz,
also those that `shiftnet export` writes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from shiftnet import checkpoint, data, interchange
from shiftnet import config as config_lib
from shiftnet.cli import prog, typed
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of
from shiftnet.interchange.convert import UNKNOWN, Options, convert, names_of


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Converts the file that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog=prog("convert"), description=__doc__)
    parser.add_argument("file", metavar="FILE", help="the original checkpoint")
    parser.add_argument(
        "--out", metavar="DIR", help="the checkpoint to write (default: converted/ and FILE's name)"
    )
    parser.add_argument(
        "--dataset",
        choices=data.NAMES,
        help="what it was trained on (default: by its architecture and number of classes)",
    )
    parser.add_argument(
        "--mean",
        metavar="R,G,B",
        help="what is subtracted from images, for pixels in [0, 1] (default: the data set's)",
    )
    parser.add_argument("--std", metavar="R,G,B", help="what they are divided by after that")
    parser.add_argument(
        "--class-names",
        metavar="FILE|A,B,...",
        help="a file of one name per line or a JSON list, or the names (default: the data set's)",
    )
    parser.add_argument(
        "--weights",
        choices=("float", "sign"),
        help="form of the weights, where the arrays do not show it (default: sign for a wide "
        "ResNet, else float)",
    )
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="the entry that holds the network, such as state_dict_ema (default: the usual places)",
    )
    arguments = parser.parse_args(argv)
    options = Options(
        dataset=arguments.dataset,
        weights=arguments.weights,
        mean=_rgb("--mean", arguments.mean),
        std=_rgb("--std", arguments.std),
        class_names=arguments.class_names and names_of(arguments.class_names),
    )

    path = path_of(arguments.file, "FILE")
    file = interchange.read(path, arguments.entry)
    try:
        converted = convert(file, path.name, options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    directory = checkpoint.write(
        arguments.out or Path("converted") / path.name,
        checkpoint.to_arrays(*nnx.split(converted.network, nnx.Param, nnx.BatchStat)[1:]),
        converted.metadata,
    )
    recipe = config_lib.from_json(converted.metadata["config"])
    folder = ["--data-dir", "FOLDER"] if recipe.data.name == UNKNOWN else []
    print(converted.report)
    evaluate = typed("evaluate", [str(directory), *folder])
    print(f"\nwritten: {directory}\nevaluate it: {evaluate}")
    return 0


def _rgb(option: str, text: str | None) -> data.RGB | None:
    """Three numbers with commas between them.

    Raises:
      UserError: for anything else, or a standard deviation that is not positive.
    """
    if text is None:
        return None
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise UserError(f"{option} must be three numbers R,G,B, found {text!r}") from None
    is_good = all(map(math.isfinite, (red, green, blue)))
    if not is_good or (option == "--std" and min(red, green, blue) <= 0):
        kind = "positive" if option == "--std" else "finite"
        raise UserError(f"{option} must be three {kind} numbers, found {text!r}")
    return red, green, blue
