"""Counts the cost of a network: multiply-adds by kind, parameters, bytes, traffic and energy.

The numbers are read off the program that JAX traces from the network, so they hold for any
`nnx.Module` and whatever its layers are made of; nothing is computed and no weight is allocated.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from shiftnet import quantizers
from shiftnet.errors import UserError
from shiftnet.kernels.implementations import only_xla
from shiftnet.models.arithmetic import KINDS, Arithmetic, arithmetic


class Layer(NamedTuple):
    """The cost of one layer.

    Attributes:
      name: path of the module, for example `"layer1.0.conv1"`.
      multiply_adds: of its convolutions and matrix products, for one image; zeros of the padding
        count like pixels. Additions, batch normalisation and activations are left out.
      parameters: numbers of the trained network that training has set: its weights, whatever
        latents they come from, and its other parameters; running statistics are left out.
      bits: of one of its weights; 32 where it has none.
      weight_bytes: of the parameters: the weights' packed, the others in the type they are kept in.
      output: shape of what it returns, or its convolution does, without the batch.
      activation_bits: of one value of its input, as its products take it.
      kind: of its multiply-adds, one of `arithmetic.KINDS`; `""` where it has none.
      bit_operations: of its multiply-adds: of each, bits per weight times bits per value.
      picojoules: energy of its multiply-adds; see `arithmetic`.
    """

    name: str
    multiply_adds: int
    parameters: int
    bits: int
    weight_bytes: int
    output: tuple[int, ...]
    activation_bits: int = 32
    kind: str = ""
    bit_operations: int = 0
    picojoules: float = 0.0


class Counts(NamedTuple):
    """The cost of a network for one image.

    Attributes:
      layers: in the order in which the network runs them.
      peak_activation_bytes: the most bytes of activations that exist at once in a forward pass
        with the running statistics, taken operation by operation in the program's order: what the
        operation reads, what it writes, and what a later one still needs, such as the input of a
        block for its shortcut. Nothing is written in place and nothing is fused, so a compiler
        may need less. A shift, or a ReLU, is one operation. Parameters and constants are not
        activations.
      bytes_moved: between the memory and the arithmetic where nothing is fused: what every
        operation reads and writes, and the weights, packed, once. A batch norm is a multiplication
        and an addition, or a part of the convolution before it; reshaping, striding and changes of
        the floating type are free, and what is changed is kept in the narrower type.
      fused_bytes_moved: the same where each convolution or matrix product also does all that
        follows it, up to the next, and where `shift_block`, or another operation of
        `shiftnet.kernels`, is one kernel, which keeps the expanded tensor to itself.
      fused_bytes_read: the part of these that is activations, and the image, being read.
    """

    layers: tuple[Layer, ...]
    peak_activation_bytes: int
    bytes_moved: int
    fused_bytes_moved: int
    fused_bytes_read: int

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def by_kind(self) -> dict[str, int]:
        """The multiply-adds of each kind."""
        sums = dict.fromkeys(KINDS, 0)
        for layer in self.layers:
            if layer.kind:
                sums[layer.kind] += layer.multiply_adds
        return sums

    @property
    def bit_operations(self) -> int:
        return sum(layer.bit_operations for layer in self.layers)

    @property
    def picojoules(self) -> float:
        """Energy of the multiply-adds."""
        return sum(layer.picojoules for layer in self.layers)


def count(model: nnx.Module, image: tuple[int, int, int] = (32, 32, 3)) -> Counts:
    """Counts a forward pass of one float32 image with the running statistics.

    A multiply-add belongs to the layer whose parameters it reads.

    Args:
      model: with arrays, or abstract as `nnx.eval_shape` makes it.
      image: height, width and channels.

    Raises:
      UserError: for a product where it cannot be counted: in a loop, a branch or a kernel.
    """
    modules, variables, steps, logits = _trace(model, image)

    def owner(names: Iterable[str]) -> str:
        """Returns the innermost module with all these variables; `""` is the network."""
        levels = zip(*(name.split(".") for name in names), strict=False)
        path = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, levels)]
        while path and ".".join(path) not in modules:
            path.pop()
        return ".".join(path)

    forms, latents = quantizers.of_layers(model), quantizers.latents_of(model)

    def is_latent(name: str) -> bool:
        return name.startswith(latents)

    activation_bits = {
        ".".join(map(str, path)): width
        for path, module in nnx.iter_modules(model)
        if (width := getattr(getattr(module, "activation", None), "bits", None)) is not None
    }

    multiply_adds: Counter[str] = Counter()
    outputs: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, Arithmetic] = {}
    for step in steps:
        if not step.is_forward or not (step.variables or step.multiply_adds):
            continue
        # A batch norm that is folded into a weight computes nothing by itself.
        of_weights = set(filter(is_latent, step.variables))
        layer = owner(of_weights or step.variables)
        multiply_adds[layer] += step.multiply_adds
        # Of a batch norm after a convolution, in the same operation, too. A layer that quantizes
        # its input first has the product's shape, which is why that one replaces another.
        for name in {layer, *(owner([variable]) for variable in step.variables)}:
            if step.multiply_adds or name not in outputs:
                outputs[name] = step.writes[0].shape[1:]
        if step.multiply_adds:
            weight = forms.get(layer)
            kinds[layer] = arithmetic(
                getattr(weight, "levels", None),
                weight.bits if weight else 32,
                activation_bits.get(layer),
                32 if max(value.bits for value in step.activations) > 16 else 16,
            )
            if layer in activation_bits:
                _store_quantized(steps, step, activation_bits[layer])
    parameters: Counter[str] = Counter()
    weight_bytes: Counter[str] = Counter()
    bits: dict[str, int] = {}
    for name, variable in variables.items():
        if isinstance(variable, nnx.Param) and not is_latent(name):
            size = math.prod(variable.shape)
            parameters[owner([name])] += size
            weight_bytes[owner([name])] += size * variable.dtype.itemsize
    for name, weight in forms.items():
        layer = owner([name])
        parameters[layer] += weight.size
        weight_bytes[layer] += weight.packed_bytes
        bits[layer] = weight.bits
    layers = tuple(
        Layer(
            name,
            multiply_adds[name],
            parameters[name],
            bits.get(name, 32),
            weight_bytes[name],
            modules[name] or outputs.get(name, ()),
            **_arithmetic_fields(kinds.get(name), multiply_adds[name]),
        )
        for name in {**multiply_adds, **parameters}
    )
    weights = sum(layer.weight_bytes for layer in layers)
    read, written = _fused_bytes(steps, logits)
    return Counts(
        layers,
        _peak_bytes(steps, logits),
        weights + _bytes_moved(steps),
        weights + read + written,
        read,
    )


def _arithmetic_fields(kind: Arithmetic | None, multiply_adds: int) -> dict[str, Any]:
    """Returns the fields of a `Layer` that say how it computes its multiply-adds."""
    if kind is None:
        return {}
    return {
        "activation_bits": kind.activation_bits,
        "kind": kind.kind,
        "bit_operations": multiply_adds * kind.bit_operations,
        "picojoules": multiply_adds * kind.picojoules,
    }


class _Value:
    """An array in the traced program.

    Attributes:
      nbytes: its size.
      bits: of one of its numbers.
      shape: its shape, or the one that it is reshaped to later.
      variables: names of the model's variables that it is computed from; None for an activation,
        which depends on the image.
      source: the array in memory that this is, or is a part of.
      stored_bits: of one of its numbers in memory, of a `source`.
      same: the array that this is in another floating type, or the array itself; in memory it is of
        the narrower type.
      kept_bits: of one of its numbers while it exists, of a `same`.
    """

    def __init__(self, aval, variables: frozenset[str] | None, source: "_Value | None" = None):
        self.nbytes = math.prod(aval.shape) * aval.dtype.itemsize
        self.bits = self.stored_bits = self.kept_bits = 8 * aval.dtype.itemsize
        self.variables = variables
        self.shape: tuple[int, ...] = aval.shape
        self.source: _Value = source or self
        self.same: _Value = self

    @property
    def is_activation(self) -> bool:
        return self.variables is None

    @property
    def stored_bytes(self) -> int:
        """Bytes in memory; where an activation form gives it few bits, at these."""
        return -(-self.nbytes * self.source.stored_bits // self.bits)


class _Step(NamedTuple):
    """An operation of the program; calls with products inside are taken apart.

    Attributes:
      reads, writes: its operands and results.
      multiply_adds: of a product.
      kernel: a number that it shares with the other steps of an operation of `shiftnet.kernels`;
        None outside of these.
      is_view: whether its result is a part of its operand, at the same place in memory.
    """

    reads: Sequence[_Value]
    writes: Sequence[_Value]
    multiply_adds: int
    kernel: int | None
    is_view: bool

    @property
    def is_forward(self) -> bool:
        """Tells whether it depends on the image."""
        return any(value.is_activation for value in self.reads)

    @property
    def activations(self) -> list[_Value]:
        """The different activations among its operands."""
        return list({id(value): value for value in self.reads if value.is_activation}.values())

    @property
    def variables(self) -> frozenset[str]:
        return frozenset().union(*(value.variables or () for value in self.reads))


class _Trace(NamedTuple):
    """A network's forward pass.

    Attributes:
      modules: the layers, blocks and so on, by path: shape of what each returns, without the batch;
        None for one that is not called.
      variables: the network's, by path.
      steps: in the program's order.
      logits: the result.
    """

    modules: Mapping[str, tuple[int, ...] | None]
    variables: Mapping[str, nnx.Variable]
    steps: Sequence[_Step]
    logits: _Value


def _trace(model: nnx.Module, image: tuple[int, int, int]) -> _Trace:
    graphdef, state = nnx.split(model)

    def forward(state, x):
        copy = nnx.merge(graphdef, state)
        run = nnx.capture(copy, nnx.Intermediate, method_outputs=nnx.Intermediate)
        logits, captured = run(x)
        outputs = {
            ".".join(map(str, module)): variable.get_value()[-1]
            for (*module, method), variable in nnx.to_flat_state(captured)
            if method == "__call__"
        }
        return {name: y for name, y in outputs.items() if isinstance(y, jax.Array)}, logits

    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    with only_xla():  # layer by layer
        program, (outputs, _) = jax.make_jaxpr(forward, return_shape=True)(state, x)
    # In the order in which the program takes them.
    variables = {
        jax.tree_util.keystr(path, simple=True, separator="."): variable
        for path, variable in jax.tree.leaves_with_path(
            state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
    }
    sources = [*(frozenset([name]) for name in variables), None]
    inputs = [
        _Value(invar.aval, source)
        for invar, source in zip(program.jaxpr.invars, sources, strict=True)
    ]
    steps: list[_Step] = []
    *results, logits = _follow(program.jaxpr, inputs, steps)
    # A module that returns a weight is part of the layer that multiplies with it, and so is one
    # that quantizes the layer's input.
    modules: dict[str, tuple[int, ...] | None] = {
        ".".join(map(str, path)): None
        for path, module in nnx.iter_modules(model)
        if not isinstance(module, nnx.List | nnx.Dict | quantizers.Weight | quantizers.Activation)
    }
    for (name, output), value in zip(outputs.items(), results, strict=True):
        if not value.is_activation:
            modules.pop(name, None)
        elif name in modules:
            modules[name] = output.shape[1:]
    return _Trace(modules, variables, steps, logits)


def _follow(
    program: Jaxpr, inputs: Sequence[_Value], steps: list[_Step], kernel: int | None = None
) -> list[_Value]:
    """Runs the program on values without contents, appends its steps and returns its results."""
    values = dict(zip(program.invars, inputs, strict=True))
    values |= {constant: _Value(constant.aval, frozenset()) for constant in program.constvars}

    def value(atom):
        return _Value(atom.aval, frozenset()) if isinstance(atom, Literal) else values[atom]

    for equation in program.eqns:
        reads = [value(atom) for atom in equation.invars]
        called = [inner for inner in _inner_programs(equation) if _has_products(inner)]
        if called:
            if equation.primitive.name not in _CALLS:
                raise UserError(
                    f"the network has products inside {equation.primitive.name}, whose "
                    "multiply-adds cannot be counted"
                )
            # Operations of `shiftnet.kernels` have their own derivatives.
            is_kernel = kernel is None and equation.primitive.name == "custom_vjp_call"
            writes = _follow(called[0], reads, steps, len(steps) if is_kernel else kernel)
        else:
            changes_type = _is_conversion(equation) and reads[0].is_activation
            is_view = changes_type or equation.primitive.name in _VIEWS
            step = _Step(reads, [], _multiply_adds(equation), kernel, is_view)
            variables = None if step.is_forward else step.variables
            source = reads[0].source if is_view else None
            writes = [_Value(out.aval, variables, source) for out in equation.outvars]
            if changes_type:
                _store_narrower(reads[0], writes[0])
            steps.append(step._replace(writes=writes))
            if equation.primitive.name == "reshape":
                reads[0].shape = writes[0].shape
        values.update(zip(equation.outvars, writes, strict=True))
    return [value(atom) for atom in program.outvars]


# Equations that run the one program they hold once, on their own operands.
_CALLS = ("jit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
# Equations that move nothing.
_VIEWS = ("reshape", "squeeze", "expand_dims", "slice")


def _is_conversion(equation: JaxprEqn) -> bool:
    """Tells whether it changes one floating type into another, which moves nothing by itself."""
    return equation.primitive.name == "convert_element_type" and all(
        jnp.issubdtype(_dtype(atom), jnp.floating) for atom in (*equation.invars, *equation.outvars)
    )


def _store_narrower(value: _Value, converted: _Value) -> None:
    """Keeps an array, and what it is converted to, as one of the narrower type."""
    converted.same = value.same
    value.source.stored_bits = min(value.source.stored_bits, converted.bits)
    for array in (value.source, value.same):
        array.kept_bits = min(array.kept_bits, converted.bits)


def _inner_programs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple) else (parameter,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _has_products(program: Jaxpr) -> bool:
    return any(
        equation.primitive.name in ("conv_general_dilated", "dot_general")
        or any(_has_products(inner) for inner in _inner_programs(equation))
        for equation in program.eqns
    )


def _multiply_adds(equation: JaxprEqn) -> int:
    """Multiplies the values of a product's result by the terms summed in each."""
    if equation.primitive.name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        summed = math.prod(kernel) // features
    elif equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        summed = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
    else:
        return 0
    return math.prod(_shape(equation.outvars[0])) * summed


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _dtype(atom: Any) -> jnp.dtype:
    return atom.aval.dtype


def _peak_bytes(steps: Sequence[_Step], result: _Value) -> int:
    """Computes `Counts.peak_activation_bytes`."""
    last_use = {id(value.same): i for i, step in enumerate(steps) for value in step.reads}
    last_use[id(result.same)] = len(steps)
    alive: dict[int, int] = {}
    peak = 0
    for i, step in enumerate(steps):
        for value in (*step.reads, *step.writes):
            if value.is_activation:
                kept = value.same
                alive[id(kept)] = kept.nbytes * kept.kept_bits // kept.bits
        peak = max(peak, sum(alive.values()))
        alive = {key: nbytes for key, nbytes in alive.items() if last_use.get(key, i) > i}
    return peak


def _store_quantized(steps: Sequence[_Step], product: _Step, bits: int) -> None:
    """Stores what a product with quantized activations reads, also through a shift, at their bits.

    Args:
      steps: of the program.
      product: one of them.
      bits: of the activations.
    """
    for step in steps:
        if step is product or (step.kernel is not None and step.kernel == product.kernel):
            for value in step.activations:
                value.source.stored_bits = bits
        if step is product:
            break


def _bytes_moved(steps: Sequence[_Step]) -> int:
    """Computes `Counts.bytes_moved` without the weights."""
    return sum(
        value.stored_bytes
        for step in steps
        if step.is_forward and not step.is_view
        for value in (*step.activations, *step.writes)
    )


def _fused_bytes(steps: Sequence[_Step], result: _Value) -> tuple[int, int]:
    """Computes what `Counts.fused_bytes_moved` reads and what it writes, without the weights.

    Every product, or kernel with products, starts a group, and all else joins the latest group that
    it reads from. A group reads what others wrote, once, and writes what others read.
    """
    group_of: dict[int, int] = {}
    written = {id(result.source): result.source}
    read: dict[tuple[int, int], dict[int, _Value]] = {}  # by group and source
    for i, step in enumerate(steps):
        if not step.is_forward or step.is_view:
            continue
        groups = [group_of.get(id(value.source), -1) for value in step.activations]
        group = i if step.multiply_adds else max(groups)
        group = group if step.kernel is None else step.kernel
        for value, other in zip(step.activations, groups, strict=True):
            if other != group:
                read.setdefault((group, id(value.source)), {})[id(value)] = value
                if other >= 0:
                    written[id(value.source)] = value.source
        group_of |= {id(value): group for value in step.writes}
    total = 0
    for views in read.values():  # of one array, which is not read twice
        whole = next(iter(views.values())).source.stored_bytes
        total += min(whole, sum(view.stored_bytes for view in views.values()))
    return total, sum(value.stored_bytes for value in written.values())
