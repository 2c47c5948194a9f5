"""Converted networks carry the right facts about their data, and what is guessed is said."""

import json

import numpy as np
import pytest

import shiftnet
from shiftnet import config as config_lib
from shiftnet import data
from shiftnet.cli import convert as command
from shiftnet.cli import evaluate
from shiftnet.data.cifar import NORMALIZATION, WRN_NORMALIZATION
from shiftnet.errors import UserError
from shiftnet.interchange import Foreign, originals, torch_names
from shiftnet.interchange.convert import Options, convert, names_of, recorded
from tests import networks

CIFAR = NORMALIZATION["cifar10"]
IMAGENET = data.IMAGENET_NORMALIZATION
GUESS = "which is a guess"


def foreign(arch, classes, **facts):
    """A file of another code with a network of this architecture, of small numbers."""
    model = {**config_lib.default_config().model, "arch": arch}
    if arch.startswith("wrn"):
        model["weights"] = "sign"
    network = networks.abstract(model, classes)
    arrays = {
        name: np.full(shape, 0.5, np.float32)
        for name, shape in torch_names.names(network, originals.naming(model)).items()
    }
    return Foreign(arrays, facts, {}, {}, (), (), "state dict")


@pytest.mark.core
@pytest.mark.parametrize(
    ("arch", "classes", "options", "name", "normalization"),
    [
        ("resnet8", 10, {}, "cifar10", CIFAR),
        ("shiftresnet8", 100, {}, "cifar100", CIFAR),
        ("wrn8", 100, {}, "cifar100", WRN_NORMALIZATION),
        ("wrn8", 37, {}, "unknown", WRN_NORMALIZATION),
        ("wrn8", 10, {"dataset": "digits"}, "digits", data.normalization("digits")),
        ("resnet8", 200, {}, "unknown", CIFAR),
        ("resnet8", 1000, {}, "unknown", CIFAR),
        ("imagenet_resnet18", 10, {}, "unknown", IMAGENET),
        ("imagenet_resnet18", 100, {}, "unknown", IMAGENET),
        ("imagenet_resnet18", 1000, {}, "imagenet2012", IMAGENET),
    ],
)
def test_a_data_set_follows_from_architecture_and_classes_or_is_unknown(
    arch, classes, options, name, normalization
):
    found = convert(foreign(arch, classes), "net.pth", Options(**options))
    recipe = config_lib.from_json(found.metadata["config"])
    assert recipe.data.name == name
    assert (found.metadata["mean"], found.metadata["std"]) == tuple(map(list, normalization))
    assert (recipe.data.mean, recipe.data.std) == tuple(map(tuple, normalization))
    assert (GUESS in found.report) == (name == "unknown")
    names = found.metadata["class_names"]
    if name in data.IN_MEMORY:
        assert names == list(data.class_names(name))
    else:
        assert names == [str(label) for label in range(classes)]


def test_what_people_know_overrules_what_is_guessed():
    options = Options(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), class_names=["cat", "dog", "ant"])
    found = convert(foreign("resnet8", 3), "net.pth", options)
    assert found.metadata["mean"] == [0.1, 0.2, 0.3]
    assert found.metadata["std"] == [1.0, 1.0, 1.0]
    assert found.metadata["class_names"] == ["cat", "dog", "ant"]
    assert GUESS not in found.report
    assert "mean and standard deviation: as given" in found.report


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dataset": "cifar100"}, "it knows 3 classes, --dataset cifar100 has 100"),
        ({"dataset": "imagenet2012"}, "it knows 3 classes, --dataset imagenet2012 has 1000"),
        ({"class_names": ["a", "b"]}, "it knows 3 classes, --class-names has 2"),
        ({"class_names": ["a", "b", "a"]}, "--class-names has a name twice"),
    ],
)
def test_facts_that_contradict_the_network_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        convert(foreign("resnet8", 3), "net.pth", Options(**options))


def test_class_names_come_from_a_file_or_the_command_line(tmp_path):
    (tmp_path / "lines.txt").write_text("cat\nhot dog\n")
    (tmp_path / "list.json").write_text('["cat", "hot dog"]')
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    (tmp_path / "bad.json").write_text('["cat",')
    (tmp_path / "marked.txt").write_text("cat\nhot dog\n", "utf-8-sig")  # as Windows' editor does
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    files = (str(tmp_path / name) for name in ("lines.txt", "list.json", "marked.txt"))
    for text in ("cat,hot dog", *files):
        assert names_of(text) == ["cat", "hot dog"]
    for text in (
        "cat,,dog",
        "",
        *(str(tmp_path / f) for f in ("gap.txt", "bad.json", "bytes.txt")),
    ):
        with pytest.raises(UserError, match="--class-names"):
            names_of(text)


@pytest.mark.parametrize(
    ("facts", "accuracy"),
    [
        ({"acc": 91.0, "epoch": 3}, 91.0),
        ({"best_prec1": 91.73}, 91.73),
        ({"best_acc1": float("nan"), "best_acc": 90}, 90),
        ({"acc": "high"}, None),
        ({"acc": 9100.0}, None),
    ],
)
def test_an_accuracy_is_found_under_its_usual_names(facts, accuracy):
    assert recorded(facts).get("accuracy") == accuracy


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["layer1.0.conv1.weight", "layer4.0.conv1.weight", "linear.weight"], "Kuang Liu's"),
        (
            [
                *(f"layer{n}.weight" for n in ("1.0.conv1", "1.0.conv2", "2.0.conv1")),
                "linear.weight",
            ],
            "option A",
        ),
        (["layer1.0.conv1.weight_orig", "fc.weight"], "pruned by torch.nn.utils.prune"),
        (["layer1.0.conv1.weight", "fc.parametrizations.weight.original0"], "parametrised"),
        (["conv1.0.weight", "layer1.0.conv1.weight", "fc.weight"], "ResNet-C and -D"),
        (["resnet.embedder.embedder.convolution.weight"], "Hugging Face"),
        (["layer1.0.conv1.weight"], "its last layer is missing"),
    ],
)
def test_near_misses_are_called_what_they_look_like(names, sentence):
    arrays = {name: np.zeros((16, 16, 3, 3), np.float32) for name in names}
    with pytest.raises(UserError, match=sentence):
        convert(Foreign(arrays, {}, {}, {}, (), (), ""), "net.pth", Options())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer1.0.conv2.weight": (128, 4, 3, 3)}, "16 groups: a ResNeXt"),
        ({"layer1.0.conv2.weight": (128, 128, 3, 3)}, "a wide ResNet of torchvision"),
    ],
)
def test_relatives_of_imagenets_resnets_are_told_apart(change, sentence):
    file = foreign("imagenet_resnet18", 3)
    arrays = {**file.arrays, **{n: np.zeros(s, np.float32) for n, s in change.items()}}
    out = next(iter(change.values()))[1] * (16 if "ResNeXt" in sentence else 1)
    arrays["layer1.0.conv1.weight"] = np.zeros((out, 64, 3, 3), np.float32)
    with pytest.raises(UserError, match=sentence):
        convert(Foreign(arrays, {}, {}, {}, (), (), ""), "net.pth", Options())


def test_a_network_of_unknown_data_loads_predicts_and_asks_for_images(tmp_path, capsys):
    file = foreign("resnet8", 3)
    np.savez(tmp_path / "net.npz", **file.arrays)
    argv = [str(tmp_path / "net.npz"), "--out", str(tmp_path / "out"), "--class-names", "a,b,c"]
    assert command.main([*argv, "--mean", "0.5,0.5,0.5", "--std", "1,1,1"]) == 0
    assert f" evaluate {tmp_path / 'out'} --data-dir FOLDER" in capsys.readouterr().out
    model = shiftnet.load(tmp_path / "out")
    assert (model.class_names, model.mean, model.std) == (("a", "b", "c"), (0.5,) * 3, (1.0,) * 3)
    assert set(model.predict(np.zeros((2, 32, 32, 3), np.uint8)).names) <= {"a", "b", "c"}
    assert evaluate.main(["--ckpt", str(tmp_path / "out"), "--json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown" in error or "--data-dir" in error


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--mean", "0.5,0.5", "--mean must be three numbers R,G,B, found '0.5,0.5'"),
        ("--mean", "nan,0,0", "--mean must be three finite numbers"),
        ("--std", "0.5,0,0.5", "--std must be three positive numbers"),
        ("--entry", "ema", "has no network under 'ema'"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(option, value, sentence, tmp_path, capsys):
    np.savez(tmp_path / "net.npz", w=np.zeros(2, np.float32))
    argv = [str(tmp_path / "net.npz"), "--out", str(tmp_path / "out")]
    assert command.main([*argv, f"{option}={value}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_a_second_network_in_the_file_is_named_in_the_report():
    file = foreign("resnet8", 10)
    other = Foreign(file.arrays, {}, {}, {}, ("args", "model_ema"), ("model_ema",), "state dict")
    report = convert(other, "net.pth", Options()).report
    assert "left out: args, model_ema" in report
    assert "model_ema holds a network too; --entry model_ema takes it" in report


def test_the_description_of_a_file_is_json():
    found = convert(foreign("resnet8", 10), "net.pth", Options())
    assert json.loads(originals.description(found.metadata)).keys() == set(originals.DESCRIBED)
