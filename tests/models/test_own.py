"""Networks of a user's own files: trained, evaluated, packed and exported like this package's."""

import json
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx

from shiftnet import config, models
from shiftnet.cli import count as count_command
from shiftnet.cli import evaluate, pack, train
from shiftnet.errors import UserError
from shiftnet.inference import Classifier
from shiftnet.models import own
from tests.test_packing import note

FILE = """
from flax import nnx
import jax
from shiftnet.layers import Conv, Shift


class Net(nnx.Module):
    def __init__(self, num_classes, *, rngs, weights="float", bits=0):
        self.stem = nnx.Conv(3, 6, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.mix = Conv(6, 6, 1, weights=weights, bits=bits, rngs=rngs)
        self.shift = Shift(kernel_size=3)
        self.head = nnx.Linear(6, num_classes, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.stem(x)))
        return self.head(self.mix(self.shift(x)).mean((1, 2)))


class Dropping(Net):
    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class Needy(Net):
    def __init__(self, num_classes, width, *, rngs):
        super().__init__(num_classes, rngs=rngs)


function = print
"""


@pytest.fixture(autouse=True)
def none_allowed(monkeypatch):
    monkeypatch.setattr(own, "_allowed", [])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def row_of(capsys, *arguments):
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_an_own_network_trains_is_evaluated_and_packed(file, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        textwrap.dedent(f"""
        from shiftnet.config import default_config

        def get_config():
            config = default_config()
            config.epochs, config.data.name, config.data.flip = 1, "digits", False
            config.schedule.boundaries = ()
            config.model.arch = {f"{file}:Net"!r}
            config.model.weights = "s3"
            return config
    """)
    )
    run = tmp_path / "run"
    assert train.main(["--config", str(recipe), "--workdir", str(run)]) == 0
    monkeypatch.setattr(own, "_allowed", [])
    # A checkpoint alone runs no code.
    assert evaluate.main([str(run)]) == 2
    assert f"not run unless you name it: --network {file}:Net" in capsys.readouterr().err
    trained = row_of(capsys, run, "--network", f"{file}:Net")
    assert 0.1 < trained["top1"] < 1.0
    packed = tmp_path / "net.safetensors"
    assert pack.main([str(run), str(packed), "--network", f"{file}:Net"]) == 0
    assert "mix" in capsys.readouterr().out
    again = row_of(capsys, packed, "--network", f"{file}:Net")
    for key in ("top1", "loss"):  # nnx.BatchNorm's statistics too
        assert again[key] == trained[key]


def test_the_features_of_an_own_network_are_those_of_a_layer_that_is_named(file):
    own.allow(f"{file}:Net")
    settings = config.default_config()
    settings.model = model(file, "Net")
    network = models.build(settings.model, 10, rngs=nnx.Rngs(0))
    classifier = Classifier(file, note(settings), network)
    x = np.zeros((1, 32, 32, 3), np.float32)
    assert classifier.features(x, "net.stem").shape == (1, 8, 8, 6)
    with pytest.raises(UserError, match=r"own; name one of net, net\.head"):
        classifier.features(x)


def test_many_images_give_the_logits_of_each(file):
    own.allow(f"{file}:Net")
    network = models.build(model(file, "Net"), 10, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).normal(size=(70, 32, 32, 3)).astype(np.float32)
    before = network(images[:32])
    # More than a CPU takes at a time, within `jax.jit` and without.
    graphdef, state = nnx.split(network)
    for logits in (
        network(images),
        jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images),
    ):
        np.testing.assert_allclose(logits[:32], before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits[38:], network(images[38:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"activations": "int8"},
        {"expansion": 3.0},
        {"shift": "sparse"},
        {"weights": "s3", "quantize_first_last": True},
    ],
)
def test_what_its_class_is_not_given_is_refused(file, fields):
    recipe = config.default_config()
    recipe.model.arch = f"{file}:Net"
    config.check_effects(recipe)
    recipe.model.update(fields)
    with pytest.raises(UserError, match=r"would be ignored: it applies to .*this package's net"):
        config.check_effects(recipe)


def test_it_is_compared_with_other_networks(file, capsys):
    assert (
        count_command.main(["--compare", "resnet8", f"{file}:Net", f"{file}:Net:weights=s3"]) == 0
    )
    assert f"{file}:Net:weights=s3" in capsys.readouterr().out


def test_it_is_counted_whatever_its_layers_are(file, capsys):
    command = ["--arch", f"{file}:Net", "--num-classes", "10", "--image-size", "32", "--json"]
    assert count_command.main(command) == 0
    counted = json.loads(capsys.readouterr().out)
    by_hand = 8 * 8 * 6 * 27 + 8 * 8 * 6 * 6 + 6 * 10
    assert counted["true"]["multiply_adds"] == by_hand


def model(file, name, weights="float"):
    recipe = config.default_config()
    recipe.model.arch, recipe.model.weights = f"{file}:{name}", weights
    return recipe.model


@pytest.mark.parametrize(
    ("name", "weights", "sentence"),
    [
        ("Missing", "float", r"nets\.py has no class Missing that is an nnx\.Module"),
        ("function", "float", "has no class function"),
        ("Dropping", "float", r"Dropping keeps RngCount, RngKey \(as dropout does\); expected"),
        ("Dropping", "s3", "Dropping takes no argument weights, and model.weights is s3"),
        ("Needy", "float", r"Needy\(num_classes, rngs\) raises TypeError: .*'width'"),
    ],
)
def test_what_is_not_such_a_network_is_one_sentence(file, name, weights, sentence):
    def build():
        own.allow(f"{file}:{name}")
        models.build(model(file, name, weights), 10, rngs=nnx.Rngs(0))

    with pytest.raises(UserError, match=sentence) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_file_that_raises_is_named_with_the_line(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(UserError, match=r"bad\.py raises ZeroDivisionError: .* \(line 2\)"):
        own.allow(f"{path}:Net")
    with pytest.raises(UserError, match="cannot be read"):
        own.allow(f"{tmp_path / 'none.py'}:Net")
    with pytest.raises(UserError, match=r"expected FILE\.py:CLASS"):
        own.allow("Net")


def test_evaluation_uses_running_statistics_and_training_the_batch_s(file):
    own.allow(f"{file}:Net")
    network = models.build(model(file, "Net"), 10, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 32, 32, 3)).astype(np.float32)
    before = np.asarray(network.net.norm.mean[...])
    evaluated = network(x)
    np.testing.assert_array_equal(network.net.norm.mean[...], before)
    trained = network(x, train=True)
    assert not np.allclose(trained, evaluated)
    assert not np.allclose(network.net.norm.mean[...], before)
    # In evaluation an image's logits do not depend on the others.
    np.testing.assert_allclose(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-5)
