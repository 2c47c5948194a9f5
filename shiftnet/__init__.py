"""Shift networks and low-bit networks in JAX: train, evaluate, deploy.

shiftnet.list_models("*c100*")       # the trained networks
model = shiftnet.load("shiftresnet20_1c_c100")  # or a run of yours, "runs/shiftresnet20_c100"
model.predict(["cat.jpg"]).top(3)
logits = model(model.preprocess(["cat.jpg"]))
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flax import nnx

    from shiftnet.inference import Classifier
    from shiftnet.zoo import Models

__version__ = "0.1.0"


def load(path: "str | PathLike[str]") -> "Classifier":
    """Loads a trained network.

    Args:
      path: a checkpoint, a run's working directory, a packed `.safetensors` file, or a folder in
        the Hugging Face hub's layout; the name of a trained network, see `list_models`; or
        `hf://owner/name`, with `huggingface_hub` installed. In a directory with several checkpoints
        the newest is read that is not damaged. `~` is the home directory. A path that exists wins
        over a name.

    Raises:
      shiftnet.errors.UserError: if there is no such checkpoint and no such name, it is damaged, or
        it is not one of shiftnet's.
    """
    from shiftnet import zoo
    from shiftnet.inference import Classifier  # imports JAX, which `import shiftnet` should not

    return Classifier.load(zoo.find(path))


def list_models(pattern: str = "*") -> "Models":
    """Lists the trained networks that `load` takes by name; the list prints as a table.

    Args:
      pattern: of names, with wildcards, such as `"*c100*"`.

    Raises:
      shiftnet.errors.UserError: if the files of the package are damaged.
    """
    from shiftnet import zoo

    return zoo.list_models(pattern)


def quantize(
    network: "nnx.Module",
    weights: str = "s3",
    *,
    bits: int = 0,
    activations: str = "float",
    skip: "Sequence[str]" = (),
) -> list[str]:
    """Gives the layers of any Flax network low-bit weights; see `shiftnet.models.quantize`."""
    from shiftnet.models.quantize import quantize  # imports JAX

    return quantize(network, weights, bits=bits, activations=activations, skip=skip)
