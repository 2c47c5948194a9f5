"""Computes an integer network in JAX on int32: the specification of what others must compute.

Programs made from a graph give these integers, each of them, for every image.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.integers.graph import Add, Conv, Depthwise, Graph, Layer, Pool, Requantization, Table

Tensors = dict[str, jax.Array]


def compile_graph(graph: Graph) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """Returns a compiled function from uint8 `[N, H, W, 3]` to the codes of every layer.

    The codes are int32 `[N, height, width, channels]` each, by the layer's name; those of the last
    layer are the logits.
    """
    return jax.jit(functools.partial(_run, graph))


def logits(graph: Graph, images: np.ndarray, *, batch_size: int = 250) -> np.ndarray:
    """Returns the logits of many images, int32 `[N, classes]`.

    Args:
      graph: the network.
      images: uint8 `[N, H, W, 3]`.
      batch_size: images at a time.
    """
    last = graph.layers[-1].name
    run = jax.jit(lambda images: _run(graph, images)[last][:, 0, 0])
    rows = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        filled = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        rows.append(np.asarray(run(filled if len(images) > batch_size else batch))[: len(batch)])
    return np.concatenate(rows)


def _run(graph: Graph, images: jax.Array) -> Tensors:
    tensors: Tensors = {}
    for layer in graph.layers:
        inputs = [tensors[name] for name in layer.inputs]
        tensors[layer.name] = _layer(layer, inputs, images)
    return tensors


def _layer(layer: Layer, inputs: list[jax.Array], images: jax.Array) -> jax.Array:
    if isinstance(layer, Table):
        table = jnp.asarray(layer.table, jnp.int32)
        return table[images.astype(jnp.int32), jnp.arange(images.shape[-1])]
    if isinstance(layer, Add):
        a, b = inputs
        b = jnp.pad(b, [(0, 0)] * 3 + [(0, a.shape[-1] - b.shape[-1])])
        by_a, by_b = layer.multipliers
        total = (a * by_a + b * by_b + layer.bias) >> layer.shift
        return jnp.clip(total, layer.output.low, layer.output.high)
    (x,) = inputs
    if isinstance(layer, Conv):
        if layer.shift is not None:
            x = _shifted(x, *layer.moves(x.shape[-1]))
        sums = _sums(x, jnp.asarray(layer.dense(), jnp.int32), layer.stride, jnp.matmul)
    elif isinstance(layer, Depthwise):
        weights = jnp.asarray(layer.weights, jnp.int32)
        sums = _sums(x, weights, layer.stride, lambda tap, w: tap * w[0])
    elif isinstance(layer, Pool):
        (rows, columns), pad = layer.window, layer.padding
        x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
        taps = [(i, j) for i in range(rows) for j in range(columns)]
        sums = sum(
            (_tap(x, *tap, layer.stride, layer.output.height, layer.output.width) for tap in taps),
            start=jnp.int32(0),
        )
    else:
        raise TypeError(type(layer).__name__)
    return _requantized(sums, layer.requantization, layer.output.low, layer.output.high)


def _requantized(sums: jax.Array, by: Requantization, low: int, high: int) -> jax.Array:
    multiplier, bias, shift = (
        jnp.asarray(part.astype(np.int32)) for part in (by.multiplier, by.bias, by.shift)
    )
    return jnp.clip(jnp.right_shift(sums * multiplier + bias, shift), low, high)


def _sums(
    x: jax.Array,
    weights: jax.Array,
    stride: int,
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns the sum over a window's taps of `product(tap, weights[tap])`."""
    size = weights.shape[0]
    pad = size // 2
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    taps = [(i, j) for i in range(size) for j in range(size)]
    return sum(
        (product(_tap(x, i, j, stride, height, width), weights[i, j]) for i, j in taps),
        start=jnp.int32(0),
    )


def _tap(x: jax.Array, row: int, column: int, stride: int, height: int, width: int) -> jax.Array:
    """Returns the pixels that a tap of the window reads, `[N, height, width, C]`."""
    rows = slice(row, row + (height - 1) * stride + 1, stride)
    columns = slice(column, column + (width - 1) * stride + 1, stride)
    return x[:, rows, columns]


def _shifted(x: jax.Array, dh: np.ndarray, dw: np.ndarray) -> jax.Array:
    """Returns `x` with every channel moved by its offset, 0 where that is outside."""
    reach = int(max(np.abs(dh).max(), np.abs(dw).max()))
    padded = jnp.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)])
    rows = np.arange(x.shape[1])[:, None, None] + reach + dh
    columns = np.arange(x.shape[2])[None, :, None] + reach + dw
    return padded[:, rows, columns, np.arange(x.shape[-1])]
