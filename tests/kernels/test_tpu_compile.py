"""The TPU kernels through the compiler for a v5e, without one, and the bytes that they move.

Bytes are those of the device's memory: what the compiled program's operations read and write there,
each kernel's operands and results once, and what its grid moves beyond that, added up block by
block. (The compiler's own count, which has the kernel's operands not at all (libtpu 0.0.48) or
once, takes what stays in the chip's memory for traffic: weights that it reorders, for one.)
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from shiftnet.kernels.shift import tpu as shift_tpu
from shiftnet.kernels.shift.offsets import channel_offsets
from shiftnet.kernels.shift_block import tpu as block_tpu
from shiftnet.kernels.shift_pointwise import tpu as pointwise_tpu
from shiftnet.planning import grids, hlo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed; `pip install "jax[tpu]"` brings the one that JAX wants',
)


@pytest.fixture(scope="module")
def tpu():
    """Sharding on one v5e; libtpu asks no metadata server, and other processes may load it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
        # What is compiled for a TPU cannot be read back from the cache without one.
        seconds = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def moved_bytes(f, *operands) -> int:
    """Compiles `f` for the TPU; what it moves to and from the device's memory."""
    traced = jax.jit(f).trace(*operands)
    moved = hlo.memory_traffic(traced.lower().compile().as_text())
    return moved + grids.beyond_operands(traced.jaxpr.jaxpr)


class Shapes:
    """Arguments of the operations as the compiler wants them: shapes on a TPU."""

    def __init__(self, sharding, case):
        height, width, channels, expanded, outputs, batch, stride, dtype = case
        self.sharding, self.dtype = sharding, jnp.dtype(dtype)
        dh, dw = channel_offsets(expanded)
        self.offsets = {"dh": dh, "dw": dw}
        self.where = {**self.offsets, "stride": stride}
        self.x = self(height, width, channels, batch)
        self.wide_x = self(height, width, expanded, batch)
        self.w1, self.w2 = self(channels, expanded), self(expanded, outputs)
        self.scale, self.out_scale = self(expanded), self(outputs)
        self.out = self(-(-height // stride), -(-width // stride), outputs, batch)

    def __call__(self, *shape):
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.sharding)


def size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


def block(s):
    def f(x, w1, b1, w2, out_bias, residual):
        after = {"out_bias": out_bias, "out_relu": True, "residual": residual}
        return block_tpu.forward(x, w1, b1, w2, **after, **s.where)

    floor = size(s.x, s.out, s.out)
    return f, (s.x, s.w1, s.scale, s.w2, s.out_scale, s.out), floor


def block_backward(s):
    def f(*operands):
        return block_tpu.backward(*operands, **s.where)

    return f, (s.x, s.w1, s.scale, s.w2, s.out), size(s.x, s.x, s.out)


def pointwise(s):
    def f(x, w, scale, bias, out_scale, residual):
        after = {"out_scale": out_scale, "out_bias": out_scale, "residual": residual}
        return pointwise_tpu.forward(
            x, w, scale, bias, relu=True, out_relu=True, **after, **s.where
        )

    floor = size(s.wide_x, s.out, s.out)
    return f, (s.wide_x, s.w2, s.scale, s.scale, s.out_scale, s.out), floor


def bare_pointwise(s):
    def f(x, w):
        return pointwise_tpu.forward(x, w, None, None, relu=False, **s.where)

    return f, (s.wide_x, s.w2), size(s.wide_x, s.w2, s.out)


def pointwise_backward(s):
    def f(*operands):
        return pointwise_tpu.backward(*operands, relu=True, **s.where)

    floor = size(s.wide_x, s.wide_x, s.out)
    return f, (s.wide_x, s.w2, s.scale, s.scale, s.out), floor


def shift(s):
    return lambda x: shift_tpu.shift(x, **s.offsets), (s.wide_x,), 2 * size(s.wide_x)


each_operation = pytest.mark.parametrize(
    "operation",
    [block, block_backward, pointwise, bare_pointwise, pointwise_backward, shift],
    ids=lambda f: f.__name__,
)


# H, W, C, E, K, N, stride, dtype: the first and the last stage of a ShiftResNet20, and one between.
@pytest.mark.parametrize(
    "case",
    [
        (32, 32, 16, 144, 16, 128, 1, "bfloat16"),
        (32, 32, 16, 144, 32, 128, 2, "bfloat16"),
        (8, 8, 64, 576, 64, 128, 1, "bfloat16"),
    ],
    ids=["32x32", "32x32 stride 2", "8x8"],
)
@each_operation
@pytest.mark.covering
def test_moves_each_byte_about_once(tpu, operation, case):
    f, operands, floor = operation(Shapes(tpu, case))
    assert floor <= moved_bytes(f, *operands) <= 1.2 * floor


@pytest.mark.parametrize(
    "case",
    [
        (5, 7, 5, 20, 6, 128, 2, "float32"),
        (3, 2, 3, 7, 10, 384, 1, "bfloat16"),
        (16, 16, 32, 288, 32, 256, 1, "float32"),
    ],
    ids=lambda case: "x".join(map(str, case)),
)
@each_operation
@pytest.mark.covering
def test_compiles(tpu, operation, case):
    f, operands, _ = operation(Shapes(tpu, case))
    jax.jit(f).lower(*operands).compile()


@pytest.mark.parametrize("operation", [block, block_backward])
@pytest.mark.parametrize(("width", "stride"), [(6, 1), (14, 2)])
@pytest.mark.covering
def test_widths_that_are_no_multiple_of_four_compile(tpu, operation, width, stride):
    f, operands, _ = operation(Shapes(tpu, (3, width, 16, 48, 16, 128, stride, "bfloat16")))
    jax.jit(f).lower(*operands).compile()


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_supported_fits_into_the_chip(tpu, backward):
    """The widest rows that `unsupported` lets pass compile."""

    def shapes(width):
        return Shapes(tpu, (3, width, 16, 144, 16, 128, 1, "bfloat16"))

    def supported(width):
        s = shapes(width)
        return not block_tpu.unsupported(s.x, s.w1, s.w2, **s.where, backward=backward)

    widest = max(filter(supported, range(16, 2048, 16)))
    f, operands, _ = (block_backward if backward else block)(shapes(widest))
    jax.jit(f).lower(*operands).compile()
