"""The networks, by name: `build(config.model, num_classes, rngs=nnx.Rngs(0))`."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from shiftnet import quantizers
from shiftnet.config import matches, split_patterns
from shiftnet.errors import UserError, unknown
from shiftnet.layers import Conv, Linear
from shiftnet.models import (
    depthwiseresnet,
    imagenet_resnet,
    mobileresnet,
    own,
    resnet,
    shiftnet,
    shiftresnet,
    shuffleresnet,
    wrn,
)
from shiftnet.models.network import Network

__all__ = ["FAMILIES", "Family", "build", "check", "image_size", "parse_arch"]


class Family(NamedTuple):
    """A kind of networks.

    Attributes:
      build: `build(depth, num_classes, weights=..., ends=..., activations=..., dtype=...,
        rngs=..., **fields)`.
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
    "shiftresnet": Family(shiftresnet.build, ("expansion", "reduction", "reduction_mode", "shift")),
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
    "shiftnet_a": Family(functools.partial(shiftnet.build, width=1.0), ("shift",), None, (), 224),
    "shiftnet_b": Family(functools.partial(shiftnet.build, width=0.5), ("shift",), None, (), 224),
    "shiftnet_c": Family(
        functools.partial(shiftnet.build, width=1.0, stages=shiftnet.STAGES_C),
        ("shift",),
        None,
        (),
        224,
    ),
}

# The value of each field that changes nothing; the mode of a reduction needs none.
NEUTRAL: dict[str, Any] = {
    "expansion": 1,
    "reduction": 1,
    "width": 1,
    "depthwise_skip": True,
    "shift": "fixed",
}


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


def image_size(arch: str) -> int:
    """Returns the height and width of the images that an architecture was made for, in pixels.

    Of a user's own network that is not known; then it is ImageNet's 224.
    """
    if own.is_own(arch):
        return 224
    return FAMILIES[parse_arch(arch)[0]].image_size


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
      model: `arch` (a family and its depth, for example `"shiftresnet20"`, or the file and class of
        an own network, see `own`); what the family takes of `expansion`, `reduction`,
        `reduction_mode` (`"block"` or `"net"`), `depthwise_skip`, `width` and `shift` (`"fixed"`,
        or learned: `"active"`, `"sparse"`); `weights` and `weight_bits`, the form of every
        convolution's weights and of the linear layer's (see
        `shiftnet.quantizers`) but the first's and the last's, unless `quantize_first_last`;
        `weights_first_last`, a form of these; `weights_of`, forms of layers by path;
        `activations`, the form of the inputs of all but these two; and
        `dtype` (`"float32"`: compute in the precision of the input; `"bfloat16"`: compute in
        bfloat16 whatever the input, with float32 parameters and batch statistics).
      num_classes: length of the logits.
      rngs: the `params` stream draws the parameters.

    Returns:
      A module: `model(x)` takes normalised `[N, H, W, 3]` to logits `[N, num_classes]` in the
      input's dtype, with the running batch statistics; `model(x, train=True)` takes and updates
      the batch's.

    Raises:
      UserError: for an architecture, a weight form or an activation form that does not exist, or
        a field that does not apply to it.
    """
    if own.is_own(model["arch"]):
        for field in ("weights_of", "weights_first_last"):
            if model[field]:
                raise UserError(f"model.{field} must be empty for a network of your own file")
        return own.build(
            model["arch"],
            num_classes,
            weights=model["weights"],
            bits=model["weight_bits"],
            dtype=model["dtype"],
            rngs=rngs,
        )
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
    if model["weights_first_last"]:
        if model["quantize_first_last"]:
            raise UserError(
                f"model.weights_first_last={model['weights_first_last']} and "
                "model.quantize_first_last=true exclude each other"
            )
        ends = quantizers.parse(model["weights_first_last"], "model.weights_first_last")
    draws: dict[int, _Draw] = {}
    network = family.build(
        depth,
        num_classes,
        weights=_recorded(form, draws),
        ends=_recorded(ends, draws),
        activations=model["activations"],
        dtype=None if model["dtype"] == "float32" else jnp.dtype(model["dtype"]),
        rngs=rngs,
        **{field: model[field] for field in family.fields},
    )
    _choose(network, model["weights_of"], draws)
    return network


class _Draw(NamedTuple):
    """What a weight was drawn with."""

    key: jax.Array
    init: quantizers.form.Init


def _recorded(form: quantizers.Form, draws: dict[int, _Draw]) -> quantizers.Form:
    """Returns the form, which notes what each weight was drawn with, by its `id`."""

    def make(shape: Sequence[int], *, init: quantizers.form.Init, rngs: Any) -> quantizers.Weight:
        key = rngs.params()
        weight = form(shape, init=init, rngs=_stream(key))
        draws[id(weight)] = _Draw(key, init)
        return weight

    return make


def _stream(key: jax.Array) -> Any:
    """Returns a `params` stream of one key."""
    return SimpleNamespace(params=lambda: key)


def _choose(network: Network, forms: str, draws: Mapping[int, _Draw]) -> None:
    """Draws the weights again of the layers that `model.weights_of` gives another form.

    Raises:
      UserError: for a pattern that matches no layer.
    """
    layers = quantizers.of_layers(network)
    chosen: dict[str, quantizers.Form] = {}
    for entry in split_patterns(forms):
        pattern, _, text = entry.rpartition(":")
        form = quantizers.parse(text, "model.weights_of")
        matched = [name for name in layers if matches(name, pattern)]
        if not matched:
            names = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in layers)
            raise UserError(
                f"model.weights_of: no layer's path matches {pattern!r}; the network has "
                f"{', '.join(names)}"
            )
        chosen.update(dict.fromkeys(matched, form))
    for path, layer in list(nnx.iter_modules(network)):
        name = ".".join(map(str, path))
        if isinstance(layer, Conv | Linear) and name in chosen:
            key, init = draws[id(layer.weight)]
            layer.weight = chosen[name](layer.weight.shape, init=init, rngs=_stream(key))
