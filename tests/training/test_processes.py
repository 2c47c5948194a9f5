"""What a process can do without."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from shiftnet.training.processes import _use_compilation_cache


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_below_the_home_directory(tmp_path, monkeypatch, unset):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    _use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/.cache/shiftnet/compiled"


@pytest.mark.parametrize("home", ["a file", "none"])
def test_nothing_is_kept_without_a_home_directory(tmp_path, monkeypatch, unset, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:  # as with a container's unknown user

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    _use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


FAULTS = """
import resource
from shiftnet.data.workers import keep_freed_memory
keep_freed_memory()
b"x" * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_memory_is_used_again_without_page_faults():
    """Five arrays of 64 MiB; those of before are 81,920 pages of 4 KiB."""

    def faults(**variables: str) -> int:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        command = [sys.executable, "-c", FAULTS]
        run = subprocess.run(
            command, env={**environment, **variables}, capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert faults() < 1000
    assert faults(MALLOC_ARENA_MAX="2") > 10_000  # the user's own settings stand
