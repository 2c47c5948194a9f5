"""Whether the kernels can be trusted on this device: they are run once against plain XLA.

Kernels are written for machines that not every developer has. A wrong result must never reach a
user, so the first program that could use a device's kernels runs them first, and does without those
of an operation that were wrong. Beside the compiled programs that JAX keeps, where it does, it is
noted which those are.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet.kernels.layouts import Layout, from_nhwc

# Of the largest value: bfloat16 kernels, which round their results and the expanded tensor between,
# against float32. What goes wrong in a kernel is a channel, a row or a column, not a digit.
TOLERANCE = 2.0**-5
# Seconds for a process that tests a GPU; with 16 cores beside an H200 it took 94, most of them for
# compiling two dozen programs.
PATIENCE = 300.0
OPERATIONS = ("shift_block", "shift_pointwise", "shift", "packed_matmul")

_flags: Any = jax.config


@functools.cache
def failures(platform: str) -> Mapping[str, str]:
    """Why the kernels of some operations are not to be used on the default device.

    Warns of each, once.

    Args:
      platform: "tpu" or "gpu".

    Returns:
      A reason by the operation's name; nothing of those that are right.
    """
    note = _note_of(platform)
    found = None if note is None else _noted(note)
    if found is None:
        if platform == "gpu":
            found = _compare_apart(platform)
        else:  # in a thread of its own, since this one may be tracing a program
            with ThreadPoolExecutor(1) as executor:
                reasons = executor.map(partial(_compare, platform), OPERATIONS)
                found = {o: why for o, why in zip(OPERATIONS, reasons, strict=True) if why}
        if note is not None:
            with contextlib.suppress(OSError):
                note.write_text(json.dumps(found))
    again = "" if note is None else f" (noted in {note}: without it they are tested again)"
    for operation, reason in found.items():
        warnings.warn(
            f"the {platform} kernels of {operation} are left out, plain XLA is used: "
            f"{reason}{again}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _note_of(platform: str) -> Path | None:
    """The file for what these very kernels came to on such a device with this JAX."""
    folder = _flags.jax_compilation_cache_dir
    if not folder:
        return None
    device = jax.devices()[0]
    about = (platform, device.device_kind, device.client.platform_version, jax.__version__)
    digest = hashlib.sha256(repr(about).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return Path(folder) / f"kernels-{digest.hexdigest()}"


def _noted(note: Path) -> dict[str, str] | None:
    """What the file says; None where it says nothing."""
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _compare_apart(platform: str) -> dict[str, str]:
    """`_compare` of all operations in other processes: a wrong kernel may hang, or end its own."""
    left = list(OPERATIONS)
    found: dict[str, str] = {}
    while left:
        outcomes, end = _one_process(platform, left)
        found |= {operation: reason for operation, reason in outcomes.items() if reason}
        left = [operation for operation in left if operation not in outcomes]
        if left:  # the first of them was under way
            found[left.pop(0)] = end
    return found


def _one_process(platform: str, operations: Sequence[str]) -> tuple[dict[str, str | None], str]:
    """What `_compare` says of the operations, one after the other, and how the process ended."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has most of the memory
    }
    if folder := _flags.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = folder
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "shiftnet.kernels.selftest", platform, *operations],
                stdout=answers,
                stderr=errors,
                timeout=PATIENCE,
                env=environment,
            ).returncode
            said = [line for line in _lines(errors) if line]
            end = f"their test ended with {code}: {said[-1] if said else 'silent'}"
        except subprocess.TimeoutExpired:
            end = f"their test did not end within {PATIENCE:g} s"
        except OSError as error:
            end = f"their test did not start: {error}"
        return dict(json.loads(line) for line in _lines(answers) if line.endswith("]")), end


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return [line.strip() for line in file.read().decode(errors="replace").splitlines()]


def _compare(platform: str, operation: str) -> str | None:
    """Why the operation's kernels are not to be used on the default device."""
    run = jax.jit(lambda call, implementation, *x: call(implementation, *x), static_argnums=(0, 1))
    try:
        for name, call, operands in _cases(platform, operation):
            expected = run(call, "xla", *(x.astype(jnp.float32) for x in operands))
            found = run(call, platform, *operands)
            for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                difference = np.abs(a - b).max() / np.abs(a).max()
                if not difference <= TOLERANCE:
                    return f"{name} are off by {difference:.1e} of the largest value"
    except Exception as error:  # a compiler's, an unsupported device's, anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _cases(
    platform: str, operation: str
) -> Iterator[tuple[str, Callable[..., Any], tuple[jax.Array, ...]]]:
    """What it is, `call(implementation, *operands)` and operands that the kernels take."""
    from shiftnet.kernels.packed_matmul import pack, packed_matmul
    from shiftnet.kernels.shift import shift
    from shiftnet.kernels.shift_block import shift_block
    from shiftnet.kernels.shift_pointwise import shift_pointwise

    layout: Layout = "HWCN" if platform == "tpu" else "NHWC"
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    if operation == "packed_matmul":

        def multiply(packed, implementation, x):
            return packed_matmul(x, packed, implementation=implementation)

        shape = (4096, 8192) if platform == "gpu" else (512, 256)
        for levels in (-1.0, 1.0), (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0):
            packed = pack(rng.integers(0, len(levels), shape), levels)
            yield (
                f"those of {len(levels)} levels",
                partial(multiply, packed),
                (array(16, shape[0]),),
            )
        return

    w1, b1, w2 = array(16, 144), array(144), array(144, 16)

    def with_gradients(operation, implementation, *operands):
        f = partial(operation, layout=layout, implementation=implementation)
        y, pull = jax.vjp(f, *operands)
        return y, pull(y)

    # A GPU's larger images are divided, and each part of the chip takes several.
    sizes = [(128, 4, 8, 1), (128, 4, 8, 2), *([(256, 32, 32, 1)] if platform == "gpu" else [])]
    for images, height, width, stride in sizes:
        x, wide = (from_nhwc(array(images, height, width, c), layout) for c in (16, 144))
        calls: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
            "shift_block": (partial(shift_block, stride=stride), (x, w1, b1, w2)),
            "shift_pointwise": (
                partial(shift_pointwise, stride=stride, relu=True, channel_order="grouped"),
                (wide, w2),
            ),
        }
        if stride == 1:
            calls["shift"] = (shift, (wide,))
        if operation in calls:
            call, operands = calls[operation]
            about = f"those of {height}x{width} pixels at stride {stride}"
            yield about, partial(with_gradients, call), operands


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps([name, _compare(sys.argv[1], name)]), flush=True)
