"""`shiftnet predict`: classes of people's images, as text, JSON, CSV and contact sheets."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import shiftnet
from shiftnet import packing
from shiftnet.cli import predict
from tests.test_packing import note, small


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network and a folder of photos: two in it, one in a folder within, and a damaged file."""
    place = tmp_path_factory.mktemp("predict")
    network, recipe = small()
    packing.write(place / "net.safetensors", network, note(recipe))
    rng = np.random.default_rng(0)
    (place / "photos" / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "more/c & d.png"):
        image = Image.fromarray(rng.integers(0, 256, (50, 40, 3), np.uint8))
        image.save(place / "photos" / name)
    (place / "photos" / "bad.jpg").write_bytes(b"no image")
    (place / "photos" / "notes.txt").write_text("no image either")
    return place


def run(place, capsys, *arguments, code=0):
    capsys.readouterr()
    words = [str(place / word) if isinstance(word, str) else word[0] for word in arguments]
    assert predict.main([str(place / "net.safetensors"), *words]) == code
    return capsys.readouterr()


def option(*words):
    """Words of the command line that are not paths within the place."""
    return [(word,) for word in words]


def predictions(printed):
    """What is behind the names."""
    return [line.partition(": ")[2] for line in printed.split("\n")[:-1]]


@pytest.fixture(scope="module")
def expected(place):
    """Each file's three most probable classes."""
    files = [str(place / "photos" / name) for name in ("a.png", "b.jpg", "more/c & d.png")]
    return dict(
        zip(files, shiftnet.load(place / "net.safetensors").predict(files).top(3), strict=True)
    )


def test_folders_are_searched_and_a_damaged_file_stops_nothing(place, capsys, expected):
    found = run(place, capsys, "photos", code=1)
    assert [line.partition(": ")[0] for line in found.out.splitlines()] == list(expected)
    (name, share), *_ = expected[str(place / "photos/a.png")]
    assert found.out.splitlines()[0].startswith(f"{place}/photos/a.png: {name} {share:.1%}  ")
    assert found.err == (
        f"error: {place}/photos/bad.jpg cannot be decoded (it is no image of a known kind)\n"
    )


def test_programs_read_json_and_csv(place, capsys, expected):
    rows = json.loads(run(place, capsys, "photos", *option("--json"), code=1).out)
    assert [row["file"] for row in rows if "error" not in row] == list(expected)
    assert [row["file"] for row in rows if "error" in row] == [str(place / "photos/bad.jpg")]
    for row in rows:
        if "error" not in row:
            assert [each["class"] for each in row["predictions"]] == [
                name for name, _ in expected[row["file"]]
            ]
    head, *rows = csv.reader(
        io.StringIO(run(place, capsys, "photos", *option("--csv", "--top", "1"), code=1).out)
    )
    assert head == ["file", "class_1", "probability_1"]
    for file, name, share in rows:
        assert name == expected[file][0][0]
        assert float(share) == pytest.approx(expected[file][0][1], rel=1e-3)


def test_a_list_of_files_comes_on_standard_input(place, capsys, monkeypatch, expected):
    files = [str(place / "photos" / "b.jpg"), str(place / "photos" / "a.png")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(files) + "\n\n"))
    out = run(place, capsys, *option("-")).out
    assert [line.partition(": ")[0] for line in out.splitlines()] == files


def test_files_with_odd_names_are_those_that_were_named(place, capsys, monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    names = ("~/a.png", "b\u2028c.png", "-")
    for folder in (home, here / "~"):
        folder.mkdir(parents=True)
    shutil.copy(place / "photos/a.png", home)
    for name in names:
        shutil.copy(place / "photos/b.jpg", here / name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (expected,) = predictions(run(place, capsys, "photos/b.jpg").out)
    for words in (["./~/a.png"], ["."], ["./b\u2028c.png"]):
        assert set(predictions(run(place, capsys, *option(*words)).out)) == {expected}
    monkeypatch.setattr("sys.stdin", io.StringIO("./~/a.png\nb\u2028c.png\n-\n"))
    assert predictions(run(place, capsys, *option("-")).out) == [expected] * 3
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "standard input names none" in run(place, capsys, *option("-"), code=2).err


def test_a_name_of_other_bytes_on_standard_input_is_a_sentence(place, capsys, monkeypatch):
    strict = io.TextIOWrapper(io.BytesIO(b"none\xff.png\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", strict)
    assert "does not exist" in run(place, capsys, *option("-"), code=2).err


def test_contact_sheets_show_the_images(place, capsys, tmp_path, expected):
    sheets = option("--html", str(tmp_path / "sheet.html"), "--png", str(tmp_path / "sheet.png"))
    run(place, capsys, "photos", *sheets, code=1)
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<img src=") == 3
    assert page.count("<meter ") == 9
    assert "<b>c &amp; d.png</b>" in page
    assert "http" not in page
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    photo = Image.open(place / "photos/a.png")
    seen = photo.resize((160, 200), Image.Resampling.BILINEAR).crop((0, 20, 160, 180))
    np.testing.assert_array_equal(pixels[12:172, 12:172], np.asarray(seen))


def test_a_sheet_stays_where_no_image_could_be_read(place, capsys, tmp_path):
    sheet, broken = tmp_path / "sheet.html", tmp_path / "broken.png"
    sheet.write_text("of before")
    broken.write_bytes(b"")
    run(place, capsys, str(broken), *option("--html", str(sheet)), code=1)
    assert sheet.read_text() == "of before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg"], "none.jpg does not exist"),
        (["photos", *option("--top", "0")], "--top must be at least 1, found 0"),
        (["photos", *option("--html", "sheet.txt")], "--html sheet.txt must end in .html"),
        (["empty"], "empty has no images"),
        (["photos", *option("--png"), "photos/a.png"], "a.png is one of the images to classify"),
        (["photos", *option("--html"), "no/a.html"], "must lie in a directory that exists"),
    ],
)
def test_bad_input_is_a_sentence(place, capsys, arguments, message):
    (place / "empty").mkdir(exist_ok=True)
    found = run(place, capsys, *arguments, code=2)
    assert found.err.count("\n") == 1
    assert message in found.err
    assert found.out == ""
