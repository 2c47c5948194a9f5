"""What `train.py` prints at a run's end."""

import shlex
import sys
from pathlib import Path

import pytest

from shiftnet.cli import train


@pytest.mark.core
@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("train.py", ["python", "train.py"]),
        ("/usr/bin/shiftnet", ["shiftnet", "train"]),
        ("/a/shiftnet/__main__.py", ["python", "-m", "shiftnet", "train"]),
    ],
)
def test_the_hint_on_how_to_continue_is_the_whole_command_for_a_shell(program, start, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    given = ["--config", "my recipe.py:expansion=3", "--config.data.mean=(0.5, 0.5, 0.5)"]
    hint = train._command(given, Path("runs/my run"))
    assert shlex.split(hint) == [*start, *given, "--workdir=runs/my run"]
    for workdir in (["--workdir=a"], ["--workdir", "a"]):
        assert shlex.split(train._command([*given, *workdir], Path("a"))) == [
            *start,
            *given,
            *workdir,
        ]
