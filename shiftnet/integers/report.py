"""What a network loses by computing with integers, layer by layer."""

from collections.abc import Callable

import numpy as np

from shiftnet import tables
from shiftnet.integers import digits, graph
from shiftnet.integers.convert import Conversion
from shiftnet.integers.graph import Add, Conv, Depthwise, Layer, Pool
from shiftnet.integers.interpreter import compile_graph
from shiftnet.quantizers.quantized import bits_of


def layers(conversion: Conversion) -> str:
    """Returns a table with the widths and the error of each layer.

    The error is that of codes times step against the float network's tensor, as the root of the
    mean square, in percent of the tensor's own. It includes the errors of all layers before.
    """
    network = conversion.graph
    tensors = compile_graph(network)(conversion.images)
    rows: list[tuple[object, ...]] = [
        ("layer", "kind", "weight bits", "codes", "step", "sum bits", "terms", "error %")
    ]
    for layer in network.layers:
        inputs = network.inputs(layer)
        output = layer.output
        found = np.asarray(tensors[layer.name], np.float64) * output.step
        expected = conversion.floats[layer.name].astype(np.float64)
        power = np.square(expected).mean()
        error = np.sqrt(np.square(found - expected).mean() / power) if power else 0.0
        rows.append(
            (
                layer.name,
                _kind(layer),
                _weight_bits(layer),
                output.dtype,
                f"{output.step:.4g}",
                graph.bits(int(graph.bounds(layer, inputs).max())) if inputs else "-",
                _terms(layer),
                f"{100 * error:.2f}",
            )
        )
    return tables.aligned(rows)


def accuracy(
    logits: Callable[[np.ndarray], np.ndarray], images: np.ndarray, labels: np.ndarray
) -> float:
    """Returns the share of images whose label has the largest logit."""
    return float((logits(images).argmax(-1) == labels).mean())


def _kind(layer: Layer) -> str:
    if isinstance(layer, Conv):
        size = layer.weights.shape[0]
        return f"shift, {size}x{size}" if layer.shift else f"{size}x{size}"
    if isinstance(layer, Depthwise):
        return f"depthwise {layer.weights.shape[0]}x{layer.weights.shape[0]}"
    if isinstance(layer, Pool) and layer.window == (1, 1):
        return "scale"
    return type(layer).__name__.lower()


def _weight_bits(layer: Layer) -> object:
    if not isinstance(layer, Conv | Depthwise):
        return "-"
    return bits_of(layer.levels) if layer.levels else 8


def _terms(layer: Layer) -> object:
    """Counts the most powers of two in a multiplier."""
    if isinstance(layer, Conv | Depthwise | Pool):
        return int(digits.count(layer.requantization.multiplier).max())
    return int(digits.count(np.array(layer.multipliers)).max()) if isinstance(layer, Add) else "-"
