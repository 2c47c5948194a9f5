"""What an installed wheel brings, and what it must leave alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, int]:
    """The files in the wheel, and what they take in it in bytes."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {file.filename: file.compress_size for file in archive.infolist()}


def test_the_wheel_claims_one_name(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shiftnet"}


def test_the_wheel_holds_the_kernels_and_the_digits(wheel):
    assert "shiftnet/kernels/shift/xla.py" in wheel
    assert {"shiftnet/kernels/native.h", "shiftnet/kernels/conv/conv.cc"} <= wheel.keys()
    assert "shiftnet/data/digits.npz" in wheel
    assert any(name.endswith("/LICENSE") for name in wheel)


def test_the_wheel_holds_the_trained_networks_and_is_small(wheel):
    zoo = {name: size for name, size in wheel.items() if name.startswith("shiftnet/zoo/results/")}
    results = ROOT / "results"
    kept = {path.name for kind in ("*.json", "*.safetensors") for path in results.glob(kind)}
    assert {f"shiftnet/zoo/results/{name}" for name in {*kept, "table.toml"}} == zoo.keys()
    assert "shiftresnet20_1c_c100.safetensors" in kept
    assert sum(zoo.values()) <= 10_000_000


def test_the_checkout_has_the_kernels_on_top():
    assert (ROOT / "kernels" / "shift" / "xla.py").samefile(ROOT / "shiftnet/kernels/shift/xla.py")
