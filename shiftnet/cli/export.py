"""Writes a trained network for use elsewhere; the ending of OUT says as what.

.stablehlo: a program of its own (jax.export) from uint8 images [batch, height, width, 3] to float32
logits [batch, classes], for CPU, CUDA and TPU and any batch, with the normalisation inside. It runs
where JAX does, without this package:

    logits = jax.export.deserialize(bytearray(open("net.stablehlo", "rb").read())).call(images)

.onnx: the same as an ONNX program, by jax2onnx. That package asks for an older orbax-checkpoint
than this one, without using it, so give it an environment of its own:

    python -m venv onnx && onnx/bin/pip install jax2onnx==0.17.1 onnxruntime
    onnx/bin/pip install -r requirements.txt    # pip names the conflict; it does no harm
    onnx/bin/python -m shiftnet export CKPT OUT.onnx

.safetensors, .npz, .pth: the arrays under the original code's names, in PyTorch's layouts; .pth
needs PyTorch.
"""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

import shiftnet
from shiftnet import config as config_lib
from shiftnet.data import augment
from shiftnet.errors import UserError, reported
from shiftnet.inference import Classifier
from shiftnet.interchange import torch_names
from shiftnet.kernels.implementations import lowered_for, only_xla
from shiftnet.layers.folding import fix_weights, fold_batch_norms
from shiftnet.models import FAMILIES, parse_arch
from shiftnet.quantizers import LowBitWeight

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAMS = (".stablehlo", ".onnx")
ENDINGS = (*PROGRAMS, ".safetensors", ".npz", ".pth")


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Exports the checkpoint that the command line names; returns the exit code."""
    parser = config_lib.Parser(
        prog="shiftnet export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint, as evaluate.py takes it")
    parser.add_argument("out", metavar="OUT", help=f"the file to write, {', '.join(ENDINGS)}")
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=int,
        help="height and width of a program's images (default: 224 for a network trained on "
        "ImageNet or another folder's files, unless they had another size; 32 for the others)",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="of a 1-bit wide ResNet's arrays: in the original's own packed form, a bit a weight",
    )
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.suffix not in ENDINGS:
        raise UserError(f"{out} must end in one of {', '.join(ENDINGS)}")
    if arguments.image_size is not None and arguments.image_size < 1:
        raise UserError(f"--image-size must be at least 1, found {arguments.image_size}")
    if arguments.packed and out.suffix in PROGRAMS:
        raise UserError(f"--packed is for arrays, {out} is a program")
    _converter(out.suffix)  # asked for before any work is done

    model = shiftnet.load(arguments.ckpt)
    if out.suffix in PROGRAMS:
        size = arguments.image_size or image_size(model)
        content = (stablehlo if out.suffix == ".stablehlo" else onnx)(model, size)
        _write(out, lambda file: file.write_bytes(content))
        print(
            f"{out}: {len(content):,} bytes; uint8 [batch, {size}, {size}, 3] to float32 "
            f"[batch, {len(model.class_names)}]"
        )
    else:
        arrays = packed(model) if arguments.packed else original(model)
        _write(out, lambda file: _save(file, out.suffix, arrays))
        print(f"{out}: {len(arrays)} arrays, {out.stat().st_size:,} bytes")
    return 0


def image_size(model: Classifier) -> int:
    """Height and width of the images that a network was trained on, in pixels."""
    recipe = model.config
    family, _ = parse_arch(recipe.model.arch)
    if recipe.data.source == "folder" or FAMILIES[family].image_size != 32:
        return recipe.data.size
    return FAMILIES[family].image_size


def program(model: Classifier, platform: str | None = None) -> Callable[[jax.Array], jax.Array]:
    """From uint8 `[N, H, W, 3]` to float32 logits, with batch norms folded, to be traced.

    Args:
      model: a trained network.
      platform: the program's operations are chosen for "cpu", "gpu" or "tpu"; None leaves that to
        the device it runs on.
    """
    network = model.network
    fold_batch_norms(network)
    fix_weights(network, LowBitWeight.quantized)

    def logits(images: jax.Array) -> jax.Array:
        with only_xla(), lowered_for(platform) if platform else contextlib.nullcontext():
            return network(augment.normalize(images, model.mean, model.std))

    return logits


def stablehlo(model: Classifier, size: int) -> bytes:
    """A serialised `jax.export` program: uint8 `[batch, size, size, 3]` to logits, float32."""
    exported = jax_export.export(jax.jit(program(model)), platforms=PLATFORMS)(_images(size))
    return bytes(exported.serialize())


def onnx(model: Classifier, size: int) -> bytes:
    """The same as `stablehlo`, as an ONNX model.

    Raises:
      UserError: where jax2onnx is not installed.
    """
    # ONNX has no choice by platform, and no gathering of single values.
    converted = _converter(".onnx").to_onnx(program(model, platform="tpu"), [_images(size)])
    return converted.SerializeToString()


def _images(size: int) -> jax.ShapeDtypeStruct:
    (batch,) = jax_export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)


def original(model: Classifier) -> dict[str, np.ndarray]:
    """The network's arrays under its original's names, with what PyTorch counts batches by.

    Raises:
      UserError: for a packed network, whose batch norms are folded.
    """
    if not nnx.to_flat_state(model.stats):
        raise UserError(f"{model.path} is packed: its batch norms are no longer the original's")
    arrays = torch_names.to_torch(model.network, naming(model))
    for name in [name for name in arrays if name.endswith(".running_var")]:
        arrays[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def packed(model: Classifier) -> dict[str, np.ndarray]:
    """A 1-bit wide ResNet as its original packs it: `original` with the prefix `module.`.

    The signs of every 1-bit convolution are bits, 1 for plus, packed along the input channels:
    uint8 `[out, in / 8, 3, 3]`.

    Raises:
      UserError: for another network, or one whose channels 8 does not divide.
    """
    config = model.config.model
    if naming(model) is not torch_names.WRN or config.weights != "sign":
        raise UserError(f"--packed is for 1-bit wide ResNets, this is a {config.arch}")
    arrays = original(model)
    for name, array in arrays.items():
        if name.startswith("group") and ".conv" in name:
            if array.shape[1] % 8:
                raise UserError(f"--packed needs channels that 8 divides, {name} has {array.shape}")
            arrays[name] = np.packbits(array >= 0, axis=1)
    return {f"module.{name}": array for name, array in arrays.items()}


def naming(model: Classifier) -> torch_names.Naming:
    """How the original of a network calls its arrays."""
    family, _ = parse_arch(model.config.model.arch)
    if family == "wrn":
        return torch_names.WRN
    # S3's CIFAR networks are ResNets under torchvision's names.
    is_s3 = family == "resnet" and model.config.model.weights in ("s3", "denseshift")
    in_shift_family = family in ("shiftresnet", "resnet", "depthwiseresnet")
    return torch_names.SHIFT if in_shift_family and not is_s3 else torch_names.TORCHVISION


def _save(file: Path, ending: str, arrays: dict[str, np.ndarray]) -> None:
    if ending == ".npz":
        with file.open("wb") as stream:  # by its name, NumPy would add an ending
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    elif ending == ".safetensors":
        import safetensors.numpy

        file.write_bytes(safetensors.numpy.save(arrays))
    else:
        torch = _converter(".pth")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        # The original reads a packed file as the state dict itself.
        is_packed = any(array.dtype == np.uint8 for array in arrays.values())
        torch.save(tensors if is_packed else {"state_dict": tensors}, file)


def _converter(ending: str) -> Any:
    """The package that an ending needs beside this one's own, or None.

    Raises:
      UserError: where it is not installed.
    """
    name = {".pth": "torch", ".onnx": "jax2onnx"}.get(ending)
    try:
        return importlib.import_module(name) if name else None
    except ImportError:
        raise UserError(
            f"a {ending} needs {name}, which is not installed here; --help says how"
            if ending == ".onnx"
            else f"a {ending} needs {name}, which is not installed here; take .safetensors"
        ) from None


def _write(out: Path, save) -> None:
    """Writes a file all at once."""
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        save(temporary)
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not be possible to name it even
            temporary.unlink()
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
