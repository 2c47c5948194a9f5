"""Whatever bytes a file holds, reading it gives arrays or a `UserError` made for the case."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shiftnet.errors import UserError
from shiftnet.interchange import UNFORESEEN, read
from tests.interchange import files

SEEDS = files.honest()
STARTS = [b"PK\x03\x04", b"\x80\x02", files.MAGIC + files.VERSION, b"\x10" + bytes(7) + b"{", b""]
OPCODES = [bytes([code]) for code in b"NK\x88\x89J\x8aGUTX\x8cCB(t)\x85\x86\x87]ael}sud\x8f\x90"]
OPCODES += [bytes([code]) for code in b"0122qr\x94hj\x80\x95c\x93i\x81RbQo\x82\x92\x97\x96."]
PIECES = [*OPCODES, b"K\x01", b"U\x01a", b"q\x01", b"h\x01", b"ctorch\nSize\n", b"cm\nNet\n"]
PIECES += [files.code(files.ORDERED), files.code(("storage",)), files.code(SEEDS and {"net": 1})]
PIECES += [files.code(files.Name("torch._utils", "_rebuild_tensor"))]
PIECES += [files.code(files.storage_id("a", "FloatStorage", 2)), files.code((0, (2,), (1,)))]

many = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def survives(tmp_path: Path, empty_folder: Path):
    def run(data: bytes) -> None:
        (tmp_path / "file").write_bytes(data)
        message = ""
        try:
            read(tmp_path / "file")
        except UserError as error:
            message = str(error)
        assert UNFORESEEN not in message

    return run


@many
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=200))
def test_any_bytes(start, rest, survives):
    survives(start + rest)


@many
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_opcodes(pieces, survives):
    pickle = files.PROTO + b"".join(pieces) + files.STOP
    survives(files.legacy_file(pickle, {}))
    survives(files.zip_file(pickle, {"a": bytes(8)}))


@many
@given(
    name=st.sampled_from(sorted(SEEDS)),
    cuts=st.tuples(*[st.floats(0, 1)] * 3),
    insert=st.one_of(st.binary(max_size=9), st.sampled_from(PIECES)),
)
def test_any_piece_of_a_file_put_elsewhere(name, cuts, insert, survives):
    data = SEEDS[name]
    first, second, place = (int(cut * len(data)) for cut in cuts)
    piece = data[min(first, second) : max(first, second)]
    survives(data[:place] + insert + piece + data[place + len(insert) :])


@many
@given(
    name=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_changed_bytes(name, changes, survives):
    data = bytearray(SEEDS[name])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    survives(bytes(data))
