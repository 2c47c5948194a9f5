"""Products with packed matrices, against NumPy in float64 with the codes that were packed."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies

from benchmarks.packed_matmul import PackedMatrix, expand, gpu, pack, packed_matmul, tpu
from benchmarks.packed_matmul import packed as layout
from shiftnet.kernels import implementations
from tests.kernels.test_tpu_compile import moved_bytes

core = pytest.mark.core
# Its copies past the end of an array come back empty, and it multiplies nothing transposed.
simulated = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 does not know enough"
)


def powers(count):
    return [2**i for i in range(count)]


def both_signs(magnitudes):
    return tuple(float(sign * m) for sign in (-1, 1) for m in magnitudes)


# The forms of `shiftnet.quantizers`, by name: their levels and the bits that a weight takes.
FORMS = {
    "Sign": (both_signs([1]), 1),
    "S3 2": ((0.0, *both_signs([1])), 2),
    "DenseShift 2": (both_signs(powers(2)), 2),
    "S3 3": ((0.0, *both_signs(powers(3))), 3),
    "DenseShift 3": (both_signs(powers(4)), 3),
    "S3 4": ((0.0, *both_signs(powers(7))), 4),
    "DenseShift 4": (both_signs(powers(8)), 4),
}
# Rows, inputs, outputs, dtype: less than a group and a tile, one of each, several and a part.
CASES = [(1, 5, 3, "bfloat16"), (3, 256, 128, "float32"), (16, 520, 130, "bfloat16")]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "{}x{}x{} {}".format(*case))
each_form = pytest.mark.parametrize("form", FORMS)


def run(f, *operands):
    """Compiled, but not well: most of these tests' time is the CPU's compiler."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})(*operands)


def on_tpu(x, packed):
    return run(lambda x, packed: tpu.matmul(x, packed, interpret=True), x, packed)


def on_gpu(x, packed):
    return run(lambda x, packed: gpu.matmul(x, packed, interpret=True), x, packed)


@functools.cache
def operands(form, rows, inputs, outputs, dtype):
    """x, the packed matrix, and the dense one in float64; every level is there, zeros too."""
    levels, _ = FORMS[form]
    rng = np.random.default_rng(inputs)
    codes = rng.permutation(np.arange(inputs * outputs) % len(levels)).reshape(inputs, outputs)
    scale = rng.uniform(0.5, 2, outputs).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    return x, pack(codes, levels, scale), np.asarray(levels)[codes] * scale.astype(np.float64)


def assert_is_product(y, x, dense):
    """Within what float32 sums and one rounding at the end can be off."""
    x64 = np.asarray(x, np.float64)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], dense.shape[1]))
    error = np.abs(np.asarray(y, np.float64) - x64 @ dense)
    step = float(jnp.finfo(x.dtype).eps) if x.dtype == jnp.bfloat16 else 2.0**-24
    summed = np.abs(x64) @ np.abs(dense) * 2.0**-24 * (4 + np.sqrt(x.shape[-1]))
    assert (error <= summed + step * np.abs(x64 @ dense)).all()


@core
@each_form
@each_case
def test_xla_gives_the_product(form, case):
    x, packed, dense = operands(form, *case)
    assert_is_product(run(packed_matmul, x, packed), x, dense)


@core
@each_form
def test_tpu_kernel_gives_the_product(form):
    x, packed, dense = operands(form, *CASES[2])
    assert_is_product(on_tpu(x, packed), x, dense)


def test_tpu_kernel_takes_a_matrix_in_several_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 2**14)
    x, packed, dense = operands("S3 3", 2, 1100, 300, "bfloat16")  # 5 groups, by 2
    assert_is_product(on_tpu(x, packed), x, dense)


@simulated
@pytest.mark.parametrize("form", ["Sign", "S3 3", "DenseShift 4"])
def test_gpu_kernel_gives_the_product(form):
    x, packed, dense = operands(form, 3, 300, 60, "bfloat16")
    assert_is_product(on_gpu(x, packed), x, dense)


@pytest.mark.parametrize("kernel", [on_tpu, pytest.param(on_gpu, marks=simulated)])
def test_kernels_lose_no_digit_of_float32(kernel):
    x, packed, dense = operands("S3 3", 3, 300, 60, "float32")
    assert_is_product(kernel(x, packed), x, dense)


@simulated
def test_gpu_kernel_takes_wide_tiles(monkeypatch):
    monkeypatch.setattr(gpu.gpu, "MULTIPROCESSORS", 1)
    x, packed, dense = operands("S3 3", 16, 520, 130, "bfloat16")
    assert gpu._Plan.of(16, packed).tile == 128
    assert_is_product(on_gpu(x, packed), x, dense)


@simulated
def test_gpu_kernel_shares_the_inputs_among_blocks(monkeypatch):
    monkeypatch.setattr(gpu.gpu, "MULTIPROCESSORS", 4)
    x, packed, dense = operands("DenseShift 3", 2, 4096, 60, "bfloat16")
    plan = gpu._Plan.of(8, packed)
    assert plan.blocks == 2
    assert plan.stages > 1
    assert_is_product(on_gpu(x, packed), x, dense)


def owners(layout, shape):
    """The index of the element in each `[warp, lane, register, place]` of a Mosaic layout."""
    elements = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        kept, tiled = elements.shape[: -len(tile)], elements.shape[-len(tile) :]
        pairs = [
            size for whole, part in zip(tiled, tile, strict=True) for size in (whole // part, part)
        ]
        elements = elements.reshape(*kept, *pairs)
        count = len(kept)
        order = [
            *range(count),
            *range(count, elements.ndim, 2),
            *range(count + 1, elements.ndim, 2),
        ]
        elements = elements.transpose(order)
    owning = [d % elements.ndim for d in (*layout.warp_dims, *layout.lane_dims)]
    place = layout.vector_dim % elements.ndim
    registers = [d for d in range(elements.ndim) if d not in (*owning, place)]
    elements = elements.transpose(*owning, *registers, place)
    return elements.reshape(4, 32, -1, elements.shape[-1])


def test_words_are_in_the_registers_where_the_tensor_cores_want_their_weights():
    """What the interpreter cannot show: it has no registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    word = owners(gpu._words_layout().to_mgpu(), (8, 64))[..., 0]
    row, column = np.divmod(word, 64)
    slots = 4
    expected = np.concatenate(
        [column * 16 * slots + 16 * j + 2 * row for j in range(slots)], axis=-1
    )
    weights = owners(plgpu.Layout.WGMMA.to_mgpu(), (64, 16 * slots))
    np.testing.assert_array_equal(weights, np.stack([expected, expected + 1], axis=-1))


@core
@settings(max_examples=20)
@given(
    st.sampled_from(sorted(FORMS)),
    st.sampled_from([(1, 1), (255, 127), (257, 129)]),
    st.sampled_from([1.0, 0.25, 0.3]),
    st.integers(0, 99),
)
def test_what_is_packed_comes_out_again(form, shape, unit, seed):
    levels = np.asarray(FORMS[form][0]) * unit
    codes = np.random.default_rng(seed).integers(0, len(levels), shape)
    packed = pack(codes, levels, 0.5)
    np.testing.assert_array_equal(run(expand, packed), np.float32(levels[codes]) * 0.5)


@core
@each_form
def test_takes_the_bytes_that_it_claims(form):
    levels, bits = FORMS[form]
    packed = pack(np.zeros((512, 256), np.uint8), levels)
    assert packed.bits == bits
    assert packed.words.nbytes == 512 * 256 * bits // 8
    assert packed.nbytes == packed.words.nbytes + packed.scale.nbytes
    small = pack(np.zeros((257, 129), np.uint8), levels)
    assert small.words.nbytes == packed.words.nbytes


@core
@each_form
def test_every_bit_of_the_words_belongs_to_one_weight(form):
    bits = FORMS[form][1]
    used = np.zeros((bits, 16), int)
    for parts in layout.SLOTS_OF_BITS[bits]:
        for octet, shift, mask in parts:
            for place in np.flatnonzero(mask >> np.arange(16) & 1):
                used[octet, place - shift] += 1
    np.testing.assert_array_equal(used, 1)


@core
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_those_of_the_dense_product(dtype):
    x, packed, dense = operands("S3 3", 3, 256, 128, dtype)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(3, 128)), dtype)

    def forward_and_vjp(x, packed, dy):
        y, vjp = jax.vjp(packed_matmul, x, packed)
        dx, dpacked = vjp(dy)
        return y, dx, dpacked.scale

    y, dx, dscale = run(forward_and_vjp, x, packed, dy)
    assert_is_product(y, x, dense)
    assert_is_product(dx, dy, dense.T)
    scale = np.asarray(packed.scale[:128], np.float64)
    expected = (np.asarray(dy, np.float64) * (np.asarray(x, np.float64) @ (dense / scale))).sum(0)
    np.testing.assert_allclose(dscale, expected, rtol=1e-4, atol=1e-4)


@core
def test_leading_dimensions_jit_and_vmap_change_nothing():
    x, packed, dense = operands("S3 3", 6, 520, 130, "float32")
    stacked = x.reshape(2, 3, 520)
    assert_is_product(run(packed_matmul, stacked, packed), stacked, dense)
    mapped = jax.vmap(packed_matmul, in_axes=(0, None))
    assert_is_product(run(mapped, stacked, packed), stacked, dense)
    assert_is_product(run(packed_matmul, x[0], packed), x[0], dense)
    assert run(packed_matmul, x[:0], packed).shape == (0, 130)


@core
def test_infinities_and_large_numbers_keep_their_size():
    packed = pack(np.array([[0], [1]]), (-1, 1))
    x = jnp.asarray([[1e38, 0], [np.inf, 1], [1, np.nan], [1e-30, 0]], jnp.float32)
    for y in (run(packed_matmul, x, packed), on_tpu(x, packed)):
        np.testing.assert_array_equal(
            y[:, 0], np.float32([-1e38, -np.inf, np.nan, np.float32(-1e-30)])
        )


@core
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([[0, 1]], (-3, 1)), "powers of two times one number"),
        (([[0, 1]], (0, 0)), "not all zero"),
        (([[0, 1]], (0, np.inf)), "finite"),
        (([[0, 1]], (1, 256)), "5 bits a weight"),
        (([[0, 2]], (-1, 1)), "from 0 to 1, found 0 to 2"),
        (([[-1, 0]], (-1, 1)), "from 0 to 1, found -1 to 0"),
        (([0, 1], (-1, 1)), r"integers \[K, M\], got int64 \(2,\)"),
        (([[0.0, 1.0]], (-1, 1)), "got float64"),
        (([[0, 1]], (-1, 1), [1.0, 2.0, 3.0]), r"the shape \(\) or \(2,\), got \(3,\)"),
    ],
)
def test_bad_matrices_are_named(arguments, sentence):
    codes, *rest = arguments
    with pytest.raises(ValueError, match=sentence):
        pack(np.asarray(codes), *rest)


@core
@pytest.mark.parametrize(
    ("shape", "dtype", "implementation", "sentence"),
    [
        ((3, 7), "float32", None, r"needs x \[..., 8\], got \(3, 7\)"),
        ((3, 8), "int32", None, "floating x, got int32"),
        ((3, 8), "float32", "fast", "unknown implementation 'fast'.*xla, tpu, gpu"),
        ((65, 8), "bfloat16", "tpu", "'tpu'.*65 rows of bfloat16, not 1 to 64"),
        ((22, 8), "float32", "gpu", "'gpu'.*22 rows of float32, not 1 to 21"),
        ((3, 8), "float16", "gpu", "'gpu'.*float16, not bfloat16 or float32"),
        ((0, 8), "bfloat16", "gpu", "0 rows"),
    ],
)
def test_bad_arguments_are_named(shape, dtype, implementation, sentence):
    packed = pack(np.zeros((8, 4), np.uint8), (-1, 1))
    with pytest.raises(ValueError, match=sentence):
        packed_matmul(jnp.zeros(shape, dtype), packed, implementation=implementation)


@core
@pytest.mark.parametrize(("platform", "kernel"), [("cpu", None), ("tpu", "tpu_custom_call")])
def test_each_platform_gets_its_kernel_where_that_supports_the_arguments(platform, kernel):
    packed = pack(np.zeros((8, 4), np.uint8), (-1, 1))
    for rows, supported in ((3, True), (100, False)):
        x = jax.ShapeDtypeStruct((rows, 8), jnp.bfloat16)
        with implementations.lowered_for(platform):
            traced = jax.jit(lambda x: packed_matmul(x, packed)).trace(x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == (supported and kernel == "tpu_custom_call")


@pytest.fixture(scope="module")
def v5e():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu is not installed; `pip install "jax[tpu]"` brings the one of JAX')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize(("form", "rows"), [("Sign", 1), ("S3 3", 16), ("DenseShift 4", 5)])
def test_a_tpu_reads_the_packed_bytes_once(v5e, form, rows):
    """What the kernel's grid moves, block by block, and what the compiler counts around it."""
    levels, bits = FORMS[form]
    inputs, outputs = 4096, 8192
    words = jax.ShapeDtypeStruct((inputs // 32 * bits, outputs), jnp.int32, sharding=v5e)
    scale = jax.ShapeDtypeStruct((outputs,), jnp.float32, sharding=v5e)
    packed = PackedMatrix(words, scale, (inputs, outputs), levels)
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16, sharding=v5e)
    moved = moved_bytes(lambda x, packed: tpu.matmul(x, packed), x, packed)
    assert moved <= 1.01 * (packed.nbytes + 2 * rows * (inputs + outputs))
