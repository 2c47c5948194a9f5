"""A few of the cases of `fuzz.py`, which `make fuzz` reads by the thousand."""

import random

import pytest

from tests.data import fuzz


@pytest.fixture(scope="module")
def seeds():
    return fuzz.seeds()


def test_damaged_files_of_every_kind_are_decoded_or_named(seeds):
    kinds = {name.split()[0] for name in seeds}
    assert {"JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000"} <= kinds
    outcomes = {fuzz.read_file(fuzz.damaged(number, seeds)[1]) for number in range(60)}
    assert len(outcomes) > 3
    assert "decoded" in outcomes


def test_odd_folders_are_read_in_full_or_refused(seeds, tmp_path):
    contents = [seeds["JPEG RGB"], b"", *(fuzz.damaged(n, seeds)[1] for n in range(20))]
    outcomes = []
    for number in range(12):
        root = tmp_path / str(number)
        root.mkdir()
        fuzz.build(root, random.Random(number), contents)
        outcomes.append(fuzz.read_folder(root).partition(":")[0])
    assert "refused" in outcomes
    assert any(outcome.startswith("read") for outcome in outcomes)
