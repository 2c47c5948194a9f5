"""Networks that compute with integers alone, from a trained network to C.

`convert` turns a network into a `Graph` of integer layers, `interpreter` computes it in JAX and is
the specification, `c` writes it as a C99 program without multiplications.
"""

from shiftnet.integers.convert import REQUANTIZE, Conversion, convert
from shiftnet.integers.graph import Add, Codes, Conv, Depthwise, Graph, Layer, Pool, Table, arrays
from shiftnet.integers.interpreter import compile_graph

__all__ = [
    "REQUANTIZE",
    "Add",
    "Codes",
    "Conv",
    "Conversion",
    "Depthwise",
    "Graph",
    "Layer",
    "Pool",
    "Table",
    "arrays",
    "compile_graph",
    "convert",
]
