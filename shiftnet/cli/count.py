"""Counts a network's parameters and multiply-adds.

For the networks published with arXiv:1711.08141 it prints what the count tool published there
prints, in that tool's convention, which differs from the true count in some layers. For other
networks, and with --true, it prints the true counts, layer by layer: multiply-adds by kind, bit
operations, bytes and energy. --compare prints those of several networks side by side.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from shiftnet import config as config_lib
from shiftnet import tables
from shiftnet.errors import UserError, reported
from shiftnet.models import FAMILIES, build, image_size, own, parse_arch, shuffleresnet
from shiftnet.models.arithmetic import DRAM_BYTE, KINDS
from shiftnet.models.counting import Counts, count

# The fields of `config.model` that are options, and the families whose counts were published.
OPTIONS = tuple(
    name for name in config_lib.ModelConfig() if name not in ("arch", "quantize_first_last")
)
PUBLISHED = ("shiftresnet", "resnet", "depthwiseresnet", "mobileresnet", "shuffleresnet")

# The largest tensor that is counted, in channels times pixels. Tracing a shift builds a table of
# positions as large as the tensor it moves; this bound keeps the table to a few GB.
MOST_VALUES = 2**28


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Counts the network that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet count", description=__doc__)
    networks = parser.add_mutually_exclusive_group(required=True)
    networks.add_argument(
        "--arch", metavar="TEXT", help="a family and its depth, such as shiftresnet20"
    )
    networks.add_argument(
        "--compare",
        metavar="ARCH[:OPTION=VALUE,...]",
        nargs="+",
        help="networks to compare, such as resnet20 shiftresnet20:expansion=3,weights=s3 "
        "'resnet20:weights_of=layer1.*:float,layer3.*:s3/2'",
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
        help="number of classes (default: 10; 1000 for ImageNet networks and your own)",
    )
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=int,
        help="height and width of the images (default: 32; 224 for ImageNet networks and your own)",
    )
    parser.add_argument(
        "--true",
        action="store_true",
        help="print the true counts: one line per layer, bytes, bit operations, energy",
    )
    parser.add_argument("--json", action="store_true", help="print all counts as JSON instead")
    arguments = parser.parse_args(argv)

    for option, value in (
        ("--num-classes", arguments.num_classes),
        ("--image-size", arguments.image_size),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, found {value}")
    if arguments.compare:
        _compare(arguments)
        return 0
    config = _config(arguments.arch)
    for name in OPTIONS:
        if (text := getattr(arguments, name)) is not None:
            config_lib.override(config, f"model.{name}", text)
    config.model.quantize_first_last = arguments.quantize_first_last
    config_lib.check_effects(config)
    model = config.model
    family, depth = ("", None) if own.is_own(model.arch) else parse_arch(model.arch)
    new = _count(model, arguments)
    page = {}
    if family in PUBLISHED:
        plain = {**config_lib.default_config().model, "arch": f"resnet{depth}"}
        page = _page(family, new, _count(plain, arguments))
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


def page_flops(family: str, counts: Counts) -> int:
    """Returns the multiply-adds of a published network as the published tool counted them.

    They differ from the true count. The stem is counted as a 3x3 convolution from one channel to
    the last stage's channels, instead of from 3 to the first stage's. In a depthwise block, the
    depthwise convolution is counted at the block's output size, though it runs before the stride;
    in a shuffle block not at all, and its grouped convolutions as if they had one group. A mobile
    block is counted as if its middle had as many channels as its output.
    """
    layers = {layer.name: layer for layer in counts.layers}
    height, width, _ = layers["conv1"].output
    features = layers["linear"].multiply_adds // layers["linear"].output[0]  # of the last stage
    total = 0
    for name, layer in layers.items():
        block, _, part = name.rpartition(".")
        if name == "conv1":
            total += height * width * 9 * features
        elif family == "mobileresnet" and part in ("conv1", "depth2", "conv2"):
            middle, outside = (layers[f"{block}.{conv}"].output[2] for conv in ("conv1", "conv2"))
            total += layer.multiply_adds // middle * outside
        elif family == "shuffleresnet" and part == "depth":
            continue
        elif part == "depth":
            returned = layers[f"{block}.conv3"].output
            total += 9 * returned[0] * returned[1] * layer.output[2]
        elif family == "shuffleresnet" and part in ("conv1", "conv3"):
            total += shuffleresnet.GROUPS * layer.multiply_adds
        else:
            total += layer.multiply_adds
    return total


def _default(name: str) -> str:
    if name == "reduction_mode":
        return "block for depthwiseresnet, mobileresnet and shuffleresnet, net otherwise"
    default = config_lib.FIELDS[f"model.{name}"].default
    return str(default).lower() if isinstance(default, bool) else str(default) or "none"


def _config(arch: str) -> config_lib.Config:
    """Returns a recipe for a network, with a reduction's mode as it was published."""
    config = config_lib.default_config()
    config.model.arch = arch
    if own.is_own(arch):
        own.allow(arch)
    else:
        config.model.reduction_mode = FAMILIES[parse_arch(arch)[0]].reduction_mode
    return config


def _compare(arguments: Any) -> None:
    """Prints the true counts of the networks of `--compare`.

    Raises:
      UserError: for an option that belongs to one of them, or a network that is named twice.
    """
    for name in (*OPTIONS, "quantize_first_last"):
        if getattr(arguments, name) not in (None, False):
            raise UserError(
                f"--{name.replace('_', '-')} would be ignored with --compare: an option follows "
                f"its network there, as in {arguments.compare[0]}:{name}={getattr(arguments, name)}"
            )
    fields = {name: f"model.{name}" for name in (*OPTIONS, "quantize_first_last")}
    found = {}
    for network in arguments.compare:
        if network in found:
            raise UserError(f"--compare names {network} twice")
        arch, _, options = network.partition(":")
        if arch.endswith(".py"):  # FILE.py:CLASS
            kind, _, options = options.partition(":")
            arch = f"{arch}:{kind}"
        config = _config(arch)
        config_lib.apply_argument(config, options, fields)
        config_lib.check_effects(config)
        found[network] = config.model, _count(config.model, arguments)
    if arguments.json:
        networks = [_everything(model, arguments, {}, counts) for model, counts in found.values()]
        print(json.dumps(networks, indent=2))
    else:
        sizes = [_sizes(model, arguments) for model, _ in found.values()]
        print(_comparison({network: counts for network, (_, counts) in found.items()}, sizes))


def _sizes(model: Mapping[str, Any], arguments: Any) -> tuple[int, int]:
    """Returns the number of classes, and the height and width of the images in pixels."""
    size = image_size(model["arch"])
    return arguments.num_classes or (10 if size == 32 else 1000), arguments.image_size or size


def _count(model: Mapping[str, Any], arguments: Any) -> Counts:
    classes, size = _sizes(model, arguments)
    # Only shapes and dtypes: this takes no memory and draws no random numbers.
    network = nnx.eval_shape(lambda: build(model, classes, rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))]
    widest = max(shape[-1] for shape in shapes if shape)
    if widest * size**2 > MOST_VALUES:
        raise UserError(
            f"{widest} channels at {size}x{size} pixels are too large to count: "
            f"channels times pixels must be at most {MOST_VALUES}, found {widest * size**2}"
        )
    return count(network, (size, size, 3))


def _page(family: str, new: Counts, original: Counts) -> dict[str, dict[str, float]]:
    pairs = {
        "Parameters": (new.parameters, original.parameters),
        "FLOPs": (page_flops(family, new), page_flops("resnet", original)),
    }
    return {
        title: {"new": ours, "original": plain, "reduction": plain / ours}
        for title, (ours, plain) in pairs.items()
    }


def _everything(
    model: Mapping[str, Any], arguments: Any, page: Mapping[str, Any], new: Counts
) -> dict[str, Any]:
    published = {title.lower(): numbers for title, numbers in page.items()}
    classes, size = _sizes(model, arguments)
    return {
        **{name: model[name] for name in ("arch", *OPTIONS, "quantize_first_last")},
        "num_classes": classes,
        "image_size": size,
        **({"page": published} if published else {}),
        "true": {
            "multiply_adds": new.multiply_adds,
            "parameters": new.parameters,
            "weight_bytes": new.weight_bytes,
            "peak_activation_bytes": new.peak_activation_bytes,
            "multiply_adds_by_kind": new.by_kind,
            "bit_operations": new.bit_operations,
            "bytes_moved": {"unfused": new.bytes_moved, "fused": new.fused_bytes_moved},
            "picojoules": {
                "multiply_adds": new.picojoules,
                "memory_unfused": DRAM_BYTE * new.bytes_moved,
                "memory_fused": DRAM_BYTE * new.fused_bytes_moved,
            },
            "layers": [layer._asdict() for layer in new.layers],
        },
    }


def _table(counts: Counts) -> str:
    rows: list[tuple[object, ...]] = [
        (
            *("layer", "output", "multiply-adds", "parameters", "bits", "weight bytes"),
            *("input bits", "kind"),
        )
    ]
    for layer in counts.layers:
        output = "x".join(map(str, layer.output))
        numbers = (layer.multiply_adds, layer.parameters, layer.bits, layer.weight_bytes)
        rows.append((layer.name, output, *numbers, layer.activation_bits, layer.kind))
    kinds = [f"{number:,} {kind}" for kind, number in counts.by_kind.items() if number]
    memory = (_microjoules(DRAM_BYTE * n) for n in (counts.bytes_moved, counts.fused_bytes_moved))
    return "\n".join(
        [
            tables.aligned(rows),
            "",
            f"multiply-adds:    {counts.multiply_adds:>15,} per image: {', '.join(kinds)}",
            f"parameters:       {counts.parameters:>15,}",
            f"weights:          {counts.weight_bytes:>15,} bytes",
            f"peak activations: {counts.peak_activation_bytes:>15,} bytes per image",
            f"bit operations:   {counts.bit_operations:>15,} per image",
            f"moved:            {counts.bytes_moved:>15,} bytes per image, "
            f"{counts.fused_bytes_moved:,} if fused",
            f"energy:           {_microjoules(counts.picojoules):>15} uJ per image, and for memory "
            "{} uJ, {} uJ if fused".format(*memory),
        ]
    )


def _comparison(networks: Mapping[str, Counts], sizes: Sequence[tuple[int, int]]) -> str:
    """Returns a table of networks, one per column.

    Args:
      networks: their counts, by name.
      sizes: their classes and their images' side, which are shown where they differ.
    """
    rows: list[tuple[str, Callable[[Counts], object]]] = [
        ("parameters", lambda n: n.parameters),
        ("weight bytes", lambda n: n.weight_bytes),
        ("peak activation bytes", lambda n: n.peak_activation_bytes),
        ("multiply-adds", lambda n: n.multiply_adds),
        *((f"  {kind}", lambda n, kind=kind: n.by_kind[kind]) for kind in KINDS),
        ("bit operations", lambda n: n.bit_operations),
        ("bytes moved", lambda n: n.bytes_moved),
        ("  fused", lambda n: n.fused_bytes_moved),
        ("energy, uJ", lambda n: _microjoules(n.picojoules)),
        ("  memory", lambda n: _microjoules(DRAM_BYTE * n.bytes_moved)),
        ("  memory, fused", lambda n: _microjoules(DRAM_BYTE * n.fused_bytes_moved)),
    ]
    table = [(title, *(number(counts) for counts in networks.values())) for title, number in rows]
    if len(set(sizes)) > 1:
        classes, sides = zip(*sizes, strict=True)
        table = [("image size", *sides), ("classes", *classes), *table]
    return tables.aligned([("per image", *networks), *table])


def _microjoules(picojoules: float) -> str:
    return f"{picojoules / 1e6:,.2f}"


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
