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
    """Loads a trained network from a checkpoint or a run's working directory.

    See `shiftnet.inference.Classifier` for what it does.

    Raises:
      shiftnet.errors.UserError: where there is no checkpoint; it says where it looked.
    """
    from shiftnet.inference import Classifier  # imports JAX, which `import shiftnet` should not

    return Classifier.load(path)
