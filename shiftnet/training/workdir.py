"""A run's working directory: it belongs to one recipe, and to one run at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

import shiftnet.config
from shiftnet.errors import UserError

RECIPE, LOCK = "config.json", "lock"


@contextlib.contextmanager
def claimed(
    workdir: Path, config: Any, ignore: Sequence[str] = shiftnet.config.RESUMABLE
) -> Iterator[None]:
    """Makes `workdir` this recipe's, or checks that it is; within, no other run can have it.

    In a job of several processes the first one does that, and the others wait for it.

    Args:
      workdir: made where it does not exist.
      config: the recipe.
      ignore: fields in which it may differ from the one that is there.

    Raises:
      UserError: where it holds a run of another recipe (it names the fields that differ), another
        run is in it now, or it cannot be written.
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
    meet("workdir checked")
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(workdir))
                temporary = path.with_suffix(".tmp")
                temporary.write_text(shiftnet.config.to_json(config) + "\n")
                temporary.replace(path)
            except OSError as error:
                raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error
        meet("workdir claimed")
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Holds the directory's lock, which the system takes back when the process ends, however."""
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir {workdir} is in use by another run ({file.read().strip()}): "
                "take another, or wait for it to end"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def meet(where: str) -> None:
    """Waits until all processes of the job are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
