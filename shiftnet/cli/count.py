"""Counts a network's parameters and multiply-adds.

For the networks published with arXiv:1711.08141 it prints what the count tool published there
prints, in that tool's convention, which differs from the true count in two layers. For other
networks, and with --true, it prints the true counts, layer by layer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from shiftnet import config as config_lib
from shiftnet import tables
from shiftnet.errors import UserError, reported
from shiftnet.models import build, image_size, own, parse_arch
from shiftnet.models.counting import Counts, count

# The fields of `config.model` that are options, and the families whose counts were published.
OPTIONS = (
    *("expansion", "reduction", "reduction_mode", "width"),
    *("weights", "weight_bits", "weights_of", "weights_first_last"),
    *("activations", "shift"),
)
PUBLISHED = ("shiftresnet", "resnet", "depthwiseresnet")

# The largest tensor that is counted, in channels times pixels. Tracing a shift builds a table of
# positions as large as the tensor it moves; this bound keeps the table to a few GB.
MOST_VALUES = 2**28


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Counts the network that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet count", description=__doc__)
    parser.add_argument(
        "--arch",
        metavar="TEXT",
        required=True,
        help="a family and its depth, such as shiftresnet20",
    )
    for name in OPTIONS:
        field = config_lib.FIELDS[f"model.{name}"]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=field.metavar,
            help=f"{field.doc} (default: {_default(name)})",
        )
    parser.add_argument(
        "--quantize-first-last",
        action="store_true",
        help=config_lib.FIELDS["model.quantize_first_last"].doc,
    )
    parser.add_argument(
        "--num-classes",
        metavar="N",
        type=int,
        help="number of classes (default: 10; 1000 for ImageNet networks)",
    )
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=int,
        help="height and width of the images (default: 32; 224 for ImageNet networks)",
    )
    parser.add_argument(
        "--true",
        action="store_true",
        help="print the true counts: one line per layer, bytes of weights, peak activations",
    )
    parser.add_argument("--json", action="store_true", help="print all counts as JSON instead")
    arguments = parser.parse_args(argv)

    model = _model_config(arguments)
    family, depth = "", None
    if own.is_own(model["arch"]):
        own.allow(model["arch"])
    else:
        family, depth = parse_arch(model["arch"])
    if arguments.image_size is None:
        arguments.image_size = image_size(model["arch"])
    if arguments.num_classes is None:
        arguments.num_classes = 10 if image_size(model["arch"]) == 32 else 1000
    for option, value in (
        ("--num-classes", arguments.num_classes),
        ("--image-size", arguments.image_size),
    ):
        if value < 1:
            raise UserError(f"{option} must be at least 1, found {value}")
    new = _count(model, arguments)
    page = {}
    if family in PUBLISHED:
        plain = {**config_lib.default_config().model, "arch": f"resnet{depth}"}
        page = _page(new, _count(plain, arguments))
    if (arguments.true or not page) and not arguments.json:
        print(_table(new))
        return 0
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
    if any(layer.bits < 32 for layer in new.layers):
        print(_bits(new))
    return 0


def page_flops(counts: Counts) -> int:
    """Returns the multiply-adds of a published network as the published tool counted them.

    They differ from the true count in two layers. The stem is counted as a 3x3 convolution from one
    channel to the last stage's channels, instead of from 3 to the first stage's. A depthwise
    convolution is counted at its block's output size, though it runs before the stride.
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


def _model_config(arguments: Any) -> config_lib.ModelConfig:
    """Returns a recipe's `config.model` with the options of the command line."""
    config = config_lib.default_config()
    config.model.arch = arguments.arch
    if not own.is_own(arguments.arch) and parse_arch(arguments.arch)[0] == "depthwiseresnet":
        # Published with this mode alone.
        config.model.reduction_mode = "block"
    for name in OPTIONS:
        text = getattr(arguments, name)
        if text is not None:
            config_lib.override(config, f"model.{name}", text)
    config.model.quantize_first_last = arguments.quantize_first_last
    config_lib.check_effects(config)
    return config.model


def _count(model: Mapping[str, Any], arguments: Any) -> Counts:
    size = arguments.image_size
    # Only shapes and dtypes: this takes no memory and draws no random numbers.
    network = nnx.eval_shape(lambda: build(model, arguments.num_classes, rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))]
    widest = max(shape[-1] for shape in shapes if shape)
    if widest * size**2 > MOST_VALUES:
        raise UserError(
            f"{widest} channels at {size}x{size} pixels are too large to count: "
            f"channels times pixels must be at most {MOST_VALUES}, found {widest * size**2}"
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
    published = {title.lower(): numbers for title, numbers in page.items()}
    return {
        **{name: model[name] for name in ("arch", *OPTIONS, "quantize_first_last")},
        "num_classes": arguments.num_classes,
        "image_size": arguments.image_size,
        **({"page": published} if published else {}),
        "true": {
            "multiply_adds": new.multiply_adds,
            "parameters": new.parameters,
            "weight_bytes": new.weight_bytes,
            "peak_activation_bytes": new.peak_activation_bytes,
            "layers": [layer._asdict() for layer in new.layers],
        },
    }


def _table(counts: Counts) -> str:
    rows: list[tuple[object, ...]] = [
        ("layer", "output", "multiply-adds", "parameters", "bits", "weight bytes")
    ]
    for layer in counts.layers:
        output = "x".join(map(str, layer.output))
        numbers = (layer.multiply_adds, layer.parameters, layer.bits, layer.weight_bytes)
        rows.append((layer.name, output, *numbers))
    return "\n".join(
        [
            tables.aligned(rows),
            "",
            f"multiply-adds:    {counts.multiply_adds:>15,} per image",
            f"parameters:       {counts.parameters:>15,}",
            f"weights:          {counts.weight_bytes:>15,} bytes",
            f"peak activations: {counts.peak_activation_bytes:>15,} bytes per image",
        ]
    )


def _bits(counts: Counts) -> str:
    """Returns two lines like the page's: bits per weight, and bytes packed against float32."""
    low = [layer for layer in counts.layers if layer.bits < 32]
    each = ", ".join(map(str, sorted({layer.bits for layer in low})))
    weights = sum(layer.parameters for layer in low)
    plain = 4 * counts.parameters
    return (
        f"Bits: (each) {each} (layers) {len(low)} "
        f"(share of parameters) {weights / counts.parameters:.2%}\n"
        f"Bytes: (packed) {counts.weight_bytes} (float32) {plain} "
        f"(reduction) {plain / counts.weight_bytes:.2f}"
    )
