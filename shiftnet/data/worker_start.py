"""What a process that decodes images imports first, in place of the run's own script.

Grain imports JAX, for its profiler, where it finds it. A worker needs none: half a second and the
memory of JAX's modules are saved in each.
"""

import sys
from importlib import import_module
from multiprocessing import spawn
from typing import Any

from absl import logging

NAME = "grain-process-prefetch"  # how Grain's names of its processes begin

_preparation_data = spawn.get_preparation_data


def install() -> None:
    """Lets Grain's workers, of all processes that are spawned, start with this module."""
    spawn.get_preparation_data = _without_script


def _without_script(name: str) -> dict[str, Any]:
    data = _preparation_data(name)
    if name.startswith(NAME):
        data.pop("init_main_from_path", None)
        data["init_main_from_name"] = __name__
    return data


if __name__ == "__mp_main__":  # in a worker
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Grain warns of a missing JAX
    sys.modules["jax"] = None  # type: ignore[assignment]
    import_module("grain")
    del sys.modules["jax"]
    logging.set_verbosity(verbosity)
