"""The originals' checkpoints become networks with the originals' logits, or are refused."""

import contextlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import shiftnet
from shiftnet import interchange
from shiftnet.cli import convert, evaluate
from shiftnet.config import default_config
from shiftnet.errors import UserError
from shiftnet.interchange import torch_names
from shiftnet.interchange.convert import fill
from shiftnet.interchange.recognition import recognise
from shiftnet.interchange.torch_names import SHIFT, TORCHVISION, WRN
from shiftnet.quantizers import LowBitWeight, of_layers
from tests import networks, oracle

FILES = oracle.FOLDER / "checkpoints"
BASE = "base_shiftresnet20_1.0_cifar100.npz"


def entries(expect: str) -> list[dict]:
    """The files of which `expect` says what must happen."""
    if not oracle.FOLDER.is_dir():
        return []
    listed = json.loads((oracle.FOLDER / "manifest.json").read_text())["checkpoints"]
    return [entry for entry in listed if entry["expect"].startswith(expect)]


def each(expect: str):
    """Of the many ways in which one network was saved, most are slow: test_read.py reads them."""
    cases = []
    for entry in entries(expect):
        name = Path(entry["file"]).name
        again = name.startswith("shiftresnet20") and not name.endswith((".zip.t7", ".legacy.t7"))
        if name != "m14_object_array.npz":
            cases.append(pytest.param(entry, id=name, marks=pytest.mark.slow if again else ()))
    return pytest.mark.parametrize(
        "entry", cases or [pytest.param({}, id="none", marks=oracle.needed)]
    )


def expected_logits(entry: dict) -> tuple[np.ndarray, np.ndarray]:
    """The input, NCHW, and the float64 logits of the original."""
    reference = np.load(oracle.FOLDER / (entry.get("base") or entry["expected"]))
    name = "logits_binarize_f64" if "logits_binarize_f64" in reference else "eval/logits"
    return reference["x"], reference[name]


@each("valid")
@pytest.mark.usefixtures("float64")
def test_logits_are_the_originals_in_float64(entry):
    if "w10" in entry["file"]:
        pytest.skip("a float16 file has other weights")
    found = recognise(interchange.read(oracle.FOLDER / entry["file"]).arrays)
    wide = {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array
        for name, array in found.arrays.items()
    }
    network = networks.abstract(found.model, found.num_classes)
    torch_names.from_torch(network, wide, found.naming, codes=found.codes)
    for _, leaf in nnx.to_flat_state(nnx.state(network)):  # latents made from codes are float32
        leaf.set_value(leaf[...].astype(np.float64))
    x, expected = expected_logits(entry)
    logits = networks.evaluate(network, x.astype(np.float64))
    oracle.assert_near({"logits": logits}, {"logits": expected}, 1e-9)


@oracle.needed
@pytest.mark.parametrize(
    "name",
    [
        "shiftresnet20_1.0_cifar100.py2_t03_cuda.t7",
        pytest.param("packed_dev_torch1.0.pth.tar", marks=pytest.mark.slow),
        "wrn_train_ckpt.pth.tar",
        pytest.param("s3_cifar8.pth.tar", marks=pytest.mark.slow),
        "s3_cifar8_deployed.pth.tar",
    ],
)
def test_the_command_writes_a_checkpoint_that_gives_the_originals_logits(name, tmp_path, capsys):
    (entry,) = [e for e in entries("valid") if e["file"] == f"checkpoints/{name}"]
    out = tmp_path / "out"
    assert convert.main([str(FILES / name), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f" evaluate {out}\n" in printed
    assert "parameters" in printed
    model = shiftnet.load(out)
    x, expected = expected_logits(entry)
    logits = np.asarray(model(np.moveaxis(x, 1, -1)))
    assert np.abs(logits - expected).max() <= 1e-4
    if "acc" in entry.get("check", {}):
        assert f"recorded accuracy: {entry['check']['acc']:g} % at epoch 163" in printed


@oracle.needed
def test_a_deployed_s3_network_is_the_one_that_was_trained():
    trained, deployed = (
        recognise(interchange.read(FILES / name).arrays)
        for name in ("s3_cifar8.pth.tar", "s3_cifar8_deployed.pth.tar")
    )
    assert trained.model == deployed.model
    both = []
    for found in (trained, deployed):
        network = networks.abstract(found.model, found.num_classes)
        torch_names.from_torch(network, found.arrays, found.naming, codes=found.codes)
        both.append({n: np.asarray(w()) for n, w in of_layers(network).items()})
    for name, weight in both[0].items():
        np.testing.assert_array_equal(both[1][name], weight, err_msg=name)


@each("refuse")
def test_what_must_be_refused_is_one_sentence_and_nothing_is_written(
    entry, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = convert.main([str(oracle.FOLDER / entry["file"]), "--out", "out"])
    captured = capsys.readouterr()
    if code == 0:
        # Allowed to be taken, with a word about what is odd.
        assert entry["expect"].startswith("refuse or")
        assert any(words in captured.out for words in ("not used", "not taken over", "state dict"))
        return
    assert code == 2
    assert captured.err.count("\n") == 1
    assert Path(entry["file"]).name in captured.err
    assert list(tmp_path.iterdir()) == []


# Without the originals' files


FIELDS = [
    ({"arch": "shiftresnet20"}, SHIFT),
    ({"arch": "shiftresnet8", "expansion": 0.7}, SHIFT),
    ({"arch": "shiftresnet14", "expansion": 9.0, "reduction": 2.8}, SHIFT),
    ({"arch": "resnet20"}, SHIFT),
    ({"arch": "resnet56", "reduction": 2.8, "reduction_mode": "block"}, SHIFT),
    ({"arch": "resnet8", "reduction": 2.8}, SHIFT),
    ({"arch": "depthwiseresnet20", "reduction": 0.38, "reduction_mode": "block"}, SHIFT),
    ({"arch": "wrn20", "width": 1.0, "weights": "sign"}, WRN),
    ({"arch": "wrn8", "width": 0.5, "weights": "sign"}, WRN),
    ({"arch": "resnet20", "weights": "s3"}, TORCHVISION),
    ({"arch": "imagenet_resnet18"}, TORCHVISION),
    ({"arch": "imagenet_resnet34", "weights": "s3"}, TORCHVISION),
    ({"arch": "imagenet_resnet101"}, TORCHVISION),
    (
        {
            "arch": "depthwiseresnet8",
            "reduction": 0.38,
            "reduction_mode": "block",
            "depthwise_skip": False,
        },
        SHIFT,
    ),
    ({"arch": "mobileresnet8", "reduction": 0.125, "reduction_mode": "block"}, SHIFT),
    ({"arch": "mobileresnet8"}, SHIFT),
    ({"arch": "shuffleresnet8", "reduction": 0.13, "reduction_mode": "block"}, SHIFT),
    ({"arch": "shuffleresnet8"}, SHIFT),
]


def named_zeros(fields: dict, naming, classes: int = 7) -> dict[str, np.ndarray]:
    """Arrays of a network under an original's names, too small to be a burden."""
    network = networks.abstract({**default_config().model, **fields}, classes)
    half = np.float32(0.5)
    return {
        name: np.broadcast_to(half, shape)
        for name, shape in torch_names.names(network, naming).items()
    }


@pytest.mark.core
@pytest.mark.parametrize(("fields", "naming"), FIELDS)
def test_networks_are_recognised_by_their_names_and_shapes(fields, naming):
    arrays = named_zeros(fields, naming)
    found = recognise(arrays)
    assert (found.num_classes, found.naming) == (7, naming)
    network = networks.abstract(found.model, 7)
    assert torch_names.names(network, naming) == {n: a.shape for n, a in arrays.items()}
    assert found.model["arch"] == fields["arch"]
    assert found.model["weights"] == fields.get("weights", "float")
    # Several expansions and reductions have the same channels; the shortest number is named.
    for name in ("expansion", "width"):
        assert found.model[name] == fields.get(name, 1.0)
    assert found.model["depthwise_skip"] == fields.get("depthwise_skip", True)
    assert found.model["reduction"] == pytest.approx(fields.get("reduction", 1.0), rel=0.1)


def test_a_wide_networks_latents_may_be_float_weights():
    arrays = named_zeros({"arch": "wrn8"}, WRN)
    assert recognise(arrays).model["weights"] == "sign"
    assert recognise(arrays, weights="float").model["weights"] == "float"


def test_a_packed_network_holds_its_signs(tmp_path):
    fields = {**default_config().model, "arch": "wrn8", "width": 0.5, "weights": "sign"}
    network = networks.random(fields, 10)
    arrays = torch_names.to_torch(network, WRN)
    for name, array in arrays.items():
        if ".conv" in name:
            arrays[name] = np.packbits(array >= 0, axis=1)
    np.savez(tmp_path / "packed.npz", **{f"module.{n}": a for n, a in arrays.items()})
    assert convert.main([str(tmp_path / "packed.npz"), "--out", str(tmp_path / "out")]) == 0
    loaded = of_layers(shiftnet.load(tmp_path / "out").network)
    for name, weight in of_layers(network).items():
        if isinstance(weight, LowBitWeight):
            np.testing.assert_array_equal(loaded[name](), weight(), err_msg=name)


@pytest.fixture
def digits_file(tmp_path) -> Path:
    """A ShiftResNet of 10 classes under the original's names, as .safetensors."""
    network = networks.random({**default_config().model, "arch": "shiftresnet8"}, 10)
    arrays = {
        name: np.ascontiguousarray(array) for name, array in torch_names.to_torch(network).items()
    }
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_safetensors_with_the_original_names_are_taken_and_evaluated(digits_file, tmp_path, capsys):
    argv = [str(digits_file), "--out", str(tmp_path / "out"), "--dataset", "digits"]
    assert convert.main(argv) == 0
    capsys.readouterr()
    assert evaluate.main(["--ckpt", str(tmp_path / "out"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["dataset"], row["images"]) == ("digits", 355)


def test_bad_input_is_one_sentence_and_nothing_is_harmed(digits_file, tmp_path, capsys):
    out = tmp_path / "out"
    for argv, sentence in (
        ([str(tmp_path / "nowhere.t7")], "nowhere.t7"),
        (
            [str(digits_file), "--dataset", "cifar100"],
            "knows 10 classes, --dataset cifar100 has 100",
        ),
        ([str(digits_file), "--dataset", "mnist"], "invalid choice: 'mnist'"),
    ):
        assert convert.main([*argv, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert sentence in error
        assert not out.exists()
    assert convert.main([str(digits_file), "--out", str(out)]) == 0
    before = sorted(path.name for path in out.rglob("*"))
    assert convert.main([str(digits_file), "--out", str(out)]) == 2
    assert "exists; take another place" in capsys.readouterr().err
    assert sorted(path.name for path in out.rglob("*")) == before


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.pop("layer1.0.bn1.weight"), "layer1.0.bn1.weight is missing"),
        (lambda a: a.update({"linear.bias": np.zeros(3, np.float32)}), "expected shape (7,)"),
        (lambda a: a.update({"bn1.bias": np.full(16, np.nan, np.float32)}), "bn1.bias holds nan"),
        (lambda a: a.update({"bn1.bias": np.zeros(16, np.int64)}), "bn1.bias holds int64"),
        (
            lambda a: a.update({"bn1.running_var": np.full(16, -1, np.float32)}),
            "bn1.running_var holds -1; a variance is not negative",
        ),
    ],
)
def test_arrays_that_are_missing_or_cannot_be_are_named(change, sentence):
    arrays = named_zeros({"arch": "shiftresnet8"}, SHIFT)
    change(arrays)
    with pytest.raises(UserError) as caught:
        fill(recognise(arrays))
    assert sentence in str(caught.value)


@pytest.mark.core
@settings(max_examples=25)  # `make fuzz` tries 22,000
@given(data=st.data())
def test_no_names_and_shapes_end_in_anything_but_a_sentence(data):
    fields, naming = data.draw(st.sampled_from(FIELDS[1:2] + FIELDS[5:6] + FIELDS[8:9]))
    arrays = named_zeros({**fields, "arch": re.sub(r"\d+", "8", fields["arch"])}, naming)
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), max_size=40, unique=True)):
        shape = data.draw(st.none() | st.lists(st.integers(0, 70), max_size=5))
        if shape is None:
            del arrays[name]
        else:
            dtype = data.draw(st.sampled_from([np.float32, np.uint8, np.int64]))
            arrays[name] = np.broadcast_to(dtype(1), shape)
    if data.draw(st.booleans()):
        arrays["layer1.999999999.conv1.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    with contextlib.suppress(UserError):
        fill(recognise(arrays))


@pytest.mark.core
def test_stages_without_blocks_or_with_empty_layers_are_refused():
    arrays = named_zeros({"arch": "resnet8"}, SHIFT)
    without = {n: a for n, a in arrays.items() if not n.startswith("layer2")}
    empty = {**arrays, "layer1.0.conv2.weight": np.zeros((0, 16, 3, 3), np.float32)}
    named = {**arrays, **{f"layer1.{i}.x": np.zeros(1) for i in range(500)}}
    for given_arrays, sentence in (
        (without, "layer2.0.conv2.weight is missing"),
        (empty, "none of them 0"),
        (named, "expected 1 to 400"),
    ):
        with pytest.raises(UserError, match=sentence):
            recognise(given_arrays)


@pytest.mark.core
def test_arrays_of_no_network_here_are_refused():
    with pytest.raises(UserError, match=r"no network here has such arrays.*found 1 arrays"):
        recognise({"fc1.weight": np.zeros((3, 3))})
    stages = {f"layer{i}.0.conv1.weight": np.zeros((1, 1, 3, 3)) for i in (1, 2, 3, 4)}
    with pytest.raises(UserError, match="no ResNet for ImageNet has stages of 1, 1, 1, 1 blocks"):
        recognise({**stages, "fc.weight": np.zeros((10, 1))})


def test_latents_count_among_the_parameters_that_are_named(digits_file, tmp_path, capsys):
    assert convert.main([str(digits_file), "--out", str(tmp_path / "out")]) == 0
    count = sum(leaf.size for leaf in jax.tree.leaves(shiftnet.load(tmp_path / "out").params))
    assert f"{count:,} parameters" in capsys.readouterr().out
