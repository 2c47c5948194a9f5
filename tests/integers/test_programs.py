"""A C program computes what the interpreter does, integer for integer, and survives bad files."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shiftnet import data
from shiftnet.errors import UserError
from shiftnet.integers import c, interpreter
from tests.integers import programs

CPUINFO = Path("/proc/cpuinfo")
pytestmark = pytest.mark.skipif(programs.CC is None, reason="needs a C compiler")

FEW = [
    ("shiftresnet8", "s3", 3),
    ("resnet8", "sign", 0),
    ("depthwiseresnet8", "denseshift", 3),
    ("wrn8", "sign", 0),
    ("mobileresnet8", "s3", 3),
    ("shuffleresnet8", "ternary", 0),
    ("shiftresnet8+sparse", "s3", 3),
]
FORMS = [
    *(("sign", 0), ("ternary", 0), ("s3", 2), ("s3", 3), ("s3", 4)),
    *(("denseshift", 3), ("pot", 5), ("float", 0)),
]
ALL = [
    pytest.param(arch, form, bits, requantize, ends, marks=pytest.mark.slow)
    for arch in (
        *("shiftresnet8", "resnet8", "depthwiseresnet8", "wrn8"),
        *("mobileresnet8", "shuffleresnet8", "shiftresnet8+sparse"),
    )
    for form, bits in FORMS
    for requantize in ("shift", "multiplier")
    for ends in (False, True)
]


@pytest.mark.parametrize(
    ("arch", "form", "bits", "requantize", "ends"),
    [
        *((*few, "shift", False) for few in FEW),
        ("shiftresnet8", "float", 0, "multiplier", False),
        *ALL,
    ],
)
def test_the_program_gives_the_interpreters_integers(arch, form, bits, requantize, ends, tmp_path):
    if (arch, form, ends) == ("wrn8", "pot", True):  # its last layer has levels up to 2^14
        with pytest.raises(UserError, match=r"conv_last cannot .* within 32 bits"):
            programs.converted(arch, form, bits, requantize, ends)
        return
    graph = programs.converted(arch, form, bits, requantize, ends).graph
    images = programs.images(12, seed=1)
    expected = interpreter.logits(graph, images)
    assert len(np.unique(expected)) > programs.CLASSES
    program = programs.compiled(graph, tmp_path, *programs.SANITIZED)
    np.testing.assert_array_equal(programs.logits(program, images), expected)


def real_images() -> np.ndarray:
    """A thousand test images of CIFAR-100 where TFDS has it prepared, otherwise digits."""
    directory = os.environ.get("TFDS_DATA_DIR")
    if directory is None:
        return data.load("digits").train.images[:1000]
    return data.load("cifar100", source="tfds", data_dir=directory).test.images[:1000]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "bits"),
    [("sign", 0), ("ternary", 0), ("s3", 3), ("denseshift", 4), ("pot", 5), ("float", 0)],
)
@pytest.mark.parametrize("arch", [arch for arch, *_ in FEW])
def test_the_integers_are_equal_on_a_thousand_real_images(arch, form, bits, tmp_path):
    images = real_images()
    graph = programs.converted(arch, form, bits, size=32).graph
    expected = interpreter.logits(graph, images)
    for flags in (("-O2",), ("-O2", "-march=native")):
        program = programs.compiled(graph, tmp_path, *flags)
        np.testing.assert_array_equal(programs.logits(program, images), expected)


CLANG = shutil.which("clang")


@pytest.mark.skipif(CLANG is None, reason="needs clang")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(programs.SANITIZED, marks=pytest.mark.slow),
        pytest.param(("-O3", "-march=native"), marks=pytest.mark.slow),
        ("-O3", "-DNET_PORTABLE"),
    ],
    ids=lambda flags: flags[-1],
)
def test_clang_compiles_the_same_integers(flags, tmp_path):
    if flags == programs.SANITIZED and not _links(CLANG, flags, tmp_path):
        pytest.skip("needs clang's sanitizers")
    graph = programs.converted("shiftresnet8", "s3", 3).graph
    images = programs.images(12, seed=1)
    program = programs.compiled(graph, tmp_path, *flags, compiler=CLANG)
    np.testing.assert_array_equal(
        programs.logits(program, images), interpreter.logits(graph, images)
    )


def _links(compiler, flags, folder):
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    command = [compiler, *flags, "-o", str(folder / "empty"), str(folder / "empty.c")]
    return subprocess.run(command, capture_output=True).returncode == 0


FEATURES = CPUINFO.read_text().split() if CPUINFO.exists() else []
AVX2 = "avx2" in FEATURES
# The classes fill a part of a block of 16 channels; 3-bit weights are added 4 at a time, those of 8
# bits 2.
VECTORS = [
    ("shiftresnet8", "s3", 3),
    ("shiftresnet8", "float", 0),
    ("depthwiseresnet8", "denseshift", 3),
    ("wrn8", "sign", 0),
    ("mobileresnet8", "s3", 3),
    ("shuffleresnet8", "ternary", 0),  # grouped convolutions stay portable
    ("shiftresnet8+sparse", "s3", 3),
]


@pytest.mark.skipif(not AVX2, reason="needs a processor with AVX2")
@pytest.mark.parametrize(
    ("arch", "form", "bits", "flag"),
    [
        *((*network, "-mavx2") for network in VECTORS[:4]),
        pytest.param(*VECTORS[0], "-O3", marks=pytest.mark.slow),  # with sanitizers half a minute
        (*VECTORS[0], "-march=native"),
        (*VECTORS[1], "-mavxvnni"),
        *(pytest.param(*network, "-mavx2", marks=pytest.mark.slow) for network in VECTORS[4:]),
        *(
            pytest.param(*network, "-march=native", marks=pytest.mark.slow)
            for network in VECTORS[1:]
        ),
        *(pytest.param(*network, "-mavxvnni", marks=pytest.mark.slow) for network in VECTORS[2:]),
    ],
)
def test_vector_instructions_give_the_same_integers(arch, form, bits, flag, tmp_path):
    if flag == "-mavxvnni" and "avx_vnni" not in FEATURES:
        pytest.skip("needs a processor with AVX-VNNI")
    graph = programs.converted(arch, form, bits).graph
    images = programs.images(12, seed=1)
    program = programs.compiled(graph, tmp_path, *programs.SANITIZED, "-mavx2", flag)
    found = programs.logits(program, images)
    np.testing.assert_array_equal(found, interpreter.logits(graph, images))
    symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    assert (" unpacked" in symbols) == (arch != "shuffleresnet8")


@pytest.mark.skipif(not AVX2, reason="needs a processor with AVX2")
def test_the_portable_form_can_be_had_where_vectors_could_be(tmp_path):
    graph = programs.converted("shiftresnet8", "s3", 3).graph
    program = programs.compiled(graph, tmp_path, "-mavx2", "-DNET_PORTABLE", "-O1")
    images = programs.images(3, seed=1)
    np.testing.assert_array_equal(
        programs.logits(program, images), interpreter.logits(graph, images)
    )
    symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    assert " unpacked" not in symbols


AARCH64 = shutil.which("aarch64-linux-gnu-gcc")
QEMU_AARCH64 = shutil.which("qemu-aarch64")


@pytest.mark.skipif(AARCH64 is None or QEMU_AARCH64 is None, reason="needs gcc and QEMU for Arm64")
@pytest.mark.parametrize(("arch", "form", "bits"), [VECTORS[0], VECTORS[2]])
def test_neon_gives_the_same_integers(arch, form, bits, tmp_path):
    graph = programs.converted(arch, form, bits).graph
    images = programs.images(6, seed=1)
    expected = programs.logits(programs.compiled(graph, tmp_path), images)
    command = [AARCH64, *programs.STRICT, "-O2", "-static", "-o", "neon", "main.c", "net.c"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    result = subprocess.run(
        [QEMU_AARCH64, "neon", "--logits", "images.raw"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = np.array([line.split() for line in result.stdout.splitlines()], np.int64)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    graph = programs.converted("shiftresnet8", "s3", 3).graph
    return programs.compiled(graph, tmp_path_factory.mktemp("program"), *programs.SANITIZED)


def test_names_of_classes_stay_as_they_are(tmp_path):
    graph = programs.converted("shiftresnet8", "s3", 3).graph
    names = ["net_ball", "fishing net: small", "NET_10", "net.c"]
    main = c.program(graph, names, "seine").files["main.c"]
    assert all(f'    "{name}",\n' in main for name in names)
    assert '#include "seine.h"' in main


def test_a_folder_keeps_the_program_that_it_has(tmp_path):
    graph = programs.converted("shiftresnet8", "s3", 3).graph
    first, second = (c.program(graph, list("abcd"), name) for name in ("first", "second"))
    c.write(first, tmp_path)
    c.write(first, tmp_path)
    with pytest.raises(UserError, match=r"main\.c belongs to another program"):
        c.write(second, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == first.files.keys()
    assert (tmp_path / "main.c").read_text() == first.files["main.c"]


def test_more_layers_than_a_program_can_number_are_refused():
    deep = SimpleNamespace(layers=[None] * 256)
    with pytest.raises(UserError, match="has 256 layers, a C program can have 255"):
        c.program(deep, [], "net")


def ppm(pixels: np.ndarray, header: str = "P6\n# a comment\n{w} {h}\n255\n") -> bytes:
    height, width = pixels.shape[:2]
    return header.format(w=width, h=height).encode() + pixels.tobytes()


def test_a_ppm_is_classified_as_the_raw_image(program, tmp_path):
    images = programs.images(4, seed=2)
    expected = programs.logits(program, images).argmax(-1)
    for image, number in zip(images, expected, strict=True):
        (tmp_path / "image.ppm").write_bytes(ppm(image))
        result = programs.run(program, str(tmp_path / "image.ppm"))
        assert result.returncode == 0
        assert result.stdout == f'{tmp_path}/image.ppm: {number} class "{number}" ??/\n'


IMAGE = programs.images(3)[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (IMAGE.tobytes()[:-1], "ends within an image; a raw image has 432 bytes"),
        (IMAGE.tobytes() + b"1", "ends within an image; a raw image has 432 bytes"),
        (ppm(IMAGE)[:-1], "ends before its last pixel"),
        (ppm(IMAGE) + b"\n", "has more bytes than an image of its size"),
        (ppm(IMAGE[:-1]), "has 12 x 11 pixels, expected 12 x 12"),
        (ppm(IMAGE, "P6 {w} {h} 65535\n"), "is not a binary PPM with 255 as its largest value"),
        (ppm(IMAGE, "P6 -{w} {h} 255\n"), "is not a binary PPM"),
        (b"P6 12 12 99999999999999999999", "is not a binary PPM"),
        (b"P6 # a comment without an end", "is not a binary PPM"),
        (b"P6", "is not a binary PPM"),
        (b"P", "ends within an image"),
    ],
)
def test_a_damaged_file_gets_a_message_and_exit_code_2(content, message, program, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(content)
    result = programs.run(program, str(path))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_file_a_directory_and_no_file_get_exit_code_2(program, tmp_path):
    for arguments in ([str(tmp_path / "none")], [str(tmp_path)], [], ["--logits"]):
        result = programs.run(program, *arguments)
        assert result.returncode == 2, arguments
        assert result.stderr.startswith(("error: ", "usage: "))


RISCV = shutil.which("riscv64-unknown-elf-gcc")
QEMU = shutil.which("qemu-riscv32")
# RV32I has no instruction that multiplies, and without a library a call of a function that does is
# an error of the linker.
FLAGS = (
    *("-march=rv32i", "-mabi=ilp32", "-ffreestanding", "-fno-builtin"),
    *("-nostdlib", "-Wl,--no-relax"),  # which needs a register that nothing sets up here
)


@pytest.mark.skipif(RISCV is None, reason="needs gcc for RISC-V")
@pytest.mark.parametrize("optimization", ["-Os", "-O3"])
@pytest.mark.parametrize("form", ["s3", "float"])
def test_a_processor_without_multiplication_computes_the_same(form, optimization, tmp_path):
    graph = programs.converted("shiftresnet8", form, 3 if form == "s3" else 0).graph
    program = programs.compiled(graph, tmp_path)
    shutil.copy(Path(__file__).with_name("freestanding.c"), tmp_path)
    command = [RISCV, *FLAGS, optimization, "-std=c99", "-o", "rv", "net.c", "freestanding.c"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    if QEMU is None:
        pytest.skip("linked without a multiplication; needs qemu-riscv32 to run")
    images = programs.images(3, seed=5)
    result = subprocess.run(
        [QEMU, "rv"], cwd=tmp_path, input=images.tobytes(), capture_output=True, timeout=120
    )
    assert result.returncode == 0
    found = np.frombuffer(result.stdout, "<i4").reshape(len(images), -1)
    np.testing.assert_array_equal(found, programs.logits(program, images))


ARM = shutil.which("arm-none-eabi-gcc")
MICROBIT = shutil.which("qemu-system-arm")


@pytest.mark.skipif(ARM is None or MICROBIT is None, reason="needs gcc and QEMU for Arm")
def test_a_cortex_m0_of_a_microbit_computes_the_same(tmp_path):
    """In 16 KB of memory, without a library; also divisions would be calls of one."""
    program = programs.compiled(programs.converted("shiftresnet8", "s3", 3).graph, tmp_path)
    images = programs.images(3, seed=5)
    listed = ",".join(map(str, images.tobytes()))
    (tmp_path / "images.h").write_text(
        f"#include <stdint.h>\nstatic const uint8_t images[] = {{{listed}}};\n"
    )
    for name in ("cortex_m0.c", "cortex_m0.ld"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    flags = ["-mcpu=cortex-m0", "-mthumb", "-Os", "-std=c99", "-ffreestanding", "-fno-builtin"]
    command = [ARM, *flags, "-nostdlib", "-Tcortex_m0.ld", "-o", "m0.elf", "net.c", "cortex_m0.c"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    result = subprocess.run(
        [
            *(MICROBIT, "-M", "microbit", "-nographic", "-monitor", "none", "-serial", "none"),
            *("-semihosting-config", "enable=on,target=native", "-kernel", "m0.elf"),
        ],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = np.frombuffer(result.stdout, "<i4").reshape(len(images), -1)
    np.testing.assert_array_equal(found, programs.logits(program, images))
