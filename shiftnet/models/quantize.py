"""Gives the layers of any network low-bit weights and activations, and keeps what they learned."""

import fnmatch
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet import quantizers
from shiftnet.errors import UserError
from shiftnet.quantizers import Activation, Weight


class Quantized(nnx.Module):
    """A layer of Flax's whose weight has another form: it computes as before, with that weight.

    Attributes:
      layer: the layer, without its kernel.
      weight: of the kernel's shape.
      factor: what the weight is multiplied by, so that it is near to the kernel it stands for; a
        `nnx.BatchStat`, which is saved with the rest and is not trained.
      dtype: of the kernel.
      activation: what quantizes the input; None for nothing.
      use_running_average: whether that keeps its statistics, as `nnx.BatchNorm` does; `train()` and
        `eval()` of the network set it.
    """

    activation: Activation | None

    def __init__(
        self, layer: nnx.Conv | nnx.Linear, weight: Weight, factor: float, activation: str
    ):
        self.layer = layer
        self.weight = weight
        self.factor = nnx.BatchStat(jnp.float32(factor))
        self.dtype = layer.kernel.dtype
        self.activation = nnx.data(quantizers.activation(activation, layer.in_features))
        self.use_running_average = False  # as of `nnx.BatchNorm`
        del layer.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.activation is not None:
            x = self.activation(x, train=not self.use_running_average)
        kernel = self.weight() * jax.lax.stop_gradient(self.factor[...])
        # Of this call: within `jax.jit` and the like no layer from outside may be changed.
        layer = nnx.clone(self.layer)
        layer.kernel = nnx.Param(kernel.astype(self.dtype))
        return layer(x)


def quantize(
    network: nnx.Module,
    weights: str = "s3",
    *,
    bits: int = 0,
    activations: str = "float",
    skip: Sequence[str] = (),
) -> list[str]:
    """Replaces Flax's convolutions and linear layers by layers with another form of weights.

    The weights become the nearest ones of the form. Where the form has no scale of its own, each
    layer keeps the factor between the two in its state, so nothing is lost but the rounding; with
    `"apot"`, which standardizes its latents, the mean of each kernel is lost too. Layers that were
    replaced before stay as they are. Layers that share a kernel share its weight. New layers are in
    evaluation where one of the network's is; a network without batch norm and dropout does not
    know, so call its `eval()` afterwards unless it is to be trained.

    Args:
      network: any network of `nnx.Conv` (square kernels, two dimensions) and `nnx.Linear` layers;
        changed in place.
      weights: the form, one of `shiftnet.quantizers.FORMS` but `"float"`.
      bits: bits per weight; 0 for the form's own number.
      activations: the form of the layers' inputs, one of `shiftnet.quantizers.ACTIVATIONS`.
      skip: patterns of the paths of layers to leave as they are, such as `"stem"` or `"blocks.*"`.

    Returns:
      The paths of the layers that were replaced. `shiftnet.quantizers.regularizer(network)` is the
      forms' part of a loss.

    Raises:
      UserError: for an unknown form, a pattern that matches no layer, a network without such
        layers or that is one itself, and a kernel that is traced, shared with what is not
        replaced, of other dimensions, or of zeros where the form has no zero; the network is then
        as it was.
    """
    form = quantizers.make(weights, bits)
    quantizers.activation(activations, 1)
    if isinstance(network, nnx.Conv | nnx.Linear):
        raise UserError("the network is a layer itself; expected a module that holds layers")
    modules = {".".join(map(str, path)): one for path, one in nnx.iter_modules(network)}
    done = {path: one for path, one in modules.items() if isinstance(one, Quantized)}
    inside = {id(one.layer) for one in done.values()}
    layers = {
        path: layer
        for path, layer in modules.items()
        if isinstance(layer, nnx.Conv | nnx.Linear) and id(layer) not in inside
    }
    for pattern in skip:
        if not fnmatch.filter([*layers, *done], pattern):
            raise UserError(
                f"skip: no layer's path matches {pattern!r}; "
                f"there are {', '.join([*layers, *done]) or 'none'}"
            )
    chosen = {
        path: layer
        for path, layer in layers.items()
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in skip)
    }
    if not chosen:
        raise UserError("the network has no nnx.Conv or nnx.Linear to quantize")
    kept = {
        id(value): path or "the network itself"
        for path, module in modules.items()
        if path not in chosen
        for value in vars(module).values()
        if isinstance(value, nnx.Variable)
    }
    found: dict[int, tuple[Weight, float]] = {}  # by kernel, which several layers may share
    for path, layer in chosen.items():
        if id(layer.kernel) in kept:
            raise UserError(
                f"{path} shares its kernel with {kept[id(layer.kernel)]}, which is not replaced; "
                "skip it too"
            )
        if id(layer.kernel) in found:
            continue
        if isinstance(layer.kernel[...], jax.core.Tracer):
            raise UserError(f"{path} is traced: quantize before jax.jit, jax.vmap and the like")
        kernel = np.asarray(layer.kernel[...], np.float64)
        if kernel.ndim not in (2, 4):
            raise UserError(f"{path} has a kernel of {kernel.ndim} dimensions, expected 2 or 4")
        weight = form(kernel.shape, init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
        assert isinstance(weight, quantizers.LowBitWeight), weights
        weight.start_from(kernel)
        nearest = np.asarray(weight(), np.float64)
        if nearest.any() and not kernel.any():
            raise UserError(f"{path} has a kernel of zeros, and {weights} has no zero; skip it")
        factor = (kernel * nearest).sum() / max(np.square(nearest).sum(), 1e-30) or 1.0
        found[id(layer.kernel)] = weight, float(factor)
    places = _reached(network, set())
    if lost := [path for path, layer in chosen.items() if id(layer) not in places]:
        raise UserError(f"{lost[0]} is held by something that it cannot be replaced in")
    replacements = {
        id(layer): Quantized(layer, *found[id(layer.kernel)], activations)
        for layer in chosen.values()
    }
    if any(
        getattr(module, mode, None) is True
        for module in modules.values()
        for mode in ("use_running_average", "deterministic")
    ):
        for replacement in replacements.values():
            replacement.eval()
    _replaced(network, replacements, {})
    return list(chosen)


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Returns what a node holds, by name or place; nothing of what `_replaced` cannot change."""
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, list | tuple | nnx.List):
        return list(enumerate(node))
    if isinstance(node, MutableMapping | nnx.Dict):
        return list(node.items())
    return list(vars(node).items()) if isinstance(node, nnx.Module) else []


def _reached(node: Any, seen: set[int]) -> set[int]:
    """Adds the `id` of a node, and of all below it, to `seen`."""
    if id(node) not in seen:
        seen.add(id(node))
        for _, child in _children(node):
            _reached(child, seen)
    return seen


def _replaced(node: Any, replacements: Mapping[int, Quantized], done: dict[int, Any]) -> Any:
    """Puts replacements in the place of all below a node; returns it, or a new tuple for one."""
    if id(node) in replacements:
        return replacements[id(node)]
    key = id(node)
    if key in done:
        return done[key]
    done[key] = node
    for name, child in _children(node):
        new = _replaced(child, replacements, done)
        if new is child:
            continue
        if isinstance(node, tuple):
            values = [*node[:name], new, *node[name + 1 :]]
            node = type(node)(*values) if hasattr(node, "_fields") else tuple(values)
        elif isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict):
            setattr(node, name, nnx.data(new))
        else:
            node[name] = new
    done[key] = node
    return node
