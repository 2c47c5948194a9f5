"""How every test runs: on the CPU as two devices, and with nothing that JAX would guess."""

import ctypes
import gc
import os
import tempfile
from collections.abc import Iterator

# Before JAX is imported; the commands that tests start and the other test process inherit all.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most tests compile longer than they compute: without LLVM's optimizations a training step takes a
# third less to compile and run than with its first level.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Where in the source each operation comes from takes a seventh of tracing and compiling a run.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The default of glibc. With it commands that run in here leave the memory of the tests alone.
os.environ.setdefault("MALLOC_TOP_PAD_", "131072")
# Many tests train the same small network or make arrays of the same shapes: compile each program
# once in a run of the tests. The smallest takes 22 ms to compile and 2 ms to read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="shiftnet-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from hypothesis import settings

from tests.shared_programs import shared_programs

# Two devices, so that code which only works on one is noticed. Not through the environment:
# a command that a test starts sees the machine as it is.
jax.config.update("jax_num_cpu_devices", 2)
# A product of float32 and bfloat16, or float32 and int32, is an error unless it is written out.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Most of what tests allocate lives as long as they run: looking for garbage at the usual rate takes
# a tenth of their time.
gc.set_threshold(100_000, 20, 100)

LIBC = ctypes.CDLL(None)

# The same examples everywhere, so that a failure is everyone's; compiling makes any deadline wrong.
settings.register_profile("shiftnet", derandomize=True, deadline=None)
settings.load_profile("shiftnet")


# The folders of the longest files begin first: of two processes none waits long for the other.
FIRST = ("training", "kernels", "models", "integers", "cli")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases of `covering` tests as slow that have no new value of any parameter.

    And puts the folders in order.
    """
    items.sort(key=lambda item: (*FIRST, item.path.parent.name).index(item.path.parent.name))
    tests: dict[str, dict[pytest.Function, set[tuple[str, str]]]] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if isinstance(item, pytest.Function) and "covering" in marks and "slow" not in marks:
            cases = tests.setdefault(f"{item.path}::{item.originalname}", {})
            cases[item] = set(_parameters(item))
    for cases in tests.values():
        missing = set().union(*cases.values())
        while missing:
            best = max(cases, key=lambda case: len(cases[case] & missing))
            missing -= cases.pop(best)
        for case in cases:
            case.add_marker(pytest.mark.slow)


def _parameters(item: pytest.Function) -> Iterator[tuple[str, str]]:
    """Names and values of a case; those that are given together are one."""
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
        values = [item.callspec.params[name.strip()] for name in names.split(",")]
        yield names, repr(values)


@pytest.fixture(autouse=True, scope="module")
def _shared_programs():
    """Runs of one recipe in a test module are compiled once; then their memory is given back."""
    with shared_programs():
        yield
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):  # glibc, which keeps what compilers have freed
        LIBC.malloc_trim(0)


@pytest.fixture
def float64():
    """Turns 64-bit types on for one test; elsewhere they are off, as they are for users."""
    with jax.enable_x64(True):
        yield
