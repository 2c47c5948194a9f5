"""Weight forms: how the weight that a layer computes with follows from what training changes.

Every form is one file, and every convolution and linear layer takes any of them when it is made:
`Conv(16, 32, 3, weights="s3", bits=2, rngs=rngs)`. Activation forms do the same for the input of a
convolution: `Conv(16, 32, 3, activations="int4", rngs=rngs)`.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from shiftnet.errors import UserError, unknown
from shiftnet.quantizers.activation import Activation
from shiftnet.quantizers.apot import APoT
from shiftnet.quantizers.denseshift import DenseShift
from shiftnet.quantizers.fixed import Fixed
from shiftnet.quantizers.floating import Float
from shiftnet.quantizers.form import Form, LowBitWeight, Rounded, Weight
from shiftnet.quantizers.integer import Int
from shiftnet.quantizers.learned_step import LearnedStep
from shiftnet.quantizers.pot import PoT
from shiftnet.quantizers.quantized import QuantizedWeight
from shiftnet.quantizers.s3 import S3
from shiftnet.quantizers.sign import Sign
from shiftnet.quantizers.sign_activation import ShiftedSign, SignActivation
from shiftnet.quantizers.ternary import Ternary

__all__ = [
    "ACTIVATIONS",
    "FORMS",
    "S3",
    "APoT",
    "Activation",
    "DenseShift",
    "Fixed",
    "Float",
    "Form",
    "Int",
    "LearnedStep",
    "LowBitWeight",
    "PoT",
    "QuantizedWeight",
    "Rounded",
    "ShiftedSign",
    "Sign",
    "SignActivation",
    "Ternary",
    "Weight",
    "activation",
    "activations_of_layers",
    "latents_of",
    "make",
    "of_layers",
    "parse",
    "regularizer",
]

# Name -> class, and the bits that it can be given; none where it has no choice.
FORMS: dict[str, tuple[Callable[..., Weight], tuple[int, ...]]] = {
    "float": (Float, ()),
    "sign": (Sign, ()),
    "s3": (S3, (2, 3, 4)),
    "denseshift": (DenseShift, (2, 3, 4)),
    "ternary": (Ternary, ()),
    "apot": (APoT, (2, 3, 4)),
    "pot": (PoT, (2, 3, 4, 5)),
    "int": (Int, (2, 3, 4, 5, 6, 7, 8)),
}

# Name -> class; None leaves a layer's input as it is.
ACTIVATIONS: dict[str, Callable[..., Activation] | None] = {
    "float": None,
    "int8": functools.partial(LearnedStep, bits=8),
    "int4": functools.partial(LearnedStep, bits=4),
    "int2": functools.partial(LearnedStep, bits=2),
    "sign": SignActivation,
    "rsign": ShiftedSign,
}


def make(name: str, bits: int = 0, field: str = "model.weight_bits") -> Form:
    """Finds a form by name: `make("s3", 2)(shape, rngs=rngs)` is a 2-bit weight of that shape.

    Args:
      name: one of `FORMS`.
      bits: bits per weight; 0 for the form's own number (32, 1, 3, 3, 2, 4, 5 and 8).
      field: the setting that `bits` comes from, named in errors.

    Raises:
      UserError: for a form or a width that does not exist.
    """
    if name not in FORMS:
        raise unknown("weight form", name, FORMS)
    form, choices = FORMS[name]
    if not bits:
        return form
    if bits not in choices:
        known = f"0 or one of {', '.join(map(str, choices))}" if choices else "0"
        raise UserError(f"{field} must be {known} for {name} weights, found {bits}")
    return functools.partial(form, bits=bits)


def parse(text: str, field: str) -> Form:
    """Finds a form by name and bits: `parse("s3/2", ...)` is `make("s3", 2)`, `"s3"` its default.

    Raises:
      UserError: as `make`; it names `field`, the setting.
    """
    name, _, bits = text.partition("/")
    return make(name, int(bits or 0), f"the bits in {field}")


def activation(name: str, features: int, *, rectified: bool = False) -> Activation | None:
    """Makes what quantizes a layer's input; None for `"float"`.

    Args:
      name: one of `ACTIVATIONS`.
      features: channels of the input.
      rectified: whether the input has no negative values, because a ReLU comes last before it.

    Raises:
      UserError: for a form that does not exist.
    """
    if name not in ACTIVATIONS:
        raise unknown("activation form", name, ACTIVATIONS)
    form = ACTIVATIONS[name]
    return None if form is None else form(features, rectified=rectified)


def activations_of_layers(model: nnx.Module) -> dict[str, Activation]:
    """Returns what quantizes layers' inputs in a network, by the path of the layer."""
    return {
        ".".join(map(str, path[:-1])): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Activation)
    }


def of_layers(model: nnx.Module) -> dict[str, Weight]:
    """Returns the weights in a network, by the path of the layer that each belongs to.

    Raises:
      UserError: where a layer has more than one.
    """
    found: dict[str, Weight] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Weight):
            layer = ".".join(map(str, path[:-1]))
            if layer in found:
                raise UserError(
                    f"{layer or 'the network itself'} has more than one weight of a form; give "
                    "each a layer of its own"
                )
            found[layer] = module
    return found


def latents_of(model: nnx.Module) -> tuple[str, ...]:
    """Returns what the dotted names of the arrays in a network's weights begin with."""
    weights = (path for path, module in nnx.iter_modules(model) if isinstance(module, Weight))
    return tuple(".".join(map(str, path)) + "." for path in weights)


def regularizer(model: nnx.Module) -> jax.Array | float:
    """Returns the sum of the weights' regularisers; 0.0 where no form has one."""
    terms = [weight.regularizer() for weight in of_layers(model).values()]
    return sum((term for term in terms if term is not None), start=0.0)
