"""Compiles the operations that are written in C++ for this machine, at their first use.

The library is kept in `~/.cache/shiftnet` (or `$XDG_CACHE_HOME/shiftnet`), under a name that
depends on the source, jaxlib, the compiler and the processor's instruction set, so that it is never
out of date; it ends in its SHA-256, by which a damaged one is told and made anew. Compilation needs
a C++17 compiler, `$CXX` or the first of c++, g++ and clang++ that is found, and takes about 25
seconds on two cores, once; the headers are part of JAX. Without a compiler, or with
SHIFTNET_NATIVE=0, these operations run in plain XLA.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

try:
    import fcntl
except ImportError:  # not Unix: two processes may compile at the same time, which does no harm
    fcntl = None  # type: ignore[assignment]

HERE = Path(__file__).parent
SOURCES = tuple(
    HERE / name / f"{name}.cc" for name in ("conv", "shift_block", "batch_norm", "covariance")
)
HEADERS = (HERE / "native.h", HERE / "products.h")
HANDLERS = (
    "shiftnet_conv",
    "shiftnet_conv_input_gradient",
    "shiftnet_conv_weight_gradient",
    "shiftnet_shift_block",
    "shiftnet_shift_block_gradients",
    "shiftnet_batch_norm",
    "shiftnet_batch_norm_gradients",
    "shiftnet_covariance",
)
# What `call` takes; the C++ has float32 only.
DTYPES = ("float32", "bfloat16", "float16")
RELU = {False: 0, True: 1, "last": 2}  # `out_relu` of an operation as `Relu` of native.h
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str | None


@functools.cache
def load() -> Outcome:
    """Compiles the library if needed, loads it, and registers its functions with XLA."""
    if os.environ.get("SHIFTNET_NATIVE", "1") in ("", "0"):
        return Outcome(None, "SHIFTNET_NATIVE=0 leaves out what a C++ compiler has to build")
    failed = "compiled"
    try:
        path = _built(_compiler())
        failed = "loaded"
        library = ctypes.CDLL(str(path))
        for handler in HANDLERS:
            capsule = jax.ffi.pycapsule(getattr(library, handler))
            jax.ffi.register_ffi_target(handler, capsule, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        output = getattr(error, "stderr", None) or str(error)
        lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
        reason = f"the C++ was not {failed}: {(lines or ['no reason given'])[0].strip()}"
        log.warning("the CPU runs plain XLA, which is several times slower: %s", reason)
        return Outcome(None, reason)
    return Outcome(library, None)


def unsupported(dtype: np.dtype) -> str | None:
    """Returns why there is no `call` for a dtype, in one clause, or None."""
    if dtype not in DTYPES:
        return f"the kernel needs {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {dtype}"
    return load().reason


def call(name: str, results: Any, *arrays: jax.Array, **settings: Any) -> Any:
    """Calls a function of the library, which computes in float32.

    Args:
      name: of `HANDLERS`.
      results: `jax.ShapeDtypeStruct` of the result, or a tuple of them; of a dtype in `DTYPES`.
      arrays: of such dtypes.
      settings: the function's attributes.
    """
    wide = jax.tree.map(lambda result: result.update(dtype=jnp.float32), results)
    # The C++ loops over the leading axes that `jax.vmap` adds.
    function = jax.ffi.ffi_call(name, wide, vmap_method="broadcast_all")
    found = function(*(array.astype(jnp.float32) for array in arrays), **settings)
    return jax.tree.map(lambda array, result: array.astype(result.dtype), found, results)


def _compiler() -> list[str]:
    """Returns the compiler's command.

    Raises:
      FileNotFoundError: if there is no compiler.
    """
    if named := os.environ.get("CXX"):
        try:
            words = shlex.split(named)
        except ValueError:  # a quote without its other
            words = []
        if not words:
            raise FileNotFoundError(f"CXX is {named!r}, which is no command")
        return words
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise FileNotFoundError("there is no C++ compiler (c++, g++ or clang++; or name one in CXX)")


def _built(compiler: list[str]) -> Path:
    """Returns the library's path, after compiling it if it does not exist or is damaged."""
    name = f"native-{_digest(compiler)}.so"
    with contextlib.suppress(OSError, RuntimeError):
        if _is_whole(path := _preferred() / name):  # which may be where nothing can be written
            return path
    folder = _cache()
    path = folder / name
    with _lock(path.with_suffix(".lock")):
        if _is_whole(path):
            return path
        log.info("compiling the CPU's operations, once on this machine: about 25 seconds")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / path.name
            include = ("-isystem", jax.ffi.include_dir(), f"-I{HERE}")

            def compile_source(source: Path) -> str:
                made = str(Path(place) / f"{source.stem}.o")
                _output([*compiler, *FLAGS, *include, "-c", str(source), "-o", made])
                return made

            with ThreadPoolExecutor() as pool:  # one after the other takes twice as long
                objects = list(pool.map(compile_source, SOURCES))
            _output([*compiler, *FLAGS, "-shared", *objects, "-o", str(made)])
            with made.open("ab") as library:  # the loader ignores what follows the last section
                library.write(hashlib.sha256(made.read_bytes()).digest())
            made.replace(path)  # atomic
    return path


def _is_whole(path: Path) -> bool:
    """Tells whether a library exists as it was made; loading half of one would end the process."""
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _digest(compiler: list[str]) -> str:
    """Hashes what the library depends on; macros identify the compiler and the instructions."""
    macros = _output([*compiler, *FLAGS[:3], "-dM", "-E", "-x", "c++", os.devnull])
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    parts = (*texts, macros, *compiler, *FLAGS, version("jaxlib"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace"
    ).stdout


def _preferred() -> Path:
    """Returns the folder in which libraries are kept.

    Raises:
      RuntimeError: if there is no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "shiftnet")


def _cache() -> Path:
    """Returns a writable folder: one for this process alone if the home is not writable."""
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home, or a read-only one
        folder = _preferred()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="shiftnet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Excludes other processes."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
