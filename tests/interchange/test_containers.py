"""PyTorch's two file formats: storages, views of them, and what does not fit together."""

import zipfile
import zlib

import numpy as np
import pytest

from shiftnet.interchange import limits
from tests.interchange import files
from tests.interchange.files import Call, Name, Persistent, legacy_file, tensor, zip_file, zipped

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def both(top, **storages):
    """The same content in both formats."""
    raw = {key: values.tobytes() for key, values in storages.items()}
    return [zip_file({"net": top}, raw), legacy_file({"net": top}, storages)]


@pytest.mark.parametrize("kind", files.STORAGES)
def test_every_type_keeps_its_bits(kind, read_bytes):
    values = np.array([0, 1, 1, 0], np.uint8).astype(kind)
    for data in both({"w": tensor(values, "a")}, a=values):
        found = read_bytes(data).arrays["w"]
        assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes())


@pytest.mark.core
def test_bfloat16_becomes_float32(read_bytes):
    exact = np.array([1.0, -2.5, 2.0**-130, np.inf], np.float32)
    half = (exact.view(np.uint32) >> 16).astype("<u2")
    storage = files.storage_id("a", "BFloat16Storage", 4)
    top = {"w": Call(Name("torch._utils", "_rebuild_tensor"), (storage, 0, (4,), (1,)))}
    for data in both(top, a=half):
        found = read_bytes(data).arrays["w"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, exact)


def test_a_byte_that_is_no_bool_is_a_true_one(read_bytes):
    raw = np.array([0, 1, 2, 255], np.uint8)
    top = {"w": tensor(raw.astype(bool), "a")}
    for data in both(top, a=raw):
        assert read_bytes(data).arrays["w"].view(np.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.core
@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ({"offset": 3, "shape": (2, 2), "strides": (4, 1)}, np.array([[3, 4], [7, 8]])),
        ({"shape": (4, 3, 2), "strides": (1, 4, 12)}, VALUES.transpose()),
        ({"offset": 5, "shape": (3,), "strides": (0,)}, np.full(3, 5)),
        ({"offset": 23, "shape": (), "strides": ()}, np.array(23)),
        ({"offset": 24, "shape": (0, 5), "strides": (5, 1)}, np.zeros((0, 5))),
    ],
)
def test_views_are_copied_from_their_storage(view, expected, read_bytes):
    for data in both({"w": tensor(VALUES, "a", **view)}, a=VALUES):
        found = read_bytes(data).arrays["w"]
        assert (found.shape, found.flags.c_contiguous) == (expected.shape, True)
        np.testing.assert_array_equal(found.ravel(), expected.ravel())


def test_views_of_storages_are_found_in_the_whole_one(read_bytes):
    """The oldest files have storages that are parts of others: key, first element, count."""
    part = tensor(VALUES, "a", view=(("b", 4, 8),), shape=(8,))
    found = read_bytes(legacy_file({"net": {"w": part}}, {"a": VALUES}))
    np.testing.assert_array_equal(found.arrays["w"], np.arange(4, 12))


def test_one_storage_may_serve_many_tensors(read_bytes):
    top = {"u": tensor(VALUES, "a"), "v": tensor(VALUES, "a"), "w": tensor(VALUES, "a", shape=(4,))}
    for data in both(top, a=VALUES):
        found = read_bytes(data).arrays
        assert found["u"] is found["v"]
        np.testing.assert_array_equal(found["w"], np.arange(4))


HUGE = 2**40


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": HUGE}, "must have 1099511627776 elements"),
        ({"count": 23, "shape": (23,)}, "must have 23 elements"),
        ({"offset": HUGE}, "reaches element 1099511627799, but the storage has 24"),
        ({"shape": (25,)}, "reaches element 24"),
        ({"shape": (HUGE, HUGE)}, "a tensor of shape"),
        ({"shape": (0, HUGE, HUGE), "strides": (1, 1, 1)}, "a tensor of shape"),
        ({"shape": (2**70,), "strides": (0,)}, "no proper counts"),
        ({"shape": (-1,), "strides": (1,)}, "no proper counts"),
        ({"offset": -1}, "no proper counts"),
        ({"offset": True}, "no proper counts"),
        ({"shape": (2,), "strides": (-1,)}, "no proper counts"),
        ({"shape": (2.0,), "strides": (1,)}, "no proper counts"),
        ({"shape": (2,), "strides": (1, 1)}, "1 dimensions and 2 strides"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "at most 8"),
        ({"shape": [2], "strides": [1]}, "no proper shape"),
        ({"shape": (2**30,), "strides": (0,)}, "overlap, and would take more than"),
        ({"package": "os"}, "os.FloatStorage"),
        ({"package": "numpy"}, "a storage of type 'numpy.FloatStorage'"),
        ({"view": (("b", 20, 8),)}, "leaves storage 'a' of 24"),
        ({"view": ("b",)}, "improper view"),
        ({"view": (None, None)}, "by 7 values"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(change, reason, refusal):
    for data in both({"w": tensor(VALUES, "a", **change)}, a=VALUES):
        assert reason in refusal(data)


def test_many_overlapping_views_are_refused(refusal):
    """Each is fine; together they would take 100 times what the file holds."""
    values = np.zeros(2**16, np.float32)
    top = {str(i): tensor(values, "a", offset=i, shape=(2**16 - i,)) for i in range(100)}
    for data in both(top, a=values):
        assert "overlap" in refusal(data)


@pytest.mark.parametrize(
    "identity",
    [
        1,
        (),
        ("storage",),
        ("other", 1, 2, 3),
        ("module", "models.Net", "file", "source"),
        ("storage", "FloatStorage", "a", "cpu", 24),
        ("storage", Name("torch", "ComplexFloatStorage"), "a", "cpu", 24),
        ("storage", Name("torch", "FloatStorage"), 0, "cpu", 24),
        ("storage", Name("torch", "FloatStorage"), "a", "cpu", -1),
        ("storage", Name("torch", "FloatStorage"), "a", "cpu", "24"),
    ],
)
def test_other_persistent_ids_are_refused(identity, refusal):
    for data in both({"w": Persistent(identity)}, a=VALUES):
        assert refusal(data)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("_rebuild_tensor", ()),
        ("_rebuild_tensor", (None, 0, (), ())),
        ("_rebuild_tensor_v2", (1,) * 8),
        ("_rebuild_parameter", ()),
        ("_rebuild_parameter", (1, True, None)),
    ],
)
def test_tensors_of_something_else_are_refused(function, arguments, refusal):
    for data in both({"w": Call(Name("torch._utils", function), arguments)}):
        assert "it describes a tensor" in refusal(data) or "without a" in refusal(data)


def test_one_storage_described_in_two_ways_is_refused(refusal):
    top = {"v": tensor(VALUES, "a"), "w": tensor(VALUES, "a", count=12, shape=(12,))}
    for data in both(top, a=VALUES):
        assert "storage 'a' in two ways" in refusal(data)


HOSTILE = Call(Name("os", "system"), ("touch PWNED",))


@pytest.mark.core
@pytest.mark.parametrize("place", ["magic", "version", "info", "top", "hidden", "keys"])
def test_a_command_is_refused_in_every_pickle_of_the_old_format(place, refusal):
    top, storages = files.network()
    pickle = files.pickled(HOSTILE)
    changed = {
        "top": {"top": pickle},
        "hidden": {"top": {**top, "extra": [HOSTILE]}},
        "keys": {"keys": HOSTILE},
    }.get(place, {place: pickle})
    arguments = {"top": top, "storages": storages, **changed}
    assert refusal(legacy_file(**arguments)) == "it asks to run os.system"


def test_the_old_format_must_list_its_storages(refusal):
    top = {"net": {"w": tensor(VALUES, "a")}}
    assert "not in the list" in refusal(legacy_file(top, {"a": VALUES}, keys=[]))
    assert "not in the list" in refusal(legacy_file(top, {"a": VALUES}, keys={"a": 1}))
    assert "names 'a' twice" in refusal(legacy_file(top, {"a": VALUES}, keys=["a", "a"]))
    assert "names 'b' twice, or" in refusal(legacy_file(top, {"a": VALUES}, keys=["b"]))
    assert "expected version 1001" in refusal(
        legacy_file(top, {"a": VALUES}, version=files.pickled(1000))
    )


def test_every_cut_of_the_old_format_is_refused(refusal):
    whole = files.honest()["python2.t7"]
    for length in range(0, len(whole), 7):
        assert refusal(whole[:length])


def test_the_zip_format_must_hold_its_records(refusal):
    top = files.pickled({"net": {"w": tensor(VALUES, "a")}})
    raw = VALUES.tobytes()
    assert "no record" in refusal(zip_file(top, {"b": raw}))
    assert "96 bytes, but its record has 95" in refusal(zip_file(top, {"a": raw[:-1]}))
    assert "found 0" in refusal(zipped([("archive/version", b"3")]))
    assert "found 2" in refusal(zipped([("a/data.pkl", top), ("b/data.pkl", top)]))
    assert "big-endian" in refusal(zipped([("a/data.pkl", top), ("a/byteorder", b"big")]))
    assert "TorchScript" in refusal(zipped([("a/data.pkl", top), ("a/constants.pkl", b"")]))


@pytest.mark.parametrize(
    "name", ["../PWNED", "/tmp/PWNED", "a/../../PWNED", "..\\PWNED", "C:\\PWNED", "archive/.."]
)
def test_members_outside_the_archive_are_refused(name, refusal):
    data = zipped([("archive/data.pkl", files.pickled({})), (name, b"x")])
    assert "a member outside it" in refusal(data)


def test_a_changed_byte_of_a_record_is_noticed(refusal):
    data = bytearray(zip_file({"net": {"w": tensor(VALUES, "a")}}, {"a": VALUES.tobytes()}))
    data[data.index(VALUES.tobytes()) + 5] ^= 1
    assert refusal(bytes(data)) == "its member 'archive/data/a' is broken"


def test_compression_bombs_are_refused(refusal):
    zeros = bytes(2**22)
    data = zipped([("a/data.pkl", files.pickled({})), ("a/data/0", zeros)], zipfile.ZIP_DEFLATED)
    assert f"of {len(data)} bytes whose members unpack to" in refusal(data)


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(refusal):
    data = zip_file(
        {"net": {"w": tensor(VALUES, "a")}},
        {"a": bytes(96)},
        compression=zipfile.ZIP_DEFLATED,
    )
    honest = zlib.compressobj(9, zlib.DEFLATED, -15)
    small = honest.compress(bytes(96)) + honest.flush()
    other = zlib.compressobj(9, zlib.DEFLATED, -15)
    large = other.compress(bytes(10**6)) + other.flush()
    assert "broken" in refusal(data.replace(small, large[: len(small)]))


def test_other_compressions_and_double_names_are_refused(refusal):
    member = ("a/data.pkl", files.pickled({}))
    assert "neither stored nor deflated" in refusal(zipped([member], zipfile.ZIP_LZMA))
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped([member, member])
    assert "two members of one name" in refusal(data)


def test_the_number_of_members_is_limited(refusal, monkeypatch):
    monkeypatch.setattr("shiftnet.interchange.zips.MAX_MEMBERS", 10)
    assert "more than 10 members" in refusal(zip_file({}, {str(i): b"" for i in range(11)}))


def test_the_size_of_a_file_is_limited(refusal, monkeypatch):
    monkeypatch.setattr("shiftnet.interchange.MAX_FILE", 10)
    assert refusal(bytes(11)) == "it has more than 10 bytes"


def test_the_number_of_tensors_is_limited(refusal, monkeypatch):
    monkeypatch.setattr("shiftnet.interchange.networks.MAX_TENSORS", 3)
    top = {str(i): tensor(VALUES, "a") for i in range(4)}
    for data in both(top, a=VALUES):
        assert "more than 3 tensors" in refusal(data)


def test_limits_hold_together():
    """The bound of the module's docstring: file, members and copies within 4 sizes and 300 MiB."""
    for size in (10**3, 10**6, 10**8, limits.MAX_FILE):
        unpacked = limits.max_unpacked(size)
        assert size + unpacked + limits.max_copied(unpacked) <= 4 * size + 200 * limits.MiB
