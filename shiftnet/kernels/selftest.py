"""Compares the kernels with plain XLA once on each kind of device, and disables those that differ.

Kernels are written for machines that not every developer has. A wrong result must never reach a
user, so a device's kernels are tested before their first use, and an operation whose kernels differ
from plain XLA runs without them. The outcome is stored in JAX's compilation cache directory, if
there is one. A test that crashed or timed out disables the kernels for this process only: the
machine may have been busy.

`Operation.cases` defines what is tested, and with which operands.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# Relative to the largest value. The kernels compute in bfloat16, rounding their results and the
# expanded tensor, and are compared with float32. A wrong kernel is off by a channel, a row or a
# column, not by a digit.
TOLERANCE = 2.0**-5
# Seconds for a process that tests a GPU. On an H200 with 16 CPU cores it took 94, most of them to
# compile two dozen programs.
PATIENCE = 300.0

_flags: Any = jax.config


class Testable(Protocol):
    """The parts of an `Operation` that a test uses."""

    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> Any: ...
    @property
    def kernels(self) -> Mapping[str, Any]: ...
    @property
    def cases(self) -> Sequence[Any]: ...
    def __call__(
        self, *operands: Any, implementation: str | None = None, **settings: Any
    ) -> Any: ...


class Outcome(NamedTuple):
    """The outcome of a test.

    Attributes:
      reason: why the kernels must not be used; None if they are correct.
      lasting: whether another test would have the same outcome; not known of crashes and time-outs.
    """

    reason: str | None
    lasting: bool


_outcomes: dict[tuple[str, str], Outcome] = {}  # by platform and operation
_answers: dict[tuple[str, str], str | None] = {}  # the reasons that programs were traced with


def failure(operation: Testable) -> str | None:
    """Returns why an operation's kernels must not be used on the default device, or None.

    Tests them if needed, except in a job of several processes, which might come to different
    outcomes for the same program. Kernels of an operation without cases are used.
    """
    key = jax.default_backend(), operation.name
    if not operation.cases:
        return None
    if key not in _outcomes and jax.process_count() == 1:
        _decide([operation], again=False)
    if key in _outcomes:
        _answers[key] = _outcomes[key].reason
    else:
        _answers[key] = "this job of many processes did not call shiftnet.kernels.operation.decide"
    return _answers[key]


def decide(operations: Iterable[Testable], *, again: bool = False) -> Mapping[str, str]:
    """Tests operations on the default device; in a job of several processes the first one does.

    Warns of kernels that are disabled. Programs that were traced with another outcome are retraced.

    Args:
      operations: what to test, the same in all processes.
      again: whether to repeat tests that this process or an earlier one has done.

    Returns:
      The reason why kernels are disabled, by the operation's name; empty on a CPU.
    """
    platform = jax.default_backend()
    tested = [o for o in operations if platform != "cpu" and platform in o.kernels and o.cases]
    if jax.process_count() == 1:
        _decide(tested, again=again)
    else:
        if jax.process_index() == 0:
            _decide(tested, again=again)
        _outcomes.update(_from_first(_outcomes))
    if any(_outcomes[key].reason != _answers[key] for key in _outcomes.keys() & _answers.keys()):
        _answers.clear()
        jax.clear_caches()
    found = {o.name: _outcomes[platform, o.name].reason for o in tested}
    return {name: reason for name, reason in found.items() if reason}


def _from_first(outcomes: dict[tuple[str, str], Outcome]) -> dict[tuple[str, str], Outcome]:
    """Returns the outcomes of the job's first process."""
    text = json.dumps([[*key, *outcome] for key, outcome in outcomes.items()]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text[:size].ljust(size), np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
    return {(platform, name): Outcome(*outcome) for platform, name, *outcome in json.loads(text)}


def _decide(operations: Sequence[Testable], *, again: bool) -> None:
    """Fills `_outcomes` for the default device, from stored outcomes or by tests."""
    platform = jax.default_backend()
    file = _stored_in(platform)
    if again:
        stored: dict[str, str | None] = {}
        for operation in operations:
            _outcomes.pop((platform, operation.name), None)
    else:
        stored = {} if file is None else _stored(file)
    for operation in operations:
        if operation.name in stored:
            known = Outcome(stored[operation.name], lasting=True)
            _outcomes.setdefault((platform, operation.name), known)
    left = [o for o in operations if (platform, o.name) not in _outcomes]
    if not left:
        return
    if platform == "gpu":
        found = _compare_apart(platform, left)
    else:  # in a thread of its own, since this one may be tracing a program
        with ThreadPoolExecutor(1) as executor:
            outcomes = executor.map(lambda operation: compare(platform, operation), left)
            found = {o.name: outcome for o, outcome in zip(left, outcomes, strict=True)}
    _outcomes.update({(platform, name): outcome for name, outcome in found.items()})
    if file is not None:
        stored = _stored(file) | {o: found.reason for o, found in found.items() if found.lasting}
        with contextlib.suppress(OSError):
            file.write_text(json.dumps(stored))
    for name, (reason, lasting) in found.items():
        if reason:
            where = f"; stored in {file}" if lasting and file is not None else ""
            warnings.warn(
                f"the {platform} kernels of {name} are left out, plain XLA is used: {reason} "
                f"(shiftnet.kernels.operation.decide(again=True) tests them again{where})",
                RuntimeWarning,
                stacklevel=2,
            )


def _stored_in(platform: str) -> Path | None:
    """Returns the file for the outcomes of these sources with this JAX on this kind of device."""
    folder = _flags.jax_compilation_cache_dir
    if not folder:
        return None
    device = jax.devices()[0]
    about = (platform, device.device_kind, device.client.platform_version, jax.__version__)
    digest = hashlib.sha256(repr(about).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return Path(folder) / f"kernels-{digest.hexdigest()}"


def _stored(file: Path) -> dict[str, str | None]:
    """Reads the file; returns nothing if it is missing or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _compare_apart(platform: str, operations: Sequence[Testable]) -> dict[str, Outcome]:
    """Calls `compare` in other processes, since a wrong kernel may hang or crash its process."""
    left = list(operations)
    found: dict[str, Outcome] = {}
    while left:
        outcomes, end = _one_process(platform, left)
        found |= outcomes
        left = [operation for operation in left if operation.name not in outcomes]
        if left:  # the process was testing the first of them
            found[left.pop(0).name] = Outcome(end, lasting=False)
    return found


def _one_process(platform: str, operations: Sequence[Testable]) -> tuple[dict[str, Outcome], str]:
    """Tests operations in one process; returns their outcomes, and how the process ended."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has most of the memory
    }
    if folder := _flags.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = folder
    places = [f"{operation.reference.__module__}:{operation.name}" for operation in operations]
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "shiftnet.kernels", platform, *places],
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
        found = [json.loads(line) for line in _lines(answers) if line.endswith("]")]
        return {name: Outcome(*outcome) for name, *outcome in found}, end


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return [line.strip() for line in file.read().decode(errors="replace").splitlines()]


def compare(platform: str, operation: Testable) -> Outcome:
    """Compares an operation's kernels with plain XLA in all its cases, gradients included."""

    def with_gradients(implementation, settings, runs, *operands):
        def call(*operands):
            return operation(*operands, implementation=implementation, **dict(settings))

        y, pull = jax.vjp(jax.vmap(call) if runs else call, *operands)
        return y, pull(y)

    run = jax.jit(with_gradients, static_argnums=(0, 1, 2))
    random = np.random.default_rng(0)
    try:
        for shapes, settings, runs in operation.cases:
            if runs and platform != "gpu":  # runs together take no other kernels
                continue
            stack = (runs,) if runs else ()
            operands = [
                None
                if shape is None
                else jnp.asarray(random.normal(size=(*stack, *shape)), jnp.bfloat16)
                for shape in shapes
            ]
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
            chosen = tuple(settings.items()), runs
            expected = run("xla", *chosen, *wide)
            found = run(platform, *chosen, *operands)
            for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                difference = np.abs(a - b).max() / np.abs(a).max()
                if not difference <= TOLERANCE:
                    about = f"with x {(*stack, *(shapes[0] or ()))} and {dict(settings)}"
                    reason = f"{about} they are off by {difference:.1e} of the largest value"
                    return Outcome(reason, lasting=True)
    except Exception as error:  # from a compiler, an unsupported device, anything
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Outcome(reason, lasting=False)
    return Outcome(None, lasting=True)
