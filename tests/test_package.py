"""What an installed wheel brings, and what it must leave alone."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shiftnet.kernels.native import HEADERS, SOURCES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(built) -> dict[str, int]:
    """The files in the wheel, and what they take in it in bytes."""
    with zipfile.ZipFile(built) as archive:
        return {file.filename: file.compress_size for file in archive.infolist()}


def test_the_wheel_claims_one_name(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shiftnet"}


def test_the_wheel_holds_the_kernels_and_the_digits(wheel):
    assert "shiftnet/kernels/shift/xla.py" in wheel
    assert {str(path.relative_to(ROOT)) for path in (*HEADERS, *SOURCES)} <= wheel.keys()
    assert "shiftnet/data/digits.npz" in wheel
    assert any(name.endswith("/LICENSE") for name in wheel)
    assert any(name.endswith("/NOTICE") for name in wheel)


def test_the_wheel_holds_the_trained_networks_and_is_small(wheel):
    zoo = {name: size for name, size in wheel.items() if name.startswith("shiftnet/zoo/results/")}
    results = ROOT / "results"
    kept = {
        path.relative_to(results).as_posix()
        for folder in (results, results / "short", results / "distilled")
        for kind in ("*.json", "*.safetensors")
        for path in folder.glob(kind)
    }
    assert {f"shiftnet/zoo/results/{name}" for name in {*kept, "table.toml"}} == zoo.keys()
    assert "shiftresnet20_1c_c100.safetensors" in kept
    assert sum(zoo.values()) <= 10_000_000


def test_the_wheel_holds_the_recipes(wheel):
    assert {"shiftnet/configs/names.toml", "shiftnet/configs/shift_family.py"} <= set(wheel)


def test_the_checkout_has_the_recipes_on_top():
    assert (ROOT / "configs" / "names.toml").samefile(ROOT / "shiftnet/configs/names.toml")


def test_the_checkout_has_the_kernels_on_top():
    assert (ROOT / "kernels" / "shift" / "xla.py").samefile(ROOT / "shiftnet/kernels/shift/xla.py")


@pytest.mark.parametrize(("extra", "named"), [("", "/src"), ("cuda", "/src[cuda]")])
def test_the_image_is_built_with_and_without_an_extra(extra, named):
    words = re.search(r"pip install --no-cache-dir (\S+)", (ROOT / "Dockerfile").read_text())[1]
    command = ["sh", "-c", f"echo {words}"]
    expanded = subprocess.run(command, env={"EXTRA": extra}, check=True, capture_output=True)
    assert expanded.stdout.decode().strip() == named


INSTALLED = """
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import shiftnet
from shiftnet import config
from shiftnet.__main__ import main
from shiftnet.cli import COMMANDS

assert Path(shiftnet.__file__).is_relative_to(sys.argv[1]), shiftnet.__file__
for command in COMMANDS:
    try:
        code = main([command, "--help"])
    except SystemExit as exit:
        code = exit.code
    assert code in (0, None), command
assert config.load("shiftresnet20_c100:expansion=3").model.expansion == 3
Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("black.png")
assert main(["predict", "shiftresnet20_1c_c100", "black.png"]) == 0
"""


def test_a_wheel_unpacked_elsewhere_has_all_commands_the_recipes_and_the_networks(built, tmp_path):
    place = tmp_path / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(place)
    result = subprocess.run(
        [sys.executable, "-c", INSTALLED, place],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "black.png" in result.stdout
