"""Whether the kernels can be trusted on this device: they are run once against plain XLA.

Kernels are written for machines that not every developer has. A wrong result must never reach a
user, so the first program that could use a device's kernels runs them first. Beside the compiled
programs that JAX keeps, where it does, it is noted that they were right.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import Layout, from_nhwc

# Of the largest value: bfloat16 kernels, which round their results and the expanded tensor between,
# against float32. What goes wrong in a kernel is a channel, a row or a column, not a digit.
TOLERANCE = 2.0**-5
# Seconds for the test of a GPU, most of which go into compiling two dozen programs.
PATIENCE = 300.0

_flags: Any = jax.config


@functools.cache
def failure(platform: str) -> str | None:
    """Why the kernels of the default device are not to be used; None when they are right.

    Warns, once, where they are not.

    Args:
      platform: "tpu" or "gpu".
    """
    trusted = _note_of(platform)
    if trusted is not None and trusted.exists():
        return None
    if platform == "gpu":
        reason = _compare_apart(platform)
    else:  # in a thread of its own, since this one may be tracing a program
        with ThreadPoolExecutor(1) as executor:
            reason = executor.submit(_compare, platform).result()
    if reason is None and trusted is not None:
        with contextlib.suppress(OSError):
            trusted.touch()
    if reason:
        warnings.warn(
            f"the {platform} kernels are left out, plain XLA is used: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _note_of(platform: str) -> Path | None:
    """The file that says that these very kernels were right on such a device with this JAX."""
    folder = _flags.jax_compilation_cache_dir
    if not folder:
        return None
    device = jax.devices()[0]
    about = (platform, device.device_kind, device.client.platform_version, jax.__version__)
    digest = hashlib.sha256(repr(about).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return Path(folder) / f"kernels-{digest.hexdigest()}"


def _compare_apart(platform: str) -> str | None:
    """`_compare` in a process of its own: a wrong kernel may hang there, or end it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has most of the memory
    }
    if folder := _flags.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = folder
    try:
        done = subprocess.run(
            [sys.executable, "-m", "shiftnet.kernels.selftest", platform],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"their test did not end within {PATIENCE:g} s"
    except OSError as error:
        return f"their test did not start: {error}"
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return f"their test ended with {done.returncode}: {said[-1].strip() if said else 'silent'}"
    return json.loads(done.stdout.splitlines()[-1])


def _compare(platform: str) -> str | None:
    run = jax.jit(lambda call, implementation, *x: call(implementation, *x), static_argnums=(0, 1))
    try:
        for name, call, operands in _cases(platform):
            expected = run(call, "xla", *(x.astype(jnp.float32) for x in operands))
            found = run(call, platform, *operands)
            for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                difference = np.abs(a - b).max() / np.abs(a).max()
                if not difference <= TOLERANCE:
                    return f"{name} is off by {difference:.1e} of the largest value"
    except Exception as error:  # a compiler's, an unsupported device's, anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _cases(platform: str) -> Iterator[tuple[str, Callable[..., Any], tuple[jax.Array, ...]]]:
    """Name, `call(implementation, *operands)` and operands that the platform's kernels take."""
    from shiftnet.kernels.shift import shift
    from shiftnet.kernels.shift_block import shift_block
    from shiftnet.kernels.shift_pointwise import shift_pointwise

    layout: Layout = "HWCN" if platform == "tpu" else "NHWC"
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    w1, b1, w2 = array(16, 144), array(144), array(144, 16)

    def with_gradients(operation, implementation, *operands):
        f = partial(operation, layout=layout, implementation=implementation)
        y, pull = jax.vjp(f, *operands)
        return y, pull(y)

    # A GPU's larger images are divided, and each part of the chip takes several.
    sizes = [(128, 4, 8, 1), (128, 4, 8, 2), *([(256, 32, 32, 1)] if platform == "gpu" else [])]
    for images, height, width, stride in sizes:
        x, wide = (from_nhwc(array(images, height, width, c), layout) for c in (16, 144))
        block = partial(shift_block, stride=stride)
        pointwise = partial(shift_pointwise, stride=stride, relu=True, channel_order="grouped")
        for name, operation, operands in (
            ("shift_block", block, (x, w1, b1, w2)),
            ("shift_pointwise", pointwise, (wide, w2)),
            *([("shift", shift, (wide,))] if stride == 1 else []),
        ):
            about = f"{name} of {height}x{width} pixels at stride {stride}"
            yield about, partial(with_gradients, operation), operands

    from shiftnet.kernels.packed_matmul import pack, packed_matmul

    def multiply(packed, implementation, x):
        return packed_matmul(x, packed, implementation=implementation)

    shape = (4096, 8192) if platform == "gpu" else (512, 256)
    for levels in (-1.0, 1.0), (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0):
        packed = pack(rng.integers(0, len(levels), shape), levels)
        operands = (array(16, shape[0]),)
        yield f"packed_matmul of {len(levels)} levels", partial(multiply, packed), operands


if __name__ == "__main__":
    print(json.dumps(_compare(sys.argv[1])))
