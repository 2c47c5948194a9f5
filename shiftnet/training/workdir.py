"""A run's working directory: it belongs to one recipe, and to one run at a time."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

import shiftnet.config
from shiftnet.config import Config
from shiftnet.errors import UserError
from shiftnet.files import write_atomically

RECIPE, ENVIRONMENT, LOCK = "config.json", "environment.json", "lock"


class InUse(UserError):
    """Another process has the lock of a working directory."""


@contextlib.contextmanager
def locked(
    workdir: Path, config: Config, ignore: Sequence[str] = shiftnet.config.RESUMABLE
) -> Iterator[None]:
    """Checks that `workdir` is this recipe's or new; within, no other run can have it.

    In a job of several processes the first one locks it, and the others wait for that.

    Args:
      workdir: made where it does not exist.
      config: the recipe.
      ignore: fields in which it may differ from the one that is there.

    Raises:
      UserError: where it holds a run of another recipe (it names the fields that differ), or it
        cannot be written.
      InUse: where another run is in it now.
    """
    path = workdir / RECIPE
    if path.exists():
        try:
            before = shiftnet.config.from_json(path.read_text())
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        changed = shiftnet.config.differences(before, config, ignore=ignore)
        if changed:
            raise UserError(
                f"{workdir} holds a run of another recipe, with {'; '.join(changed)}: "
                "take another --workdir, or the same values"
            )
    barrier("workdir checked")
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            with _writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(workdir / LOCK, workdir))
        barrier("workdir locked")
        yield


def write_recipe(workdir: Path, config: Config) -> None:
    """Writes the recipe that a directory's run now has; the first process of a job does.

    Raises:
      UserError: where it cannot be written.
    """
    if jax.process_index() == 0:
        with _writing(workdir):
            workdir.mkdir(exist_ok=True)
            write_atomically(workdir / RECIPE, shiftnet.config.to_json(config) + "\n")


def write_environment(workdir: Path, step: int, environment: Mapping[str, Any]) -> None:
    """Adds to a directory's list what its run is trained with from a step on, where that changed.

    Raises:
      UserError: where it cannot be written.
    """
    if jax.process_index() == 0:
        path = workdir / ENVIRONMENT
        try:
            known = [dict(entry) for entry in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError, RecursionError):
            known = []
        before = {k: v for k, v in known[-1].items() if k != "from_step"} if known else None
        if before != environment:
            known.append({"from_step": step, **environment})
            with _writing(workdir):
                write_atomically(path, json.dumps(known, indent=1) + "\n")


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error


@contextlib.contextmanager
def lock(path: Path, workdir: Path) -> Iterator[None]:
    """Locks a file within, made where it is missing; the system unlocks it if the process dies.

    Args:
      path: the file.
      workdir: the directory that it stands for.

    Raises:
      InUse: where another process has locked it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUse(
                f"{workdir} is in use by another run ({file.read().strip()}): "
                "take another --workdir, or wait for it to end"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def barrier(name: str) -> None:
    """Waits until all processes of the job are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
