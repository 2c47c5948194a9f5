"""The pickle machine, opcode by opcode: what is data becomes data, all else is refused."""

import struct

import pytest

from shiftnet.interchange import limits, pickles
from shiftnet.interchange.limits import Clock, Refusal
from shiftnet.interchange.pickles import Global, Machine, Record
from tests.interchange.files import Build, Call, Name, New, Persistent, Raw, code

ORDERED = Name("collections", "OrderedDict")


def run(pickle, persistent=None, **calls):
    data = pickle if isinstance(pickle, bytes) else code(pickle) + b"."
    return Machine(data, 0, calls, persistent, Clock()).load()


def refused(pickle, persistent=None) -> str:
    with pytest.raises(Refusal) as caught:
        run(pickle, persistent)
    return str(caught.value)


@pytest.mark.core
@pytest.mark.parametrize(
    ("opcodes", "value"),
    [
        (b"N.", None),
        (b"\x88.", True),
        (b"\x89.", False),
        (b"K\xff.", 255),
        (b"M\x01\x02.", 513),
        (b"J\xfe\xff\xff\xff.", -2),
        (b"\x8a\x00.", 0),
        (b"\x8a\x02\x00\x80.", -32768),
        (b"\x8b\x02\x00\x00\x00\x01\x01.", 257),
        (b"G" + struct.pack(">d", 0.1) + b".", 0.1),
        (b"U\x02\xe9a.", "\xe9a"),
        (b"T\x01\x00\x00\x00a.", "a"),
        (b"S'net'\n.", "net"),
        (b"\x8c\x02\xc3\xa9.", "\xe9"),
        (b"X\x01\x00\x00\x00a.", "a"),
        (b"\x8d\x01\x00\x00\x00\x00\x00\x00\x00a.", "a"),
        (b"C\x01a.", b"a"),
        (b"B\x01\x00\x00\x00a.", b"a"),
        (b"\x8e\x01\x00\x00\x00\x00\x00\x00\x00a.", b"a"),
        (b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a.", b"a"),
        (b").", ()),
        (b"K\x01\x85.", (1,)),
        (b"K\x01K\x02\x86.", (1, 2)),
        (b"K\x01K\x02K\x03\x87.", (1, 2, 3)),
        (b"(K\x01K\x02K\x03K\x04t.", (1, 2, 3, 4)),
        (b"]K\x01a.", [1]),
        (b"](K\x01K\x02e.", [1, 2]),
        (b"(K\x01l.", [1]),
        (b"}K\x01K\x02s.", {1: 2}),
        (b"}(K\x01K\x02K\x03K\x04u.", {1: 2, 3: 4}),
        (b"(K\x01K\x02d.", {1: 2}),
        (b"\x8f(U\x01aU\x01b\x90.", {"a", "b"}),
        (b"K\x01K\x020.", 1),
        (b"K\x01(K\x02K\x031.", 1),
        (b"K\x012\x86.", (1, 1)),
        (b"K\x07q\x00K\x08r\x01\x00\x00\x00h\x00j\x01\x00\x00\x00\x86\x86\x86.", (7, (8, (7, 8)))),
        (b"K\x07\x94h\x00\x86.", (7, 7)),
        (b"\x80\x04\x95\x03\x00\x00\x00\x00\x00\x00\x00K\x01.", 1),
        (b"cmodels.net\nNet\n.", Global("models.net.Net")),
        (b"\x8c\x06models\x8c\x03Net\x93.", Global("models.Net")),
        (b"c__builtin__\nobject\n.", Global("builtins.object")),
    ],
)
def test_data_becomes_data(opcodes, value):
    found = run(opcodes)
    assert found == value
    assert type(found) is type(value)


def test_pickles_follow_each_other():
    machine = Machine(b"K\x01.K\x02.", 0, {}, None, Clock())
    assert (machine.load(), machine.at, machine.load(), machine.at) == (1, 3, 2, 6)


def test_byte_strings_tell_that_python_2_wrote():
    for data, python2 in ((b"U\x01a.", True), (b"X\x01\x00\x00\x00a.", False)):
        machine = Machine(data, 0, {}, None, Clock())
        assert (machine.load(), machine.byte_strings) == ("a", python2)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (Call(ORDERED, ()), {}),
        (Call(ORDERED, ([("a", 1), ["b", 2]],)), {"a": 1, "b": 2}),
        (New(ORDERED), {}),
        (Build(Call(ORDERED, ()), {"_metadata": 1}), {}),
        (Call(Name("__builtin__", "set"), (["a"],)), {"a"}),
        (Call(Name("collections", "Counter"), ({1: 2},)), {}),
        (New(Name("models", "Net")), Record("models.Net")),
        (New(Name("models", "Net"), {"a": 1}), Record("models.Net", {"a": 1})),
        (Call(Name("copy_reg", "__newobj__"), (Name("m", "Net"),)), Record("m.Net")),
        (
            Call(
                Name("copy_reg", "_reconstructor"),
                (Name("m", "Net"), Name("__builtin__", "object"), None),
            ),
            Record("m.Net"),
        ),
        (New(Name("argparse", "Namespace"), {"lr": 1}), Record("argparse.Namespace", {"lr": 1})),
    ],
)
def test_the_few_known_calls_and_instances(value, found):
    assert run(value) == found


def test_calls_and_persistent_ids_go_to_our_own_functions():
    assert run(Call(Name("torch", "Size"), (1, 2)), **{"torch.Size": sum}) == 3
    assert run(New(Name("torch", "Size"), None, (1, 2)), **{"torch.Size": sum}) == 3
    assert run(Persistent(("storage", 1)), persistent=len) == 2


HOSTILE = {
    "os.system": Call(Name("os", "system"), ("touch PWNED",)),
    "posix.system": Name("posix", "system"),
    "builtins.eval": Call(Name("__builtin__", "eval"), ("1",)),
    "builtins.exec": Call(Name("builtins", "exec"), ("1",)),
    "builtins.getattr": Call(Name("builtins", "getattr"), (1, "a")),
    "builtins.__import__": Call(Name("builtins", "__import__"), ("os",)),
    "subprocess.Popen": New(Name("subprocess", "Popen"), None, ("true",)),
    "commands.getoutput": Call(Name("commands", "getoutput"), ("true",)),
    "importlib.import_module": Name("importlib", "import_module"),
    "pickle.loads": Call(Name("pickle", "loads"), (b"",)),
    "operator.attrgetter": Name("operator", "attrgetter"),
    "torch.hub.load": Call(Name("torch.hub", "load"), ("a/b", "c")),
    "torch.storage._load_from_bytes": Call(Name("torch.storage", "_load_from_bytes"), (b"",)),
    "numpy.core.multiarray._reconstruct": Call(Name("numpy.core.multiarray", "_reconstruct"), (1,)),
    "models.Net": Call(Name("models", "Net"), ()),
    "models.Other": New(Name("models", "Other"), None, (1,)),
    "models.net.load": Raw(b"(imodels.net\nload\n"),
    "runpy.run_path": Raw(b"(S'x'\nirunpy\nrun_path\n"),
    "shutil.rmtree": Raw(b"\x8c\x06shutil\x8c\x06rmtree\x93"),
    "builtins.object": Call(Name("builtins", "object"), ()),
    "builtins.dict": New(Name("builtins", "dict")),
    "copyreg.__newobj__": New(Name("copyreg", "__newobj__"), None, (Name("os", "a"),)),
}
HOSTILE["copyreg.__newobj__"] = New(
    Name("copyreg", "__newobj__"), None, (Name("copyreg", "__newobj__"),) * 5000
)


@pytest.mark.core
@pytest.mark.parametrize("name", HOSTILE)
def test_what_asks_to_run_something_is_refused_by_its_name(name):
    assert refused(HOSTILE[name]) == f"it asks to run {name}"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Call(1, ()), "it asks to run a value of type int"),
        (Call(New(Name("m", "Net")), ()), "it asks to run a value of type Record"),
        (Raw(b"cm\nf\n]R"), "it asks to run m.f with a value of type list"),
        (Call(Name("copyreg", "_reconstructor"), (Name("m", "N"), Name("m", "B"), None)), "base"),
        (Call(Name("copyreg", "_reconstructor"), ()), "base class"),
        (New(1), "no class"),
        (Raw(b"cm\nN\n]\x81"), "an instance with a value of type list"),
        (Build(Name("m", "Net"), {"__setstate__": 1}), "gives attributes to m.Net"),
        (Build(1, {}), "gives attributes to a value of type int"),
        (Build(New(Name("m", "Net")), 1), "gives m.Net a value of type int"),
        (Build(New(Name("m", "Net"), {}), {}), "twice"),
        (Persistent(("storage",)), "refers to something outside it"),
        (Call(ORDERED, (1,)), "something else than pairs"),
        (Call(ORDERED, ([1],)), "something else than pairs"),
        (Call(ORDERED, ([(1, 2, 3)],)), "something else than pairs"),
        (Call(Name("builtins", "set"), (1,)), "something else than a list"),
        (Call(Name("builtins", "set"), ([1],)), "into a set"),
        ({(): 1}, "a value of type tuple as a key"),
        ({2**70: 1}, "a value of type int as a key"),
        (Raw(b"K\x01K\x02K\x03s"), "sets entries of a value of type int"),
        (Raw(b"K\x01K\x02a"), "appends to a value of type int"),
        (Raw(b"K\x01(K\x02\x90"), "adds elements to a value of type int"),
        (Raw(b"}(K\x01u"), "a key without a value"),
        (Raw(b"K\x01K\x02\x93"), "names something by"),
        (Raw(b"h\x00"), "refers to value 0"),
        (Raw(b"K\x01q\x63"), "under the number 99, out of order"),
        (Raw(b"R"), "empty stack"),
        (Raw(b"q\x00"), "empty stack"),
        (Raw(b""), "empty stack"),
        (Raw(b"t"), "closes what it never opened"),
        (Raw(b"\x82\x01"), "the opcode EXT1"),
        (Raw(b"o"), "the opcode OBJ"),
        (Raw(b"Pid\n"), "the opcode PERSID"),
        (Raw(b"\x92"), "the opcode NEWOBJ_EX"),
        (Raw(b"\x97"), "the opcode NEXT_BUFFER"),
        (Raw(b"\xff"), "the byte 255"),
        (Raw(b"X\x01\x00\x00\x00\xff"), "not UTF-8"),
        (Raw(b"cos"), "no end of line"),
        (Raw(b"\x8a\xff" + b"\x01" * 255), "an integer of 255 bytes"),
        (Raw(b"\x8b\xff\xff\xff\x7f"), "an integer of 2147483647 bytes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(value, reason):
    assert reason in refused(value)


@pytest.mark.parametrize("opcode", [b"X", b"T", b"B", b"\x8d", b"\x8e", b"\x96"])
def test_a_length_is_believed_only_as_far_as_there_is_data(opcode):
    length = b"\xff" * (8 if opcode in b"\x8d\x8e\x96" else 4)
    assert "ends too early" in refused(opcode + length + b"a.")


def test_every_cut_is_refused():
    whole = code({"a": [1, 2.5, (None, "b")], "c": New(Name("m", "Net"), {"d": 300})}) + b"."
    assert run(whole)["c"] == Record("m.Net", {"d": 300})
    for length in range(len(whole)):
        refused(whole[:length])


# Limits.


def test_opcodes_are_counted():
    assert "500000 steps" in refused(b"N0" * (limits.MAX_STEPS // 2 + 1) + b".")


def test_nesting_is_limited():
    assert run(b"(" * 200 + b"t" * 200 + b".")
    assert "nests more than 200" in refused(b"(" * 201)


def test_deep_containers_do_no_harm():
    """Lists in lists, which need no mark, down to a depth where recursion would end Python."""
    assert len(run(b"]" * 50_000 + b"a" * 49_999 + b".")) == 1


def test_the_stack_is_limited():
    assert "more than 100000 values" in refused(b"N" * (limits.MAX_STACK + 1))


def test_the_length_of_a_pickle_is_limited():
    long = b"B" + struct.pack("<I", limits.MAX_PICKLE) + bytes(limits.MAX_PICKLE) + b"."
    assert "longer than 8388608 bytes" in refused(long)


def test_copies_of_one_list_are_counted():
    """A list of 1,000 that is kept, and made into a dictionary or set 1,000 times."""
    pairs = code([["a", 1]] * 1000) + b"q\x000"
    made = code(ORDERED) + b"h\x00\x85R0"
    assert "steps" in refused(pairs + made * 1000 + b"N.")
    names = code(["a"] * 1000) + b"q\x000"
    made = code(Name("builtins", "set")) + b"h\x00\x85R0"
    assert "steps" in refused(names + made * 1000 + b"N.")


def test_keys_that_would_take_forever_to_hash_are_refused():
    """A tuple of the same tuple twice, 60 levels: 2**60 steps for its hash."""
    nested = b"K\x01" + b"2\x86" * 60
    assert "tuple as a key" in refused(b"}" + nested + b"Ns.")


def test_time_is_limited(monkeypatch):
    monkeypatch.setattr(limits, "MAX_SECONDS", -1.0)
    assert "seconds to read" in refused(b"N0" * 1000 + b"N.")


def test_no_unpickler_is_imported():
    assert not hasattr(pickles, "pickle")
