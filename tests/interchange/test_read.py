"""Whole files: what each kind gives, and that the originals' files give exactly their weights."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shiftnet.errors import UserError
from shiftnet.interchange import UNFORESEEN, read
from shiftnet.interchange.networks import PLACES
from tests import oracle
from tests.interchange import files

NOT_AN_ARRAY = files.Name("models", "Net")
CHECKPOINTS = oracle.FOLDER / "checkpoints"


def entries() -> list[dict]:
    if not oracle.FOLDER.is_dir():
        return []
    return json.loads((oracle.FOLDER / "manifest.json").read_text())["checkpoints"]


def each(*starts: str, expect: str = "") -> pytest.MarkDecorator:
    """Runs a test for the originals' files of these names, or skips it once."""
    found = [
        pytest.param(entry, id=Path(entry["file"]).name)
        for entry in entries()
        if Path(entry["file"]).name.startswith(starts) and entry["expect"].startswith(expect)
    ]
    return pytest.mark.parametrize(
        "entry", found or [pytest.param({}, id="none", marks=oracle.needed)]
    )


def assert_same(ours, theirs, dtypes=None):
    """Names, shapes, types and bits."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        expected = value.astype((dtypes or {}).get(name, value.dtype))
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert ours[name].tobytes() == expected.tobytes(), name


@pytest.mark.core
@pytest.mark.parametrize("name", files.honest())
def test_every_kind_of_file_gives_its_arrays(name, read_bytes):
    found = read_bytes(files.honest()[name])
    _, storages = files.network()
    assert_same(found.arrays, dict(zip(files.NAMES, storages.values(), strict=True)))
    assert all(array.flags.c_contiguous and array.flags.owndata for array in found.arrays.values())


def test_a_module_tells_its_classes_and_plain_attributes(read_bytes):
    found = read_bytes(files.honest()["python2.t7"])
    assert found.format == "PyTorch legacy module pickle, Python 2"
    assert found.facts == {"acc": 55.05, "epoch": 3}
    assert found.modules == {
        "": "models.resnet.ResNet",
        "conv1": "torch.nn.modules.conv.Conv2d",
        "bn1": "torch.nn.modules.batchnorm.BatchNorm2d",
        "linear": "torch.nn.modules.linear.Linear",
    }
    assert found.fields[""] == {"training": True, "out_hw": (4, 64)}
    assert found.fields["conv1"] == {"training": True, "stride": (1, 1), "in_channels": 3}
    assert found.ignored == ()


def test_a_state_dict_comes_without_its_surroundings(read_bytes):
    found = read_bytes(files.honest()["deflated.pth"])
    assert found.format == "PyTorch zip state dict"
    assert (found.facts, found.ignored) == ({"epoch": 2}, ("optimizer",))
    assert (found.modules, found.fields) == ({}, {})


def test_a_parallel_wrapper_is_taken_off(read_bytes):
    top, storages = files.network()
    wrapper = files.Name("torch.nn.parallel.data_parallel", "DataParallel")
    device = files.Call(files.Name("torch", "device"), ("cuda", 0))
    wrapped = files.module(wrapper, modules={"module": top["net"]}, src_device_obj=device)
    found = read_bytes(files.legacy_file({"net": wrapped}, storages))
    assert list(found.arrays) == list(files.NAMES)
    assert found.modules[""] == "models.resnet.ResNet"


def test_buffers_that_are_no_state_are_left_out(read_bytes):
    _, storages = files.network()
    hidden = files.Call(files.Name("__builtin__", "set"), (["3"],))
    taken = {key: files.tensor(storages[key], key) for key in ("2", "3")}
    top = files.module(
        files.Name("models", "Net"), buffers=taken, _non_persistent_buffers_set=hidden
    )
    kept = {key: storages[key] for key in ("2", "3")}
    assert list(read_bytes(files.legacy_file(top, kept)).arrays) == ["2"]


def test_accuracies_that_are_tensors_become_numbers(read_bytes):
    values = {key: np.array([1.5], np.float32) for key in "abc"}
    top = {
        "state_dict": {"w": files.tensor(values["a"], "a")},
        "acc": files.tensor(values["b"], "b", shape=()),
        "best": files.tensor(values["c"], "c"),
        "scheduler": None,
    }
    found = read_bytes(files.legacy_file(top, values))
    assert found.facts == {"acc": 1.5, "best": 1.5}
    assert found.ignored == ("scheduler",)


def test_optimizers_and_schedulers_are_passed_over(read_bytes):
    value = np.zeros(3, np.float32)
    counter = files.Call(files.Name("collections", "Counter"), ({80: 1, 120: 1},))
    default = files.Call(
        files.Name("collections", "defaultdict"), (files.Name("builtins", "dict"),)
    )
    options = files.New(files.Name("argparse", "Namespace"), {"lr": 0.1})
    top = {
        "state_dict": {"w": files.tensor(value, "a")},
        "scheduler": {"milestones": counter},
        "optimizer": default,
        "args": options,
    }
    found = read_bytes(files.legacy_file(top, {"a": value}))
    assert found.ignored == ("scheduler", "optimizer", "args")


def test_all_that_may_stand_beside_a_network_is_left_out_by_name(read_bytes):
    found = read_bytes(files.honest()["beside.pth"])
    assert found.facts == {"acc": 91.25, "best": 91.25, "count": 3, "good": True}
    assert found.ignored == ("big_endian", *files.BESIDE)
    assert found.networks == ()


def test_a_second_network_is_named_and_can_be_taken(tmp_path, read_bytes):
    data = files.honest()["lightning.ckpt"]
    found = read_bytes(data)
    assert found.ignored == ("criterion.weight", "ema_model.* (5 arrays)", "state_dict_ema")
    assert found.networks == ("state_dict_ema",)
    (tmp_path / "file.ckpt").write_bytes(data)
    average = read(tmp_path / "file.ckpt", "state_dict_ema")
    assert list(average.arrays) == ["conv1.weight"]
    assert average.arrays["conv1.weight"].shape == (2,)
    with pytest.raises(UserError, match="no network under 'nowhere', found a dictionary of"):
        read(tmp_path / "file.ckpt", "nowhere")
    np.savez(tmp_path / "net.npz", w=np.zeros(2, np.float32))
    with pytest.raises(UserError, match="'model'; it holds one network alone"):
        read(tmp_path / "net.npz", "model")


@pytest.mark.core
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "model.", "net.module."])
def test_a_network_is_found_where_trainers_put_it(place, prefix, read_bytes):
    value = np.zeros(3, np.float32)
    top = {"epoch": 2, place: {f"{prefix}conv1.weight": files.tensor(value, "a")}}
    found = read_bytes(files.legacy_file(top, {"a": value}))
    assert (list(found.arrays), found.facts) == (["conv1.weight"], {"epoch": 2})


def test_a_name_that_few_have_is_no_prefix(read_bytes):
    names = ("model.a", "conv1.weight", "bn1.weight")
    value = np.zeros(3, np.float32)
    top = {"net": {name: files.tensor(value, "a") for name in names}}
    assert list(read_bytes(files.legacy_file(top, {"a": value})).arrays) == list(names)


def test_tensors_of_types_that_no_network_has_are_left_out_or_named(read_bytes, refusal):
    value = np.zeros(3, np.float32)
    storage = files.Persistent(
        ("storage", files.Name("torch.storage", "UntypedStorage"), "b", "cpu", 3)
    )
    rest = (0, (3,), (1,), False, None, files.Name("torch", "float8_e4m3fn"))
    new = files.Call(files.Name("torch._utils", "_rebuild_tensor_v3"), (storage, *rest))
    state = {"w": files.tensor(value, "a")}
    data = {"a": value, "b": np.zeros(3, np.uint8)}
    assert read_bytes(files.legacy_file({"net": state, "x": new}, data)).ignored == ("x",)
    reason = refusal(files.legacy_file({"net": {**state, "x": new}}, data))
    assert reason == "'x' in its network is a tensor of torch.float8_e4m3fn"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (files.scalar("f8", b"1234"), "a NumPy scalar of type f8 in 4 bytes"),
        (files.Call(files.Name("numpy", "dtype"), (8,)), "a numpy.dtype without a name"),
        (files.Call(files.Name("numpy.core.multiarray", "scalar"), (1, b"")), "without a dtype"),
        (
            files.Call(files.Name("numpy.core.multiarray", "_reconstruct"), (NOT_AN_ARRAY,)),
            "_reconstruct of another class",
        ),
        (files.Call(files.Name("_codecs", "encode"), ("a", "rot13")), "than bytes"),
        (files.Call(files.Name("_codecs", "encode"), ("\u0100", "latin1")), "bytes that are none"),
        (files.Call(files.Name("builtins", "bytes"), (10**9,)), "asks to run builtins.bytes"),
    ],
)
def test_a_value_beside_the_network_that_is_no_such_value_is_refused(value, reason, refusal):
    assert reason in refusal(files.legacy_file({"net": {}, "x": value}))


@pytest.mark.parametrize(
    ("top", "found"),
    [
        ({}, "an empty dictionary"),
        ({"acc": 1.0, "epoch": 3}, "a dictionary of 'acc', 'epoch'"),
        ({"net": None}, "a dictionary of 'net'"),
        ([1, 2], "a list"),
        (files.New(files.Name("models", "Net"), {"a": 1}), "a 'models.Net'"),
        (files.module(files.Name("models", "Net")), "a 'models.Net'"),
        ({"acc": files.tensor(np.ones((), np.float32), "a"), "epoch": 3}, "of 'acc', 'epoch'"),
    ],
)
def test_a_file_without_a_network_says_what_it_holds(top, found, refusal):
    data = {"a": np.ones((), np.float32)} if "acc" in str(top) and "Call" in str(top) else {}
    reason = refusal(files.legacy_file(top, data))
    assert reason.startswith("expected a network under 'net' or 'state_dict'")
    assert found in reason


NET = files.Name("models", "Net")
PARALLEL = files.Name("torch.nn.parallel.data_parallel", "DataParallel")


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (files.New(NET, {"_modules": 1}), "'_modules' of a 'models.Net' is not a dictionary"),
        (files.New(NET, {"_modules": {"a": 1}}), "'a' in its network is not a module"),
        (files.module(NET, {"w": 1}), "'w' in its network is not a tensor"),
        (files.module(NET, buffers={"b": "text"}), "'b' in its network is not a tensor"),
        (files.module(NET, modules={"a": NET}), "'a' in its network is not a module"),
        (files.module(PARALLEL), "its wrapper holds no module"),
        (files.module(PARALLEL, modules={"module": 1}), "its wrapper holds no module"),
        (files.module(files.Raw(b"U\x01mU\x03a\nb\x93")), "no printable text"),
    ],
)
def test_a_module_of_another_make_is_refused(net, reason, refusal):
    assert reason in refusal(files.legacy_file({"net": net}))


def test_names_that_are_given_twice_are_refused(refusal):
    value = np.zeros(3, np.float32)
    inner = files.module(NET, {"w": files.tensor(value, "a")})
    outer = files.module(NET, {"x.w": files.tensor(value, "a")}, modules={"x": inner})
    assert "two tensors named 'x.w'" in refusal(files.legacy_file(outer, {"a": value}))
    outer = files.module(NET, modules={"x.y": inner, "x": files.module(NET, modules={"y": inner})})
    assert "two modules named 'x.y'" in refusal(files.legacy_file(outer, {"a": value}))


@pytest.mark.parametrize("name", ["a\nb", "a" * 400, "\ud800", 7])
def test_names_that_cannot_be_shown_are_refused(name, refusal):
    value = np.zeros(3, np.float32)
    top = {"state_dict": {name: files.tensor(value, "a")}}
    assert "name" in refusal(files.legacy_file(top, {"a": value}))


def test_modules_without_end_are_refused(refusal):
    """Each of 40 modules holds the one before it twice: 2**40 paths."""
    kind = files.Name("models", "Net")
    code = files.PROTO + files.code(files.New(kind, {"_modules": {}})) + b"q\x00"
    for level in range(40):
        below = files.Raw(b"h" + bytes([level]))
        code += files.code(files.New(kind, {"_modules": {"a": below, "b": below}}))
        code += b"q" + bytes([level + 1])
    assert "10000 modules" in refusal(files.legacy_file(code + files.STOP))


def test_a_module_inside_itself_is_refused(refusal):
    kept = files.Raw(files.code(files.New(files.Name("models", "Net"))) + b"q\x01")
    loop = files.Build(kept, {"_modules": {"x": files.Raw(b"h\x01")}})
    assert "60 levels" in refusal(files.legacy_file(loop))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "starts with '<!DOCTYPE html><html>'"),
        (b"PK\x03\x04 and no more", "cut short or broken"),
        (b"\x80", "ends too early"),
        (b"\x1f\x8b\x08 and so on", "it is a gzip archive; unpack it"),
        (bytes(257) + b"ustar", "it is a tar archive; unpack it"),
        (
            files.zipped([("a/ckpt.t7", b"x"), ("__MACOSX/a/._ckpt.t7", b"y")]),
            "it is a zip of 'a/ckpt.t7': if a checkpoint is among them, unzip it",
        ),
        (files.PROTO + b"K\x01.", "magic number"),
        (files.pickled({"a": 1}), "magic number"),
    ],
)
def test_what_is_no_such_file_says_so(data, reason, refusal):
    assert reason in refusal(data)


def test_paths_that_are_no_file_say_so(tmp_path):
    with pytest.raises(UserError, match="absent: cannot be read, No such file"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="expected a file, found a folder"):
        read(tmp_path)


# The originals' files.

OTHER_TYPES = {"w09": np.float64, "w10": np.float16}  # of conv1.weight
VALID = each("shiftresnet20", expect="valid")


@VALID
def test_original_module_pickles_give_their_weights(entry, empty_folder):
    path = oracle.FOLDER / entry["file"]
    found = read(path)
    theirs = oracle.part(oracle.read(oracle.FOLDER / entry["base"]), "sd/")
    if "py2_t03" in path.name or "w16" in path.name:
        theirs = {n: a for n, a in theirs.items() if not n.endswith("num_batches_tracked")}
    dtype = next((kind for mark, kind in OTHER_TYPES.items() if mark in path.name), np.float32)
    assert_same(found.arrays, theirs, {"conv1.weight": dtype})
    assert found.facts == {
        "acc": pytest.approx(entry.get("check", {}).get("acc", 55.05)),
        "epoch": 163,
    }
    assert found.modules[""] == "models.resnet.ResNet"
    assert found.modules["layer1.0.conv1"] == "torch.nn.modules.conv.Conv2d"
    assert found.fields["layer1.0.conv1"]["kernel_size"] == (1, 1)
    assert found.ignored == ()
    assert ("Python 2" in found.format) == (".py2_" in path.name)
    assert ("zip" in found.format) == path.read_bytes().startswith(b"PK")


@oracle.needed
@pytest.mark.parametrize("kind", [".pth.tar", "_zip.pth.tar", "_torch1.0.pth.tar", ".npz"])
def test_original_packed_files_give_their_weights(kind, empty_folder):
    theirs = oracle.read(CHECKPOINTS / "packed_dev.npz")
    found = read(CHECKPOINTS / f"packed_dev{kind}")
    assert_same(found.arrays, {n.removeprefix("module."): a for n, a in theirs.items()})
    assert (found.facts, found.ignored, found.modules) == ({}, (), {})


@oracle.needed
def test_an_original_wide_resnet_gives_its_weights(empty_folder):
    theirs = oracle.part(oracle.read(CHECKPOINTS / "wrn_train_ckpt_expected.npz"), "sd/")
    found = read(CHECKPOINTS / "wrn_train_ckpt.pth.tar")
    assert_same(found.arrays, theirs)
    assert (found.facts, found.ignored) == ({"epoch": 17}, ("optimizer", "scheduler"))


@oracle.needed
@pytest.mark.parametrize("kind", ["", "_deployed"])
def test_original_s3_files_give_their_records(kind, empty_folder):
    """No reference of the weights is stored; the records of these zips are raw float32."""
    path = CHECKPOINTS / f"s3_cifar8{kind}.pth.tar"
    found = read(path)
    records = zipfile.ZipFile(path)
    raw = {
        record.read(name) for record in [records] for name in records.namelist() if "/data/" in name
    }
    for name, array in found.arrays.items():
        assert array.tobytes() in raw, name
    assert found.facts["arch"] == "resnet18"
    assert found.ignored == ("optimizer",)
    if kind:
        levels = found.arrays["layer1.0.conv1.weight"]
        assert set(np.unique(levels)) <= {-4, -2, -1, 0, 1, 2, 4}
    else:
        sign = found.arrays["layer1.0.conv1.weight_sign"]
        assert sign is found.arrays["layer1.0.conv1.weight"]


REASONS = {
    "m01": "it asks to run os.system",
    "m02": "it asks to run posix.system",
    "m03": "it asks to run builtins.eval",
    "m04": "it asks to run builtins.exec",
    "m05": "it asks to run builtins.getattr",
    "m06": "it asks to run posix.system",
    "m08": "it asks to run os.system",
    "m12": "it asks to run os.system",
    "m14": "pickled objects",
    "m21": "a member outside it",
    "b01": "unpack to 67109060",
    "b02": "must have 1099511627776 elements",
    "b04": "the storage has 16",
    "b07": "the storage has 16",
    "b11": "expected 1125899906842624 bytes more",
    "b14": "no record",
    "b22": "empty stack",
    "b23": "<!DOCTYPE html>",
    "b24": "it is empty",
    "trunc_0p3": "ends too early",
    "trunc_0p5": "cut short",
    "shiftresnet20_1.0_cifar100.w14": "found a dictionary of 'acc', 'epoch'",
}


@each("m", "b0", "b1", "b2", "trunc", "shiftresnet20_1.0_cifar100.w14", expect="refuse")
def test_hostile_and_broken_files_are_refused_with_the_reason(entry, refusal):
    path = oracle.FOLDER / entry["file"]
    reason = refusal(path.read_bytes())
    for start, fragment in REASONS.items():
        if path.name.startswith(start):
            assert fragment in reason


@each("")
def test_every_original_file_is_read_or_refused_by_a_check(entry, empty_folder):
    message = ""
    try:
        read(oracle.FOLDER / entry["file"])
    except UserError as error:
        message = str(error)
    assert UNFORESEEN not in message
