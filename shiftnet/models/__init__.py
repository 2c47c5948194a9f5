"""The networks, by name: `build(config.model, num_classes, rngs=nnx.Rngs(0))`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from shiftnet.errors import UserError, unknown
from shiftnet.models import depthwiseresnet, resnet, shiftresnet

__all__ = ["FAMILIES", "build", "check", "parse_arch"]

FAMILIES: dict[str, Callable[..., resnet.ResNet]] = {
    "resnet": resnet.build,
    "shiftresnet": shiftresnet.build,
    "depthwiseresnet": depthwiseresnet.build,
}


def parse_arch(arch: str) -> tuple[str, int]:
    """Splits an architecture's name, for example `"shiftresnet20"`, into its family and depth.

    Raises:
      UserError: for an unknown family, or a depth that is not 6n + 2 with n at least 1.
    """
    match = re.fullmatch(r"([a-z_]+)(\d+)", arch)
    if match is None or match[1] not in FAMILIES:
        raise unknown("architecture", arch, [f"{family}20" for family in FAMILIES])
    family, depth = match[1], int(match[2])
    if depth < 8 or depth % 6 != 2:
        below = max(8, depth - (depth - 2) % 6)
        raise UserError(
            f"architecture {arch!r} does not exist: its depth must be 6n + 2, "
            f"the nearest are {family}{below} and {family}{below + 6}"
        )
    return family, depth


def check(model: Mapping[str, Any]) -> None:
    """Raises what `build` would raise, without drawing any parameters."""
    nnx.eval_shape(lambda: build(model, 1, rngs=nnx.Rngs(0)))


def build(model: Mapping[str, Any], num_classes: int, *, rngs: nnx.Rngs) -> resnet.ResNet:
    """The network that a recipe's `config.model` names.

    Args:
      model: `arch` (a family and its depth 6n + 2, for example `"shiftresnet20"`), `expansion`,
        `reduction`, `reduction_mode` (`"block"` or `"net"`) and `dtype` (`"float32"`: compute in
        the precision of the input; `"bfloat16"`: compute in bfloat16 whatever the input, with
        float32 parameters and batch statistics).
      num_classes: length of the logits.
      rngs: the `params` stream draws the parameters.

    Returns:
      A module: `model(x)` takes normalised `[N, H, W, 3]` to logits `[N, num_classes]` in the
      input's dtype, with the running batch statistics; `model(x, train=True)` takes and updates
      the batch's.

    Raises:
      UserError: for an architecture that does not exist, or a field that does not apply to it.
    """
    family, depth = parse_arch(model["arch"])
    return FAMILIES[family](
        depth,
        num_classes,
        expansion=model["expansion"],
        reduction=model["reduction"],
        reduction_mode=model["reduction_mode"],
        dtype=None if model["dtype"] == "float32" else jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
