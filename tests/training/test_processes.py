"""What a process can do without."""

from pathlib import Path

import jax
import pytest

from shiftnet.training.processes import use_compilation_cache


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_below_the_home_directory(tmp_path, monkeypatch, unset):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache()
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
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
