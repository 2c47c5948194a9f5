"""Files that hold arrays and nothing else: .npz and .safetensors."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.interchange.files import npz, safetensors, zipped

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def member(array, version=None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        VALUES,
        np.asfortranarray(VALUES),
        VALUES.astype(">f8"),
        VALUES.astype(np.float16),
        np.array(7),
        np.zeros((0, 3), np.int8),
        np.array([True, False]),
        np.arange(4, dtype=np.uint8),
    ],
)
def test_npz_arrays_come_as_they_are(array, read_bytes):
    for data in (npz({"a/w": array}), zipped([("a/w.npy", member(array, (2, 0)))])):
        found = read_bytes(data).arrays["a/w"]
        assert found.dtype == array.dtype.newbyteorder("=")
        assert (found.shape, found.flags.c_contiguous) == (array.shape, True)
        np.testing.assert_array_equal(found, array)


def test_npz_of_python_2_is_read(read_bytes):
    """It wrote large integers with an L."""
    data = member(VALUES).replace(b"(2, 3), } ", b"(2L, 3), }")
    np.testing.assert_array_equal(read_bytes(zipped([("w.npy", data)])).arrays["w"], VALUES)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (member(np.array([{}], object)), "pickled objects"),
        (member(np.zeros(2, "f4,i4")), "not described as an array of numbers"),
        (member(np.array(["text"])), "not described as an array of numbers"),
        (member(np.array([1j])), "not described as an array of numbers"),
        (member(VALUES)[:-1], "must take 24 bytes, found 23"),
        (member(VALUES) + b"x", "must take 24 bytes, found 25"),
        (member(VALUES).replace(b"(2, 3)", b"(9**9)"), "not described"),
        (member(VALUES).replace(b"(2, 3), }    ", b"(2, 99999999)}"), "must take"),
        (b"not an array", "does not start"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not described"),
        (b"\x93NUMPY", "does not start"),
    ],
)
def test_npz_members_of_another_kind_are_refused(data, reason, refusal):
    assert reason in refusal(zipped([("w.npy", data)]))


def test_a_shape_of_very_many_digits_is_refused_at_once(tmp_path):
    """In a process of its own, since it would never end if it went wrong."""
    shape = b"4, " + b"0" * 200
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s_), }" % shape
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    path = tmp_path / "net.npz"
    path.write_bytes(zipped([("w.npy", data)]))
    command = [sys.executable, "-m", "shiftnet.convert_torch", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "is not described as an array of numbers" in done.stderr


def test_npz_holds_nothing_else(refusal):
    assert "expected .npy" in refusal(zipped([("w.npy", member(VALUES)), ("data.pkl", b"")]))


def test_safetensors_gives_arrays_and_metadata(read_bytes):
    arrays = {
        "module.b": VALUES,
        "module.a": np.array([True, False]),
        "module.c": np.zeros((0, 4), np.int64),
        "module.d": np.array(3, np.uint8),
    }
    found = read_bytes(safetensors(arrays, __metadata__={"arch": "resnet"}))
    assert (found.format, found.facts) == ("safetensors", {"arch": "resnet"})
    assert list(found.arrays) == ["b", "a", "c", "d"]
    for name, array in found.arrays.items():
        assert array.dtype == arrays[f"module.{name}"].dtype
        np.testing.assert_array_equal(array, arrays[f"module.{name}"])


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


UNSOUND = "no sound .safetensors file"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{" * 10, UNSOUND),
        (b'{"a": ' + b"[" * 100_000, UNSOUND),
        (b"{\xff}", UNSOUND),
        ({"w": 1}, UNSOUND),
        ({"__metadata__": {"a": 1}, **entry()}, UNSOUND),
        (entry(dtype="F8_E4M3", offsets=(0, 6)), UNSOUND),
        (entry(dtype="C64", shape=(3,)), "'w' is of type 'C64'"),
        (entry(dtype=["F32"]), UNSOUND),
        (entry(shape=(2, 4)), UNSOUND),
        (entry(shape=(2**40, 2**40)), UNSOUND),
        (entry(shape=(1,) * 7 + (2, 3)), "has 9 dimensions"),
        (entry(shape=(-2, -3)), UNSOUND),
        (entry(offsets=(4, 28)), UNSOUND),
        (entry(offsets=(-24, 0)), UNSOUND),
        (entry(shape=(10,), offsets=(0, 40)), UNSOUND),
        (entry(shape=(1,), offsets=(0, 4)), UNSOUND),
        ({"v": entry(shape=(0, 2**50), offsets=(0, 0))["w"], **entry()}, "a tensor of shape"),
        ({**entry(), "v": entry()["w"]}, UNSOUND),
        ({"a\nb": entry()["w"]}, "no printable text"),
    ],
)
def test_safetensors_that_do_not_fit_are_refused(header, reason, refusal):
    assert reason in refusal(safetensors({"w": VALUES}, header))


def test_a_long_header_is_refused(refusal):
    assert "claims 4611686018427387904 bytes" in refusal(struct.pack("<Q", 2**62) + b"{}")


def test_bfloat16_of_safetensors_becomes_float32(read_bytes):
    half = (VALUES.view(np.uint32) >> 16).astype(np.uint16)
    header = entry("BF16", offsets=(0, 12))
    data = safetensors({"w": half.view(np.float16)}, header)
    np.testing.assert_array_equal(read_bytes(data).arrays["w"], VALUES)
