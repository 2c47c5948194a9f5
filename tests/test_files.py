"""Paths mean what people typed, and a file that is replaced is never half there."""

import os
from pathlib import Path

import pytest

from shiftnet.errors import UserError
from shiftnet.files import expand_pattern, path_of, write_atomically


def test_a_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/runs/a", "--workdir") == tmp_path / "runs/a"
    assert path_of("~", "--workdir") == tmp_path


@pytest.mark.parametrize("typed", ["runs/a", "/x/y", "a~b", "c:/d", "a\\b[1]*?", "猫 {}#%:"])
def test_other_paths_stay_as_typed(typed):
    assert path_of(typed, "--workdir") == Path(typed)


def test_a_tilde_behind_a_dot_is_a_name_however_often_it_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = path_of("./~/x", "--ckpt")
    assert path == tmp_path / "~" / "x"
    assert path_of(path, "--ckpt") == path_of(str(path), "--ckpt") == path


@pytest.mark.parametrize(
    "url", ["gs://bucket/run", "https://host/net.pth", "file:///runs", "s3://"]
)
def test_a_url_is_no_local_directory(url):
    with pytest.raises(UserError, match=r"--workdir must be a local path, found the URL '.*://"):
        path_of(url, "--workdir")


def test_an_unknown_home_directory_is_named():
    with pytest.raises(UserError, match="--ckpt is '~no-such-user/x', but there is no such home"):
        path_of("~no-such-user/x", "--ckpt")


def test_a_pattern_stands_for_what_matches_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b", "a", "c.txt"):
        (tmp_path / name).touch()
    assert expand_pattern("~/?", "--ckpt") == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(UserError, match=r"no file matches --ckpt '~/d\*'"):
        expand_pattern("~/d*", "--ckpt")


@pytest.mark.parametrize("name", ["run[1]", "run*", "what?"])
def test_an_existing_name_is_no_pattern(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "run1").touch()
    assert expand_pattern(tmp_path / name, "--ckpt") == [tmp_path / name]


def test_a_missing_file_is_left_to_its_reader(tmp_path):
    assert expand_pattern(tmp_path / "none", "--ckpt") == [tmp_path / "none"]


@pytest.mark.parametrize("content", ["é\n", b"\x00\xff"])
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("before")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_keeps_the_file_as_it_was(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("before")
    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (Path, "replace")), full)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path, fsync, seen = tmp_path / "file", os.fsync, []
    path.write_text("before")

    def look(descriptor):
        fsync(descriptor)
        seen.append(path.read_text())

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, "after")
    assert (seen, path.read_text()) == (["before"], "after")


def test_a_missing_directory_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*none/file: No such file or directory"):
        write_atomically(tmp_path / "none/file", "")


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "content")
    assert os.read(reader, 100) == b"content"
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
    os.close(reader)
