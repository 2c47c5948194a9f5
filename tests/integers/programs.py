"""Small networks as integers, and their C programs, compiled and run."""

import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np

from shiftnet import config as config_lib
from shiftnet import integers
from shiftnet.integers import c
from tests import networks

CC = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror")
# Without optimizations: compiling takes longer than anything that runs.
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CLASSES = 4


def images(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    """Smooth images, and an all black and an all white one."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 3, 3, 3)).repeat(-(-size // 3), 1)[:, :size]
    coarse = coarse.repeat(-(-size // 3), 2)[:, :, :size]
    noisy = np.clip(coarse + draw.normal(0, 30, coarse.shape), 0, 255).astype(np.uint8)
    noisy[:1], noisy[1:2] = 0, 255
    return noisy


@functools.cache
def converted(
    arch: str,
    weights: str,
    bits: int = 0,
    requantize: str = "shift",
    ends: bool = False,
    activations: str = "float",
    size: int = 12,
) -> integers.Conversion:
    """A network with random weights as integers; `arch` can be that of one with sparse shifts."""
    model = config_lib.default_config().model
    model.arch, _, shift = arch.partition("+")
    model.shift = shift or "fixed"
    model.weights, model.weight_bits, model.activations = weights, bits, activations
    model.quantize_first_last = ends
    network = networks.random(model, CLASSES)
    return integers.convert(network, images(6, size), MEAN, STD, requantize=requantize)


def compiled(graph: integers.Graph, folder: Path, *flags: str, compiler: str | None = CC) -> Path:
    """The compiled program of a network."""
    program = c.program(graph, [f'class "{i}" ??/' for i in range(CLASSES)])
    c.write(program, folder)
    assert compiler is not None
    command = [compiler, *STRICT, *flags, "-o", "net", "main.c", "net.c"]
    subprocess.run(command, cwd=folder, check=True, timeout=600)
    return folder / "net"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=600, check=False
    )


def logits(program: Path, pixels: np.ndarray) -> np.ndarray:
    """The logits that a program prints."""
    raw = program.parent / "images.raw"
    raw.write_bytes(pixels.tobytes())
    result = run(program, "--logits", str(raw))
    assert result.returncode == 0, result.stderr
    return np.array([line.split() for line in result.stdout.splitlines()], np.int64)
