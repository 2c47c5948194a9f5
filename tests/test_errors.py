"""Commands say in one sentence what is wrong with the machine they run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import sys, jax
from shiftnet.errors import reported
sys.exit(reported(lambda: print(jax.devices()) or 0)())
"""


@pytest.mark.parametrize("platform", ["cuda", "no_such_platform"])
def test_a_platform_that_is_not_there_is_named(platform):
    if platform == "cuda" and Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    environment = os.environ | {"JAX_PLATFORMS": platform}
    process = subprocess.run(
        [sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 2
    *_, line = process.stderr.splitlines()
    assert line.startswith(f"error: JAX finds no device of JAX_PLATFORMS={platform}")
    assert "Traceback" not in process.stderr
