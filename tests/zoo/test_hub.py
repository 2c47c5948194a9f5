"""Networks in the Hugging Face hub's layout: written, read, fetched, and their cards."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import shiftnet
from shiftnet import packing, results, zoo
from shiftnet.cli import export
from shiftnet.cli import models as command
from shiftnet.errors import UserError
from shiftnet.zoo import hub
from tests.cli.test_export import saved
from tests.loopback import QuietHandler, Server
from tests.test_packing import note, small

ROOT = Path(__file__).parents[2]
NAME = "shiftresnet20_1c_c100"
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The trained network in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub") / "net"
    assert export.main([NAME, "--hub", str(folder)]) == 0
    return folder


def test_the_folder_has_what_the_hub_expects_and_loads_as_the_same_network(folder):
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == zoo.find(NAME).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    model = shiftnet.load(folder)
    assert [config["id2label"][str(label)] for label in range(100)] == list(model.class_names)
    assert (config["model_type"], config["image_size"]) == ("shiftresnet20", 32)
    assert config["image_mean"] == list(model.mean)
    assert model.metadata["step"] == shiftnet.load(NAME).metadata["step"]


def test_a_card_says_all_there_is_to_know(folder, capsys):
    front, card = (folder / "README.md").read_text().split("---\n", 2)[1:]
    fields = {key: json.loads(text) for key, text in re.findall(r"^([\w-]+): (.*)$", front, re.M)}
    info = zoo.get(NAME)
    assert fields["library_name"] == "shiftnet"
    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(info.accuracy / 100)
    assert f"**{info.accuracy:.2f} % top-1** on the 10,000 test images of cifar100" in card
    for fact in (
        "40,756 parameters, 5,953,792 multiply-adds",
        f"{info.bytes:,} bytes",
        f"{results.mean_and_spread(info.over_seeds)} % over {len(info.over_seeds)} seeds",
        "Reported: 55.05 %",
        "configs/shiftresnet20_c100.py:expansion=1",
        f"reproduce --only {NAME} --seeds {len(info.over_seeds)}",
        "mean (0.4914, 0.4822, 0.4465)",
        "NVIDIA H200",
        "Apache License 2.0",
        "Krizhevsky",
        f'shiftnet.load("{NAME}")',
        "chosen on the test images",
        "wolf, woman, worm.",
    ):
        assert fact in card
    assert command.main([NAME, "--card"]) == 0
    assert capsys.readouterr().out.strip() == card.strip()


def test_a_network_of_ones_own_gets_a_card_that_claims_nothing(tmp_path, capsys):
    network = str(saved(tmp_path, weights="s3"))
    assert export.main([network, "--hub", str(tmp_path / "a \"b\" 'c'")]) == 0
    card = (tmp_path / "a \"b\" 'c'" / "README.md").read_text()
    assert 'shiftnet.load("a \\"b\\" \'c\'")' in card
    assert shlex.join(["shiftnet", "predict", "a \"b\" 'c'", "cat.jpg"]) in card
    assert export.main([network, "--hub", str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine" in card
    assert "It is not known here" in card
    assert "with 3-bit s3 weights in 8 layers; the other layers' stay float" in card
    assert "license" not in card.split("---")[1]
    assert repr(shiftnet.load(tmp_path / "mine")).startswith("Classifier(shiftresnet8 with s3")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert export.main([NAME, "--hub", str(tmp_path / "mine")]) == 2
    assert "mine is not empty" in capsys.readouterr().err
    assert export.main([NAME, "--hub", str(tmp_path / "mine" / "new" / "..")]) == 2
    assert "mine is not empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_odd_class_names_are_read_by_all_and_come_back(tmp_path):
    names = ["**a**", "b\n# c", "caf\udce9", "<d>", *"efghij"]
    network, recipe = small()
    recipe.data.source, recipe.data.dir = "folder", "/home/me/photos"
    packing.write(tmp_path / "net.safetensors", network, note(recipe) | {"class_names": names})
    assert export.main([str(tmp_path / "net.safetensors"), "--hub", str(tmp_path / "hub")]) == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text(encoding="utf-8"))
    assert [config["id2label"][str(label)] for label in range(10)] == names
    model = shiftnet.load(tmp_path / "hub")
    assert list(model.class_names) == names
    assert "10 classes of a folder of images, 32x32 images" in repr(model)
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert r"\*\*a\*\*, b\\n# c, caf\\udce9, \<d\>, e, f" in card
    assert "a folder of images, from the person who trained it" in card
    options = [str(tmp_path / "c" / "net.c"), "--calibrate-on", str(tmp_path / "photos")]
    for colour in "ab":
        (tmp_path / "photos" / colour).mkdir(parents=True)
        Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "photos" / colour / "1.png")
    assert export.main([str(tmp_path / "net.safetensors"), *options]) == 0
    assert r'"caf\351"' in (tmp_path / "c" / "main.c").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either OUT, the file to write, or --hub DIR"),
        (["out.npz", "--hub", "folder"], "expected either OUT"),
        (["--hub", "folder", "--packed"], "--packed does not apply to --hub"),
        (["--hub", "folder", "--report"], "--report does not apply to --hub"),
        (["--hub", "folder", "--image-size", "0"], "--image-size does not apply to --hub"),
    ],
)
def test_a_mixed_up_command_is_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main([NAME, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["hf://", "hf://owner", "hf://owner/name/file", "hf://o/n@"])
def test_an_address_that_is_none_is_a_sentence(address):
    with pytest.raises(UserError, match="expected hf://owner/name or"):
        shiftnet.load(address)


def test_without_its_package_an_address_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub.*pip install .shiftnet\[hub\]"):
        hub.fetch("hf://owner/name")


class HubHandler(QuietHandler):
    """Serves files as the hub does: by a revision, with the commit and a digest in the headers."""

    def translate_path(self, path):
        return super().translate_path(re.sub(r"/resolve/[^/]+/", "/", path.partition("?")[0]))

    def end_headers(self):
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"the-digest"')
        super().end_headers()


FETCH = "import sys; from shiftnet import zoo; print(zoo.find(sys.argv[1]))"


def test_a_network_is_fetched_from_the_hub_and_then_found_without_it(folder, tmp_path):
    pytest.importorskip("huggingface_hub", exc_type=ImportError)
    served = tmp_path / "served"
    (served / "owner").mkdir(parents=True)
    (served / "owner" / "net").symlink_to(folder)
    server = Server(served, HubHandler)
    home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}

    def fetch(address):
        command = [sys.executable, "-c", FETCH, address]
        found = subprocess.run(
            command, cwd=ROOT, env=os.environ | home, capture_output=True, text=True
        )
        return found.stdout.strip(), found.stderr

    try:
        path, errors = fetch("hf://owner/net")
        assert Path(path).is_relative_to(tmp_path / "home"), errors
        assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
        assert "UserError: hf://owner/other cannot be had" in fetch("hf://owner/other")[1]
    finally:
        server.close()
    home["HF_HUB_OFFLINE"] = "1"
    assert fetch("hf://owner/net")[0] == path
    assert shiftnet.load(path).class_names[-1] == "worm"


def test_the_hubs_own_library_reads_the_card(folder):
    library = pytest.importorskip("huggingface_hub", exc_type=ImportError)
    data = library.ModelCard.load(folder / "README.md").data
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "image-classification"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", zoo.get(NAME).accuracy / 100)
