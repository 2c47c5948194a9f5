"""Writes a trained network for use elsewhere; the ending of OUT says as what.

.stablehlo: a program of its own (jax.export) from uint8 images [batch, height, width, 3] to float32
logits [batch, classes], for CPU, CUDA and TPU and any batch, with the normalisation inside. It runs
where JAX does, without this package:

    logits = jax.export.deserialize(open("net.stablehlo", "rb").read()).call(images)

.safetensors, .npz, .pth: the arrays under the original code's names, in PyTorch's layouts; .pth
needs PyTorch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

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
from shiftnet.layers import Conv, Linear
from shiftnet.models import FAMILIES, parse_arch, torch_names
from shiftnet.models.folding import fold_batch_norms
from shiftnet.weights import LowBitWeight
from shiftnet.weights.levels import Levels

PLATFORMS = ("cpu", "cuda", "tpu")
ENDINGS = (".stablehlo", ".safetensors", ".npz", ".pth")


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Exports the checkpoint that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="python -m shiftnet.export", description=__doc__)
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint, as evaluate.py takes it")
    parser.add_argument("out", metavar="OUT", help=f"the file to write, {', '.join(ENDINGS)}")
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=int,
        help="height and width of a .stablehlo's images (default: 224 for a network trained on "
        "ImageNet or another folder's files, unless they had another size; 32 for the others)",
    )
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.suffix not in ENDINGS:
        raise UserError(f"{out} must end in one of {', '.join(ENDINGS)}")
    if arguments.image_size is not None and arguments.image_size < 1:
        raise UserError(f"--image-size must be at least 1, found {arguments.image_size}")
    if out.suffix == ".pth":
        _torch()

    model = shiftnet.load(arguments.ckpt)
    if out.suffix == ".stablehlo":
        size = arguments.image_size or image_size(model)
        content = stablehlo(model, size)
        _write(out, lambda file: file.write_bytes(content))
        print(
            f"{out}: {len(content):,} bytes; uint8 [batch, {size}, {size}, 3] to float32 "
            f"[batch, {len(model.class_names)}], for {', '.join(PLATFORMS)}"
        )
    else:
        arrays = original(model)
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


def stablehlo(model: Classifier, size: int) -> bytes:
    """A serialised `jax.export` program: uint8 `[b, size, size, 3]` to logits, float32."""
    network = model.network
    if nnx.to_flat_state(model.stats):
        fold_batch_norms(network)
    for _, layer in nnx.iter_modules(network):
        if isinstance(layer, Conv | Linear) and isinstance(layer.weight, LowBitWeight):
            layer.weight = Levels(layer.weight)

    def logits(images: jax.Array) -> jax.Array:
        return network(augment.normalize(images, model.mean, model.std))

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    return bytes(jax_export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize())


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
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


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
        torch = _torch()
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save({"state_dict": tensors}, file)


def _torch():
    try:
        import torch
    except ImportError:
        raise UserError("a .pth needs PyTorch, which is not installed; take .safetensors") from None
    return torch


def _write(out: Path, save) -> None:
    """Writes a file all at once."""
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        save(temporary)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
