"""What a run is trained with: the device, the packages and the code."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from shiftnet.data.workers import affinity

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def describe() -> dict[str, Any]:
    """Describes on what and with what code this process trains, as it is when it begins.

    Returns:
      `device`; `versions`, by package; `commit`, of the code, None where it is not known.
    """
    return {
        "device": device(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "commit": _commit(),
    }


def device() -> str:
    """Names the kind of the devices; of a CPU, the cores that this process may use."""
    kind = jax.local_devices()[0].device_kind
    if kind != "cpu":
        return kind
    return f"CPU, {affinity()} cores ({platform.machine()})"


def _commit() -> str | None:
    """The checkout's commit, marked where code or recipes that git knows differ from it.

    Or the value of SHIFTNET_COMMIT, for a copy that has no history, or another one.
    """
    if commit := os.environ.get("SHIFTNET_COMMIT"):
        return commit
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes, _ = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "-uno", ":/shiftnet", ":/configs"),
                ("ls-files", "--error-unmatch", __file__),  # it may be another project's checkout
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if changes.strip() else "")
