"""Networks with given weights, run and differentiated; PyTorch's names and layouts outside."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shiftnet import models
from shiftnet.models import torch_names
from shiftnet.models.resnet import ResNet
from tests.oracle import Arrays, Case


def channels_last(x: np.ndarray) -> np.ndarray:
    """`[N, C, H, W]` to `[N, H, W, C]`."""
    return np.moveaxis(x, 1, -1)


def channels_first(x: Any) -> np.ndarray:
    """`[N, H, W, C]` to `[N, C, H, W]`."""
    return np.moveaxis(np.asarray(x), -1, 1)


def model_config(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` for a network's case."""
    # The original's depthwise network has one reduction, that of its blocks.
    in_blocks = hyper["arch"].startswith("depthwise")
    return {
        "arch": hyper["arch"],
        "expansion": hyper.get("expansion", 1),
        "reduction": hyper.get("reduction", 1),
        "reduction_mode": hyper.get("reduction_mode", "block" if in_blocks else "net"),
        "dtype": "float32",
    }


def of_case(case: Case) -> ResNet:
    """The network of a case with its weights, in float64."""
    hyper = case.hyper
    model = abstract(model_config(hyper), hyper["num_classes"])
    weights = case.part("sd/")
    torch_names.from_torch(model, {name: w.astype(np.float64) for name, w in weights.items()})
    return model


def abstract(config: Mapping[str, Any], num_classes: int) -> ResNet:
    """A network of shapes, without numbers."""
    return nnx.eval_shape(lambda: models.build(config, num_classes, rngs=nnx.Rngs(0)))


def random(config: Mapping[str, Any], num_classes: int) -> ResNet:
    """A network with numbers of the usual sizes; drawing them compiles nothing."""
    model = abstract(config, num_classes)
    draw = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = draw.normal(size=leaf.shape)
        if path[-1] == "kernel":
            value *= np.prod(leaf.shape[:-1]) ** -0.5
        elif path[-1] in ("scale", "var"):
            value = np.exp(value / 10)
        leaf.set_value(jnp.asarray(value.astype(leaf.dtype)))
    return model


def evaluate(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    """The logits for `[N, 3, H, W]`, compiled."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return np.asarray(run(state, jnp.asarray(channels_last(x))))


def zero_gradients(arch: str, names: Any) -> list[str]:
    """The biases that reach the loss only through a batch norm, which takes them away again.

    In training, and with no ReLU between the two. Their true gradient is zero.
    """
    if arch.startswith("depthwiseresnet"):
        return [name for name in names if name.endswith("bn2.bias")]
    if arch.startswith("shiftresnet"):
        return ["layer2.0.shortcut.1.bias"]
    return []


def cross_entropy(labels: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """The mean cross entropy of logits, as a function of them."""

    def loss(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()

    return loss


@dataclasses.dataclass(frozen=True)
class Result:
    """What a network or block gave for one batch, in PyTorch's names and layouts."""

    loss: float
    output: np.ndarray
    grad_input: np.ndarray
    grads: Arrays
    stats: Arrays  # running statistics afterwards


def differentiate(
    model: nnx.Module,
    x: np.ndarray,
    loss_of: Callable[[jax.Array], jax.Array],
    *,
    train: bool,
) -> Result:
    """Runs `loss_of(model(x))` and its gradients, compiled; `x` is `[N, C, H, W]`."""
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, stats, x):
        def loss(params, x):
            model = nnx.merge(graphdef, params, stats, copy=True)
            output = model(x, train=train)
            return loss_of(output), (output, nnx.state(model, nnx.BatchStat))

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (loss, (output, stats)), (grads, grad_x) = run(params, stats, jnp.asarray(channels_last(x)))
    # A model that holds gradients in place of parameters, to name them as it names those.
    named = torch_names.to_torch(nnx.merge(graphdef, grads, stats))
    return Result(
        loss=float(loss),
        output=channels_first(output),
        grad_input=channels_first(grad_x),
        grads={name: value for name, value in named.items() if ".running_" not in name},
        stats={name: value for name, value in named.items() if ".running_" in name},
    )
