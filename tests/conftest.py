"""How every test runs: on the CPU as two devices, and with nothing that JAX would guess."""

import gc
import os
import tempfile

# Before JAX is imported; the commands that tests start and the other test process inherit both.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The default of glibc. With it commands that run in here leave the memory of the tests alone.
os.environ.setdefault("MALLOC_TOP_PAD_", "131072")
# Many tests train the same small network: compile it once in a run of the tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="shiftnet-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest
from hypothesis import settings

# Two devices, so that code which only works on one is noticed. Not through the environment:
# a command that a test starts sees the machine as it is.
jax.config.update("jax_num_cpu_devices", 2)
# A product of float32 and bfloat16, or float32 and int32, is an error unless it is written out.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Most of what tests allocate lives as long as they run: looking for garbage at the usual rate takes
# a tenth of their time.
gc.set_threshold(100_000, 20, 100)

# The same examples everywhere, so that a failure is everyone's; compiling makes any deadline wrong.
settings.register_profile("shiftnet", derandomize=True, deadline=None)
settings.load_profile("shiftnet")


@pytest.fixture
def float64():
    """Turns 64-bit types on for one test; elsewhere they are off, as they are for users."""
    with jax.enable_x64(True):
        yield
