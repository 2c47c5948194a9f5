"""What Pallas kernels move between a TPU's memory and the chip, which their operands do not tell.

A kernel fetches a block whenever its grid's next step has another one than the last: an operand
may be fetched several times, or not at all.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params


def kernels(program: Jaxpr) -> Iterator[JaxprEqn]:
    """Yields the Pallas calls in a traced program."""
    for equation in program.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from kernels(inner)


def fetched_and_written(kernel: JaxprEqn) -> int:
    """Returns the bytes of the blocks that a kernel's grid moves."""
    mapping = kernel.params["grid_mapping"]
    steps = np.indices(mapping.grid).reshape(len(mapping.grid), -1).astype(np.int32)
    total = 0
    for block in mapping.block_mappings:
        index_map = block.index_map_jaxpr

        def index(*step, index_map=index_map):
            return jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *step)

        indices = [np.broadcast_to(i, steps.shape[1:]) for i in jax.jit(jax.vmap(index))(*steps)]
        moved = 1 + np.any(np.diff(indices), axis=0).sum()
        shape = [getattr(size, "block_size", size) for size in block.block_shape]
        total += moved * int(np.prod(shape)) * block.array_aval.dtype.itemsize
    return int(total)


def beyond_operands(program: Jaxpr) -> int:
    """Returns the bytes that kernels move beyond each of their operands and results once."""
    total = 0
    for kernel in kernels(program):
        arrays: Iterator[Any] = (value.aval for value in (*kernel.invars, *kernel.outvars))
        once = sum(array.size * array.dtype.itemsize for array in arrays)
        total += max(0, fetched_and_written(kernel) - once)
    return total
