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


ENDINGS = {
    "while it starts": """
with errors.interrupts_end_at_once():
    signal.raise_signal(signal.SIGINT)
    threading.Event().wait()
""",
    "gone over": """
class Ungrateful:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
@errors.reported
def main():
    with errors.interrupts_end():
        Ungrateful()
        threading.Event().wait()
sys.exit(main())
""",
    "taken for bad input": """
@errors.reported
def command():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise errors.UserError("the file is damaged")
@errors.reported
def main():
    with errors.interrupts_end():
        return command()
sys.exit(main())
""",
    "what is closed takes long": """
errors.GRACE = 0.1
with errors.interrupts_end():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        threading.Event().wait()
""",
    "turned into another error": """
@errors.reported
def main():
    with errors.interrupts_end():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("a module could not be imported")
sys.exit(main())
""",
}


@pytest.mark.parametrize("when", ENDINGS)
def test_ctrl_c_is_one_line_whatever_it_meets(when):
    program = f"import signal, sys, threading\nfrom shiftnet import errors\n{ENDINGS[when]}"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_a_sentence():
    with open("/dev/full", "w") as full:
        command = COMMAND.replace("jax.devices()", "'x' * 100000")
        done = subprocess.run(
            [sys.executable, "-c", command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
    assert done.returncode == 2
    assert done.stderr == "error: cannot write: No space left on device\n"
