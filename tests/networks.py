"""Networks with given weights, run and differentiated; PyTorch's names and layouts outside."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shiftnet import config as config_lib
from shiftnet import models, quantizers
from shiftnet.interchange import torch_names
from shiftnet.interchange.torch_names import SHIFT, TORCHVISION, WRN, Naming
from tests import oracle
from tests.oracle import Arrays, Case


def channels_last(x: np.ndarray) -> np.ndarray:
    """`[N, C, H, W]` to `[N, H, W, C]`."""
    return np.moveaxis(x, 1, -1)


def channels_first(x: Any) -> np.ndarray:
    """`[N, H, W, C]` to `[N, C, H, W]`."""
    return np.moveaxis(np.asarray(x), -1, 1)


# The originals whose networks the oracle ran, by their class.
NAMINGS = {"WRN_McDonnell": WRN, "ResNet_cifar10": TORCHVISION}


def model_config(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` for a network's case."""
    arch = hyper["arch"]
    fields = dict(config_lib.default_config().model)
    if arch == "WRN_McDonnell":
        form = "sign" if hyper["binarize"] else "float"
        fields |= {"arch": f"wrn{hyper['depth']}", "width": hyper["width"], "weights": form}
    elif arch == "ResNet_cifar10":
        fields |= {"arch": f"resnet{hyper['depth']}", "weights": "s3"}
    else:
        fields |= {name: hyper[name] for name in fields if name in hyper}
        mode = fields["reduction_mode"]
        if mode in ("mobile", "shuffle", "depthwise"):  # modes of the original's ResNet
            fields |= {"arch": f"{mode}{arch}", "depthwise_skip": mode != "depthwise"}
        if fields["arch"].startswith(("depthwise", "mobile", "shuffle")):
            fields["reduction_mode"] = "block"  # its only one for them
    return fields


def naming(hyper: Mapping[str, Any]) -> Naming:
    """How the original of a case calls its arrays."""
    return NAMINGS.get(hyper["arch"], SHIFT)


def of_case(case: Case) -> nnx.Module:
    """The network of a case with its weights, in float64."""
    hyper = case.hyper
    model = abstract(model_config(hyper), hyper["num_classes"])
    arrays = case.part("sd/") or oracle.recipe_weights(hyper["state_dict_names"], hyper["seed"])
    arrays = {name: value.astype(np.float64) for name, value in arrays.items()}
    torch_names.from_torch(model, arrays, naming(hyper))
    return model


def abstract(config: Mapping[str, Any], num_classes: int) -> nnx.Module:
    """A network of shapes, without numbers."""
    return nnx.eval_shape(lambda: models.build(config, num_classes, rngs=nnx.Rngs(0)))


def random(config: Mapping[str, Any], num_classes: int) -> nnx.Module:
    """A network with numbers of the usual sizes; drawing them compiles nothing."""
    model = abstract(config, num_classes)
    draw = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = draw.normal(size=leaf.shape)
        if "weight" in path:
            value *= np.prod(leaf.shape[:-1]) ** -0.5
        elif path[-1] in ("scale", "var", "step", "unit"):
            value = np.exp(value / 10)
        leaf.set_value(jnp.asarray(value.astype(leaf.dtype)))
    for weight in quantizers.of_layers(model).values():
        if isinstance(weight, quantizers.Rounded):  # a step or clip that fits the latent
            weight.start_from(np.asarray(weight.unrounded[...]))
    return model


def evaluate(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    """The logits for `[N, 3, H, W]`, compiled."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return np.asarray(run(state, jnp.asarray(channels_last(x))))


def zero_gradients(hyper: Mapping[str, Any], names: Any) -> list[str]:
    """The biases that reach the loss only through a batch norm, which takes them away again.

    In training, and with no ReLU between the two. Their true gradient is zero.
    """
    if "zero_gradients_in_train" in hyper:
        return hyper["zero_gradients_in_train"]
    arch = hyper["arch"]
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
    naming: Naming = SHIFT,
    regularizer: float = 0.0,
) -> Result:
    """Runs `loss_of(model(x))` and its gradients, compiled; `x` is `[N, C, H, W]`.

    The gradients are those of the loss plus the weights' regulariser times a factor.
    """
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, stats, x):
        def loss(params, x):
            model = nnx.merge(graphdef, params, stats, copy=True)
            output = model(x, train=train)
            value = loss_of(output)
            total = value + regularizer * quantizers.regularizer(model)
            return total, (value, output, nnx.state(model, nnx.BatchStat))

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, (loss, output, stats)), (grads, grad_x) = run(params, stats, jnp.asarray(channels_last(x)))
    # A model that holds gradients in place of parameters, to name them as it names those.
    named = torch_names.to_torch(nnx.merge(graphdef, grads, stats), naming)
    return Result(
        loss=float(loss),
        output=channels_first(output),
        grad_input=channels_first(grad_x),
        grads={name: value for name, value in named.items() if ".running_" not in name},
        stats={name: value for name, value in named.items() if ".running_" in name},
    )
