"""The networks, by name: `build(config.model, num_classes, rngs=nnx.Rngs(0))`."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from shiftnet import quantizers
from shiftnet.errors import UserError, unknown
from shiftnet.models import (
    depthwiseresnet,
    imagenet_resnet,
    mobileresnet,
    resnet,
    shiftnet,
    shiftresnet,
    shuffleresnet,
    wrn,
)
from shiftnet.models.network import Network

__all__ = ["FAMILIES", "Family", "build", "check", "parse_arch"]


class Family(NamedTuple):
    """A kind of networks.

    Attributes:
      build: `build(depth, num_classes, weights=..., ends=..., dtype=..., rngs=..., **fields)`.
      fields: those of `config.model` that it takes; any other must be left at `NEUTRAL`.
      example: a depth to name in errors; None where the family is a single network.
      depths: all depths there are; None for 6n + 2.
      image_size: height and width of the images it was made for, in pixels.
      reduction_mode: in which its published code takes a reduction, unless told otherwise.
    """

    build: Callable[..., Network]
    fields: tuple[str, ...] = ()
    example: int | None = 20
    depths: Sequence[int] | None = None
    image_size: int = 32
    reduction_mode: Literal["block", "net"] = "net"


FAMILIES = {
    "resnet": Family(resnet.build, ("reduction", "reduction_mode")),
    "shiftresnet": Family(shiftresnet.build, ("expansion", "reduction", "reduction_mode")),
    "depthwiseresnet": Family(
        depthwiseresnet.build,
        ("reduction", "reduction_mode", "depthwise_skip"),
        reduction_mode="block",
    ),
    "mobileresnet": Family(
        mobileresnet.build, ("reduction", "reduction_mode"), reduction_mode="block"
    ),
    "shuffleresnet": Family(
        shuffleresnet.build, ("reduction", "reduction_mode"), reduction_mode="block"
    ),
    "wrn": Family(wrn.build, ("width",)),
    "imagenet_resnet": Family(imagenet_resnet.build, (), 18, imagenet_resnet.DEPTHS, 224),
    "shiftnet_a": Family(functools.partial(shiftnet.build, width=1.0), (), None, (), 224),
    "shiftnet_b": Family(functools.partial(shiftnet.build, width=0.5), (), None, (), 224),
    "shiftnet_c": Family(
        functools.partial(shiftnet.build, width=1.0, stages=shiftnet.STAGES_C), (), None, (), 224
    ),
}

# The value of each field that changes nothing; the mode of a reduction needs none.
NEUTRAL = {"expansion": 1, "reduction": 1, "width": 1, "depthwise_skip": True}


def parse_arch(arch: str) -> tuple[str, int | None]:
    """Splits an architecture's name into family and depth: `"shiftresnet20"`, `"shiftnet_a"`.

    Raises:
      UserError: for an unknown family, or a depth that the family does not have.
    """
    if meant := _meant(arch):
        raise UserError(f"unknown architecture {arch!r}; did you mean {meant}?")
    match = re.fullmatch(r"([a-z_]+)(\d*)", arch)
    family = FAMILIES.get(match[1]) if match else None
    if match is None or family is None or bool(match[2]) != (family.example is not None):
        names = [f"{name}{'' if f.example is None else f.example}" for name, f in FAMILIES.items()]
        raise unknown("architecture", arch, names)
    if family.example is None:
        return match[1], None
    depth = int(match[2])
    if family.depths is None and (depth < 8 or depth % 6 != 2):
        below = max(8, depth - (depth - 2) % 6)
        raise UserError(
            f"architecture {arch!r} does not exist: its depth must be 6n + 2, "
            f"the nearest are {match[1]}{below} and {match[1]}{below + 6}"
        )
    if family.depths is not None and depth not in family.depths:
        known = ", ".join(f"{match[1]}{depth}" for depth in family.depths)
        raise UserError(f"architecture {arch!r} does not exist; there are {known}")
    return match[1], depth


def _meant(arch: str) -> str | None:
    """Names the network here that other codes call by a name of no network here."""
    if match := re.fullmatch(r"resnet[-_]?(18|34|101)", arch.lower()):
        return f"'imagenet_resnet{match[1]}'"
    # Zagoruyko and Komodakis (arXiv:1605.07146) count the shortcuts' convolutions too, 6n + 4.
    wide = re.fullmatch(r"(?:wrn|wide_?resnet)[-_]?(\d{1,4})(?:[-_x](\d{1,3}))?", arch.lower())
    if wide and int(wide[1]) % 6 == 4 and int(wide[1]) > 4:
        return f"'wrn{int(wide[1]) - 2}' with model.width={wide[2] or 10}"
    return None


def check(model: Mapping[str, Any]) -> None:
    """Raises what `build` would raise, without drawing any parameters."""
    nnx.eval_shape(lambda: build(model, 1, rngs=nnx.Rngs(0)))


def build(model: Mapping[str, Any], num_classes: int, *, rngs: nnx.Rngs) -> Network:
    """Builds the network that a recipe's `config.model` describes.

    Args:
      model: `arch` (a family and its depth, for example `"shiftresnet20"`); what the family takes
        of `expansion`, `reduction`, `reduction_mode` (`"block"` or `"net"`), `depthwise_skip` and
        `width`; `weights` and `weight_bits`, the form of every convolution's weights and of the
        linear layer's (see `shiftnet.quantizers`) but the first's and the last's, unless
        `quantize_first_last`; and
        `dtype` (`"float32"`: compute in the precision of the input; `"bfloat16"`: compute in
        bfloat16 whatever the input, with float32 parameters and batch statistics).
      num_classes: length of the logits.
      rngs: the `params` stream draws the parameters.

    Returns:
      A module: `model(x)` takes normalised `[N, H, W, 3]` to logits `[N, num_classes]` in the
      input's dtype, with the running batch statistics; `model(x, train=True)` takes and updates
      the batch's.

    Raises:
      UserError: for an architecture or a weight form that does not exist, or a field that does not
        apply to it.
    """
    name, depth = parse_arch(model["arch"])
    family = FAMILIES[name]
    for field, neutral in NEUTRAL.items():
        if field not in family.fields and model[field] != neutral:
            takers = " and ".join(n for n, f in FAMILIES.items() if field in f.fields)
            expected, found = (str(value).lower() for value in (neutral, model[field]))
            raise UserError(
                f"model.{field} must be {expected} for {name} (it applies to {takers}), got {found}"
            )
    form = quantizers.make(model["weights"], model["weight_bits"])
    ends = form if model["quantize_first_last"] else quantizers.Float
    return family.build(
        depth,
        num_classes,
        weights=form,
        ends=ends,
        dtype=None if model["dtype"] == "float32" else jnp.dtype(model["dtype"]),
        rngs=rngs,
        **{field: model[field] for field in family.fields},
    )
