"""What the tests of foreign files share: reading bytes, in a folder where nothing may appear."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shiftnet.errors import UserError
from shiftnet.interchange import UNFORESEEN, Foreign, read


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The current folder of a test; files that hostile pickles would make are looked for in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir()), "reading a file made another"


@pytest.fixture
def read_bytes(tmp_path: Path, empty_folder: Path) -> Callable[[bytes], Foreign]:
    def run(data: bytes) -> Foreign:
        (tmp_path / "file.t7").write_bytes(data)
        return read(tmp_path / "file.t7")

    return run


@pytest.fixture
def refusal(read_bytes: Callable[[bytes], Foreign]) -> Callable[[bytes], str]:
    """The reason for which a file is refused, which it must be, by a check made for it."""

    def run(data: bytes) -> str:
        with pytest.raises(UserError) as caught:
            read_bytes(data)
        message = str(caught.value)
        assert "file.t7: refused, " in message
        assert "\n" not in message
        assert UNFORESEEN not in message
        assert len(message) < 400
        return message.partition("file.t7: refused, ")[2]

    return run
