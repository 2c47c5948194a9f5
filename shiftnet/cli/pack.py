"""Writes a network as a packed file: low-bit weights at their true width, batch norms folded."""

from collections.abc import Sequence

import shiftnet
from shiftnet import config as config_lib
from shiftnet import packing, quantizers, tables
from shiftnet.cli import add_network, allow_network
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Packs the checkpoint that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet pack", description=__doc__)
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint or a trained network's name, as evaluate takes it",
    )
    parser.add_argument("out", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument(
        "--rest",
        choices=packing.RESTS,
        default="float32",
        help="dtype of the unquantized parameters (default: float32)",
    )
    add_network(parser)
    arguments = parser.parse_args(argv)
    allow_network(arguments)
    out = path_of(arguments.out, "OUT.safetensors")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors, by which packed files are recognized")

    model = shiftnet.load(arguments.ckpt)
    if out.resolve() == model.path.resolve():
        raise UserError(f"{out} is the network that is to be packed; take another name")
    network = model.network
    packing.write(out, network, model.metadata, arguments.rest)
    print(_table(quantizers.of_layers(network), arguments.rest))
    before = 4 * sum(leaf.size for leaf in quantizers.of_layers(network).values())
    size = out.stat().st_size
    print(
        f"\n{out}: {size / 1e6:.2f} MB ({size:,} bytes); "
        f"its weights alone are {before / 1e6:.2f} MB in float32, ratio {before / size:.1f}"
    )
    return 0


def _table(forms: dict[str, quantizers.Weight], rest: str) -> str:
    width = {"float32": 4, "float16": 2}[rest]
    rows: list[tuple[object, ...]] = [
        ("layer", "shape", "bits", "float32 bytes", "packed bytes"),
    ]
    for name, weight in forms.items():
        low = isinstance(weight, quantizers.LowBitWeight)
        stored = weight.packed_bytes if low else width * weight.size
        bits = weight.bits if low else 8 * width
        shape = "x".join(map(str, weight.shape))
        rows.append((name, shape, bits, 4 * weight.size, stored))
    return tables.aligned(rows)
