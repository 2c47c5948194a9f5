"""Counts a network's parameters and multiply-adds.

By default it prints the lines of the count tool published with arXiv:1711.08141, in that tool's
own convention (see `page_flops`); --true prints the true counts, layer by layer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from shiftnet import config as config_lib
from shiftnet.errors import UserError, reported
from shiftnet.models import build, parse_arch
from shiftnet.models.counting import Counts, count

# Values in one tensor, channels times pixels. Tracing a shift builds a table of positions as large
# as what it moves; this bound keeps that to a few GB.
MOST_VALUES = 2**28


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Counts the network that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="python -m shiftnet.count", description=__doc__)
    parser.add_argument("--arch", required=True, help="a family and its depth: shiftresnet20")
    for name in ("expansion", "reduction", "reduction_mode"):
        field = config_lib.FIELDS[f"model.{name}"]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="|".join(field.choices) or "FLOAT",
            help=f"{field.doc} (default: {_default(name)})",
        )
    parser.add_argument("--num-classes", metavar="N", type=int, default=10, help="default: 10")
    parser.add_argument(
        "--image-size", metavar="PIXELS", type=int, default=32, help="height and width, default: 32"
    )
    parser.add_argument(
        "--true",
        action="store_true",
        help="print what really runs: a line a layer, bytes of weights, peak activations",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON instead")
    arguments = parser.parse_args(argv)

    model = _model_config(arguments)
    for option, value in (
        ("--num-classes", arguments.num_classes),
        ("--image-size", arguments.image_size),
    ):
        if value < 1:
            raise UserError(f"{option} must be at least 1, found {value}")
    new = _count(model, arguments)
    if arguments.true and not arguments.json:
        print(_table(new))
        return 0
    _, depth = parse_arch(model["arch"])
    plain = {**config_lib.default_config().model, "arch": f"resnet{depth}"}
    page = _page(new, _count(plain, arguments))
    if arguments.json:
        print(json.dumps(_everything(model, arguments, page, new), indent=2))
        return 0
    if model["reduction"] != 1:
        print(f"==> {model['arch']} with reduction {model['reduction']:.2f}")
    for title, numbers in page.items():
        print(
            f"{title}: (new) {numbers['new']} (original) {numbers['original']} "
            f"(reduction) {numbers['reduction']:.2f}"
        )
    return 0


def page_flops(counts: Counts) -> int:
    """The multiply-adds of one of the published networks, as the published tool counted them.

    It differs from the true count in two layers. The stem counts as 3x3 convolution of one channel
    to as many as the last stage has (and not of 3 to as many as the first has); a depthwise
    convolution counts at the size that its block returns, though it runs before the stride.
    """
    layers = {layer.name: layer for layer in counts.layers}
    height, width, _ = layers["conv1"].output
    features = layers["linear"].multiply_adds // layers["linear"].output[0]  # of the last stage
    total = 0
    for name, layer in layers.items():
        if name == "conv1":
            total += height * width * 9 * features
        elif name.endswith(".depth"):
            returned = layers[name.removesuffix("depth") + "conv3"].output
            total += 9 * returned[0] * returned[1] * layer.output[2]
        else:
            total += layer.multiply_adds
    return total


def _default(name: str) -> str:
    if name == "reduction_mode":
        return "block for depthwiseresnet, net otherwise"
    return str(config_lib.FIELDS[f"model.{name}"].default)


def _model_config(arguments: Any) -> Mapping[str, Any]:
    """A recipe's `config.model` with what the command line says of it."""
    config = config_lib.default_config()
    family, _ = parse_arch(arguments.arch)
    if family == "depthwiseresnet":  # published with this mode alone
        config.model.reduction_mode = "block"
    for name in ("arch", "expansion", "reduction", "reduction_mode"):
        text = getattr(arguments, name)
        if text is not None:
            config_lib.override(config, f"model.{name}", text)
    config_lib.validate(config)
    return config.model


def _count(model: Mapping[str, Any], arguments: Any) -> Counts:
    size = arguments.image_size
    # Abstract: shapes and types, no memory and no random numbers.
    network = nnx.eval_shape(lambda: build(model, arguments.num_classes, rngs=nnx.Rngs(0)))
    widest = max(leaf.shape[-1] for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    if widest * size**2 > MOST_VALUES:
        raise UserError(
            f"{widest} channels at {size}x{size} pixels are more than can be counted: "
            f"together at most {MOST_VALUES}, found {widest * size**2}"
        )
    return count(network, (size, size, 3))


def _page(new: Counts, original: Counts) -> dict[str, dict[str, float]]:
    pairs = {
        "Parameters": (new.parameters, original.parameters),
        "FLOPs": (page_flops(new), page_flops(original)),
    }
    return {
        title: {"new": ours, "original": plain, "reduction": plain / ours}
        for title, (ours, plain) in pairs.items()
    }


def _everything(
    model: Mapping[str, Any], arguments: Any, page: Mapping[str, Any], new: Counts
) -> dict[str, Any]:
    options = ("arch", "expansion", "reduction", "reduction_mode")
    return {
        **{name: model[name] for name in options},
        "num_classes": arguments.num_classes,
        "image_size": arguments.image_size,
        "page": {title.lower(): numbers for title, numbers in page.items()},
        "true": {
            "multiply_adds": new.multiply_adds,
            "parameters": new.parameters,
            "weight_bytes": new.weight_bytes,
            "peak_activation_bytes": new.peak_activation_bytes,
            "layers": [layer._asdict() for layer in new.layers],
        },
    }


def _table(counts: Counts) -> str:
    titles = ("layer", "output", "multiply-adds", "parameters", "weight bytes")
    rows: list[tuple[str, ...]] = [titles]
    for layer in counts.layers:
        output = "x".join(map(str, layer.output))
        numbers = (layer.multiply_adds, layer.parameters, layer.weight_bytes)
        rows.append((layer.name, output, *(f"{number:,}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"multiply-adds:    {counts.multiply_adds:>15,} an image",
            f"parameters:       {counts.parameters:>15,}",
            f"weights:          {counts.weight_bytes:>15,} bytes",
            f"peak activations: {counts.peak_activation_bytes:>15,} bytes an image",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
