"""What a process needs before it trains: the other processes of its job, compiled programs."""

import contextlib
import functools
import glob
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from shiftnet.data.workers import keep_freed_memory
from shiftnet.errors import UserError

# How long after a process went silent the others are stopped, in seconds (JAX's default is 100).
HEARTBEAT_TIMEOUT = 60

# Older versions of JAX do not declare what the configuration holds.
_flags: Any = jax.config


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a job: those of the arguments, or those that the launcher names.

    JAX finds the job by itself under SLURM (`srun` with several tasks), in an Indexed Job of
    Kubernetes (with `pip install "jax[k8s]"`), and on Cloud TPU, on GKE or not. Without any of
    those this process is alone.

    Raises:
      UserError: where only some of the arguments are given, or the others cannot be reached.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id go together")
    if not all(given) and not _launched():
        return
    if coordinator is not None:
        _check(coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the job's processes could not be joined ({reason}): "
            "give --coordinator, --num-processes and --process-id"
        ) from error


def _check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise UserError(
            f"--coordinator must be HOST:PORT with a port from 1 to 65535, found {coordinator!r}"
        )
    if num_processes is None or not 0 < num_processes < 2**20:
        raise UserError(f"--num-processes must be from 1 to {2**20 - 1}, found {num_processes}")
    if process_id is None or not 0 <= process_id < num_processes:
        raise UserError(f"--process-id must be from 0 to {num_processes - 1}, found {process_id}")


def _launched() -> bool:
    """Whether a launcher that JAX knows started this as one of several processes."""
    environment = os.environ
    if "SLURM_STEP_NODELIST" in environment:
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    # A TPU's chips, as its virtual machine shows them; there JAX asks who the others are. A process
    # that is told to use another platform does not take part.
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and (_flags.jax_platforms or "tpu").split(",")[0] == "tpu"


def leaving(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command's `main`: after an error, a process of several ends at once.

    Otherwise it would wait at its exit, minutes long, for those that it has lost.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        code = main(*args, **kwargs)
        if code in (1, 2) and jax.distributed.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    return wrapper


def set_up() -> None:
    """What commands do before they compute: compiled programs are kept, and so is freed memory."""
    _use_compilation_cache()
    keep_freed_memory()


def _use_compilation_cache() -> None:
    """Keeps compiled programs in `~/.cache/shiftnet`, unless JAX was told where.

    A run that starts again then need not wait for the compiler. `JAX_COMPILATION_CACHE_DIR` names
    another place, `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. Without a home directory that
    can be written there is none.
    """
    if _flags.jax_compilation_cache_dir is not None:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "shiftnet" / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))
