"""Shift networks and low-bit networks in JAX: train, evaluate, deploy.

model = shiftnet.load("runs/shiftresnet20_c100")
logits = model(x)                    # normalised float [N, H, W, 3]
model.predict(images).names          # uint8 [N, H, W, 3]
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shiftnet.inference import Classifier

__version__ = "0.1.0"


def load(path: "str | PathLike[str]") -> "Classifier":
    """Loads a trained network.

    Args:
      path: a checkpoint, a run's working directory, or a packed `.safetensors` file. In a directory
        with several checkpoints the newest is read that is not damaged. `~` is the home directory.

    Raises:
      shiftnet.errors.UserError: if there is no such checkpoint, it is damaged, or it is not one of
        shiftnet's.
    """
    from shiftnet.inference import Classifier  # imports JAX, which `import shiftnet` should not

    return Classifier.load(path)
