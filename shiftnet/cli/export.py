"""Writes a trained network for use elsewhere; the ending of OUT says as what, or --hub DIR.

.stablehlo: a program of its own (jax.export) from uint8 images [batch, height, width, 3] to float32
logits [batch, classes], for CPU, CUDA and TPU and any batch, with the normalisation inside. It runs
where JAX does, without this package:

    logits = jax.export.deserialize(bytearray(open("net.stablehlo", "rb").read())).call(images)

.onnx: the same as an ONNX program from `images` to `logits`, computing in float32, with the class
names in its metadata; by jax2onnx. That package asks for an older orbax-checkpoint than this one,
without using it, so give it an environment of its own:

    python -m venv onnx && onnx/bin/pip install jax2onnx==0.17.1 onnxruntime
    onnx/bin/pip install -r requirements.txt    # pip names the conflict; it does no harm
    onnx/bin/python -m shiftnet export CKPT OUT.onnx

.c: a C99 program that computes with integers alone, without multiplications, and its .h, main.c and
Makefile beside it: `make && ./net image.ppm`. Activations get 8 bits; their steps are chosen from
images of the training set. See docs/integers.md and docs/microcontroller.md.

.json: the same integer network as data: its layers, and beside it their integers in an .npz.

.onnx with --integers: the same integer network with QuantizeLinear and DequantizeLinear, whose
convolutions onnxruntime computes in 8 bits, from `images` to `logits` as above; it needs the
package onnx alone (pip install onnx).

.safetensors, .npz, .pth: the arrays under the original code's names, in PyTorch's layouts, with a
description of the network, by which convert_torch brings all of it back; .pth needs PyTorch.
Here --integers writes low-bit weights as they are computed with, for hardware: for each low-bit
layer integers (int8, or int16 for 4-bit denseshift and 5-bit pot) under the weight's name and a
float32 number under that name and _scale, the weight being their product; float layers, biases and
batch norms as above (y = (x - running_mean) / sqrt(running_var + 1e-5) * weight + bias).

--hub DIR writes a folder as the Hugging Face hub has them: model.safetensors (the packed network),
config.json and README.md, the card. shiftnet.load takes such a folder, and hf://OWNER/NAME where it
was uploaded.
"""

import argparse
import functools
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import shiftnet
from shiftnet import config as config_lib
from shiftnet import integers, tensor_file, zoo
from shiftnet.cli import add_network, allow_network
from shiftnet.data import Split
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of, write_atomically
from shiftnet.inference import Classifier
from shiftnet.integers import c, calibration, interpreter, report
from shiftnet.integers import onnx as integers_onnx
from shiftnet.interchange import originals
from shiftnet.interchange.onnx import onnx
from shiftnet.interchange.stablehlo import stablehlo
from shiftnet.zoo import layout

PROGRAMS = (".stablehlo", ".onnx")
INTEGERS = (".c", ".json")
JSON_FORMAT = "shiftnet integers 1"
ENDINGS = (*PROGRAMS, *INTEGERS, *originals.ENDINGS)

# What applies to some kinds of OUT alone, and its value where it is not given.
CALIBRATION_IMAGES = 256
INTEGER_OPTIONS = {
    "calibrate_on": None,
    "requantize": "shift",
    "report": False,
    "calibration_images": CALIBRATION_IMAGES,
}
OPTIONS = {
    "image_size": None,
    "packed": False,
    "integers": False,
    **INTEGER_OPTIONS,
}


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Exports the checkpoint that the command line names; returns the exit code."""
    parser = config_lib.Parser(
        prog="shiftnet export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint or a trained network's name, as evaluate takes it",
    )
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help=f"the file to write, {', '.join(ENDINGS)}"
    )
    parser.add_argument("--hub", metavar="DIR", help="the folder to write, see above")
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=int,
        help="height and width of a program's images (default: 224 for a network trained on "
        "ImageNet or another folder's files, unless they had another size; 32 for the others)",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--packed",
        action="store_true",
        help="write a 1-bit wide ResNet's arrays as its original packs them, one bit per weight",
    )
    forms.add_argument(
        "--integers",
        action="store_true",
        help="write an integer network as .onnx, or low-bit weights as integers and scales; see "
        "above",
    )
    integer = parser.add_argument_group("for .c, .json and .onnx with --integers")
    integer.add_argument(
        "--calibrate-on",
        metavar="DIR",
        help="where the training set is prepared, or a folder with train/<class>/*; default: as in "
        "training",
    )
    integer.add_argument(
        "--calibration-images",
        metavar="N",
        type=int,
        default=CALIBRATION_IMAGES,
        help="images that the activations' steps are chosen from (default: %(default)s)",
    )
    integer.add_argument(
        "--requantize",
        choices=integers.REQUANTIZE,
        default="shift",
        help="how sums become activations: by a few shifts and additions (the default), or by a "
        "multiplication with an integer of 16 bits",
    )
    integer.add_argument(
        "--report",
        action="store_true",
        help="print each layer's widths and error, and the accuracy on the test set, float and "
        "integer",
    )
    add_network(parser)
    arguments = parser.parse_args(argv)
    allow_network(arguments)
    if (arguments.out is None) == (arguments.hub is None):
        raise UserError("expected either OUT, the file to write, or --hub DIR, the folder")
    if arguments.hub is not None:
        return _hub(arguments)
    out = path_of(arguments.out, "OUT")
    if out.suffix not in ENDINGS:
        raise UserError(f"{out} must end in one of {', '.join(ENDINGS)}")
    if arguments.image_size is not None and arguments.image_size < 1:
        raise UserError(f"--image-size must be at least 1, found {arguments.image_size}")
    for option in ("packed", "integers"):
        refused = set(PROGRAMS + INTEGERS) - ({".onnx"} if option == "integers" else set())
        if getattr(arguments, option) and out.suffix in refused:
            raise UserError(f"--{option} is for arrays, {out} is a program")
    computes_integers = out.suffix in INTEGERS or (out.suffix == ".onnx" and arguments.integers)
    if arguments.calibration_images < 1:
        raise UserError(
            f"--calibration-images must be at least 1, found {arguments.calibration_images}"
        )
    for option, default in INTEGER_OPTIONS.items():
        if getattr(arguments, option) != default and not computes_integers:
            spelled = option.replace("_", "-")
            raise UserError(
                f"--{spelled} is for {', '.join(INTEGERS)} and .onnx with --integers, OUT is {out}"
            )
    if arguments.image_size is not None and out.suffix in originals.ENDINGS:
        raise UserError(f"--image-size is for programs, OUT is {out}")
    if out.suffix == ".c":
        c.check_name(out.stem)
    elif out.suffix == ".json":
        _check_beside(out)
    _require(out.suffix, arguments.integers)  # before any work is done

    model = shiftnet.load(arguments.ckpt)
    if out.resolve() == model.path.resolve():
        raise UserError(f"{out} is the network that is to be exported; take another name")
    if computes_integers:
        return _integers(model, out, arguments)
    if out.suffix in PROGRAMS:
        size = arguments.image_size or model.preprocess.size
        if out.suffix == ".onnx":
            content = onnx(model.network, model.mean, model.std, size, model.class_names)
            if model.config.model.dtype != "float32":
                print(f"it computes in float32, the network in {model.config.model.dtype}")
        else:
            content = stablehlo(model.network, model.mean, model.std, size)
        write_atomically(out, content)
        print(
            f"{out}: {len(content):,} bytes; uint8 [batch, {size}, {size}, 3] to float32 "
            f"[batch, {len(model.class_names)}]"
        )
        return 0
    try:
        named = arrays(model, packed=arguments.packed, integers=arguments.integers)
        bare = arguments.packed and out.suffix == ".pth"
        if bare and model.config.model.dtype != "float32":
            raise UserError(
                f"a packed .pth cannot say that it computes in {model.config.model.dtype}; "
                "take .safetensors or .npz"
            )
        text = originals.description(model.metadata)
        content = originals.to_bytes(named, text, out.suffix, bare=bare)
    except UserError as error:
        raise UserError(f"{model.path}: {error}") from error
    write_atomically(out, content)
    print(f"{out}: {len(named)} arrays, {len(content):,} bytes")
    return 0


def _hub(arguments: argparse.Namespace) -> int:
    for option, default in OPTIONS.items():
        if getattr(arguments, option) != default:
            raise UserError(f"--{option.replace('_', '-')} does not apply to --hub")
    info = zoo.named(arguments.ckpt, "CKPT")
    folder = layout.write(arguments.hub, shiftnet.load(arguments.ckpt), info)
    names = (tensor_file.HUB_NAME, layout.CONFIG, layout.CARD)
    sizes = (f"{name} {(folder / name).stat().st_size:,} bytes" for name in names)
    print(f"{arguments.hub}: {', '.join(sizes)}")
    return 0


def _integers(model: Classifier, out: Path, arguments: argparse.Namespace) -> int:
    """Writes an integer network, as a program or as data; returns the exit code."""
    size = arguments.image_size or model.preprocess.size
    images = calibration.images(model, arguments.calibrate_on, arguments.calibration_images, size)
    try:
        conversion = integers.convert(
            model.network, images, model.mean, model.std, requantize=arguments.requantize
        )
        graph = conversion.graph
        if out.suffix == ".c":
            program = c.program(graph, model.class_names, out.stem)
            c.write(program, out.parent)
            print(f"{', '.join(program.files)} in {out.parent}")
            print(_sizes(program.sizes))
            if graph.multiplies:
                print("each layer multiplies once per value, to requantize it")
            else:
                print("no layer multiplies")
        elif out.suffix == ".onnx":
            content = integers_onnx.onnx(graph, model.class_names)
            write_atomically(out, content)
            print(
                f"{out}: {len(content):,} bytes; uint8 [batch, {size}, {size}, 3] to float32 "
                f"[batch, {graph.classes}], in integers of 8 bits"
            )
        else:
            described, arrays = integers.arrays(graph)
            document = {
                "format": JSON_FORMAT,
                "arrays": out.with_suffix(".npz").name,
                "multiplies": graph.multiplies,
                "class_names": list(model.class_names),
                "layers": described,
            }
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            write_atomically(out.with_suffix(".npz"), buffer.getvalue())
            write_atomically(out, json.dumps(document, indent=1))
            print(f"{out}: {len(described)} layers; their integers are in {document['arrays']}")
    except UserError as error:
        raise UserError(f"{model.path}: {error}") from error
    if arguments.report:
        print(f"\n{report.layers(conversion)}\n")
        print(_accuracies(model, graph, arguments.calibrate_on))
    return 0


def _check_beside(out: Path) -> None:
    """Checks that the .npz beside a .json, if any, is that of an earlier export to it.

    Raises:
      UserError: where it is another file.
    """
    beside = out.with_suffix(".npz")
    if not beside.exists():
        return
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))["format"] == JSON_FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        earlier = False
    if not earlier:
        raise UserError(
            f"{beside}, where the integers of {out.name} would go, is another file; take another "
            "name"
        )


def _sizes(sizes: c.Sizes) -> str:
    total = sizes.weights + sizes.requantization + sizes.tables
    return (
        f"flash: {sizes.weights:,} bytes of weights, {sizes.requantization:,} of requantization, "
        f"{sizes.tables:,} of tables, together {total:,}\n"
        f"RAM: {sizes.activations:,} bytes of activations"
    )


def _accuracies(model: Classifier, graph: integers.Graph, directory: str | None) -> str:
    """Returns the accuracy on the test set with floats and with integers, in a line."""
    test = calibration.part(model, directory, test=True)
    if not isinstance(test, Split):
        return "accuracy is reported for data sets in memory alone; use the program's own output"

    def floats(images: np.ndarray) -> np.ndarray:
        return model.predict(images).probabilities

    found = {
        "float": report.accuracy(floats, test.images, test.labels),
        "integers": report.accuracy(
            functools.partial(interpreter.logits, graph), test.images, test.labels
        ),
    }
    listed = ", ".join(f"{accuracy:.2%} {kind}" for kind, accuracy in found.items())
    return f"top-1 on {len(test)} test images: {listed}"


def arrays(model: Classifier, *, packed: bool, integers: bool) -> dict[str, np.ndarray]:
    """The network's arrays in the form that the command line names."""
    form = originals.arrays
    if packed:
        form = originals.packed
    elif integers:
        form = originals.integers
    return form(model.network, model.config.model)


def _require(ending: str, integers: bool) -> None:
    """Asks for the package that an ending, or its integers, need beside this one's own.

    Raises:
      UserError: where it is not installed.
    """
    name = {".pth": "torch", ".onnx": "onnx" if integers else "jax2onnx"}.get(ending)
    hint = "--help says how" if ending == ".onnx" else "take .safetensors"
    try:
        if name:
            importlib.import_module(name)
    except ImportError:
        raise UserError(f"a {ending} needs {name}, which is not installed here; {hint}") from None
