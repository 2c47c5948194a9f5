"""Packed files: small, bit-equal weights, and nothing that was altered is taken."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import shiftnet
from shiftnet import checkpoint, packing, quantizers, tensor_file
from shiftnet import config as config_lib
from shiftnet.cli import evaluate, pack
from shiftnet.errors import UserError
from shiftnet.inference import classifier
from shiftnet.models import counting
from shiftnet.quantizers import form
from tests import networks

FORMS = [("sign", 0), ("s3", 2), ("s3", 3), ("s3", 4), ("denseshift", 3), ("float", 0)]


def note(recipe, classes=10) -> dict:
    return {
        "config": config_lib.to_json(recipe),
        "class_names": [f"class {i}" for i in range(classes)],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "step": 3,
    }


def small(form="s3", bits=3, arch="shiftresnet8"):
    recipe = config_lib.default_config()
    recipe.model.arch, recipe.model.weights = arch, form
    recipe.model.weight_bits = 0 if form in ("float", "sign") else bits
    recipe.data.name = "digits"
    return networks.random(recipe.model, 10), recipe


def images(size=12):
    return np.random.default_rng(1).normal(size=(3, size, size, 3)).astype(np.float32)


@pytest.mark.core
@pytest.mark.parametrize(
    ("form", "bits", "constant_bytes"),
    [(*form, classifier.CONSTANT_BYTES) for form in FORMS] + [("s3", 3, 0)],
)
def test_low_bit_weights_come_back_bit_for_bit_and_the_network_computes_the_same(
    form, bits, constant_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(classifier, "CONSTANT_BYTES", constant_bytes)
    network, recipe = small(form, bits)
    before = {name: np.asarray(w()) for name, w in quantizers.of_layers(network).items()}
    logits = networks.evaluate(network, np.moveaxis(images(), -1, 1))
    packing.write(tmp_path / "net.safetensors", network, note(recipe))
    model = shiftnet.load(tmp_path / "net.safetensors")
    after = quantizers.of_layers(model.network)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name](), expected, err_msg=name)
    np.testing.assert_allclose(model(images()), logits, rtol=1e-4, atol=1e-4 * abs(logits).max())
    assert config_lib.to_json(model.config) == config_lib.to_json(recipe)
    assert model.class_names[3] == "class 3"
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.mark.core
@pytest.mark.parametrize(
    ("arch", "fields", "classes", "rest", "most"),
    [
        # The page's 3.5 MiB; what is asked for S3.
        ("wrn20", {"width": 10.0, "weights": "sign"}, 100, "float32", 3.70),
        ("wrn20", {"width": 10.0, "weights": "sign"}, 100, "float16", 3.53),
        pytest.param(
            *("imagenet_resnet18", {"weights": "s3"}, 1000, "float32", 6.5), marks=pytest.mark.slow
        ),
    ],
)
def test_files_are_as_small_as_promised(arch, fields, classes, rest, most, tmp_path):
    recipe = config_lib.default_config()
    recipe.model.update(arch=arch, **fields)
    network = networks.random(recipe.model, classes)
    file = tmp_path / "net.safetensors"
    packing.write(file, network, note(recipe, classes), rest)
    assert file.stat().st_size / 1e6 <= most


def test_a_float16_rest_keeps_the_low_bit_weights_exact(tmp_path):
    network, recipe = small()
    low = {n: np.asarray(w()) for n, w in quantizers.of_layers(network).items() if w.bits < 32}
    packing.write(tmp_path / "net.safetensors", network, note(recipe), "float16")
    after = quantizers.of_layers(shiftnet.load(tmp_path / "net.safetensors").network)
    for name, expected in low.items():
        np.testing.assert_array_equal(after[name](), expected)


def test_two_packs_of_one_network_are_the_same_file(tmp_path):
    files = []
    for name in ("a.safetensors", "b.safetensors"):
        network, recipe = small()
        packing.write(tmp_path / name, network, note(recipe))
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_a_number_that_float16_cannot_hold_is_refused_by_name(tmp_path):
    network, recipe = small()
    network.linear.bias.set_value(network.linear.bias[...].at[3].set(1e6))
    with pytest.raises(UserError, match=r"linear\.bias has a value of 1e\+06, more than float16"):
        packing.write(tmp_path / "net.safetensors", network, note(recipe), "float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.core
@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({"weights": "ternary"}, {"layer1.0.conv1": 2}),
        ({"weights": "apot"}, {"layer1.0.conv1": 4}),
        ({"weights": "pot"}, {"layer1.0.conv1": 5}),
        ({"weights": "int", "weight_bits": 3}, {"layer1.0.conv1": 3}),
        (
            {"weights": "s3", "weights_of": "layer3.*:pot/2", "weights_first_last": "int"},
            {"conv1": 8, "layer2.0.conv1": 3, "layer3.0.conv2": 2, "linear": 8},
        ),
    ],
    ids=lambda value: value.get("weights") if isinstance(value, dict) else "",
)
def test_weights_whose_scale_depends_on_latents_come_back_bit_for_bit(fields, bits, tmp_path):
    recipe = config_lib.default_config()
    recipe.model.update(arch="shiftresnet8", **fields)
    network = networks.random(recipe.model, 10)
    before = quantizers.of_layers(network)
    file = tmp_path / "net.safetensors"
    packing.write(file, network, note(recipe))
    tensors = safetensors.numpy.load_file(file)
    after = quantizers.of_layers(packing.read(file)[0])
    assert after.keys() == before.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name](), weight(), err_msg=name)
        assert after[name].packed_bytes == weight.packed_bytes
    for name, width in bits.items():
        assert tensors[f"{name}.weight"].dtype == np.uint8
        assert tensors[f"{name}.weight"].nbytes == -(-before[name].size * width // 8)
    packing.write(tmp_path / "again.safetensors", *packing.read(file))
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


class PerChannel(quantizers.LowBitWeight):
    """Signs times the mean of the latents' sizes in each output channel."""

    levels = (-1, 1)

    def __init__(self, shape, *, init, rngs):
        super().__init__(shape, ["latent"], init=init, rngs=rngs)
        self.scale_shape = (shape[-1],)

    @property
    def scale(self):
        latent = self.latent[...]
        return abs(latent).mean(range(latent.ndim - 1))

    def level(self):
        return form.sign(self.latent[...])


def test_a_scale_per_output_channel_is_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(quantizers.FORMS, "sign", (PerChannel, ()))
    network, recipe = small("sign")
    before = {name: np.asarray(w()) for name, w in quantizers.of_layers(network).items()}
    packing.write(tmp_path / "net.safetensors", network, note(recipe))
    loaded = packing.read(tmp_path / "net.safetensors")[0]
    scales = safetensors.numpy.load_file(tmp_path / "net.safetensors")
    assert scales["layer1.0.conv1.weight_scale"].shape == (16,)
    assert "conv1.weight_scale" not in scales  # float
    for name, weight in quantizers.of_layers(loaded).items():
        np.testing.assert_array_equal(weight(), before[name], err_msg=name)


def test_a_code_without_a_level_is_refused(tmp_path):
    network, recipe = small("s3", 3)
    file = tmp_path / "net.safetensors"
    packing.write(file, network, note(recipe))
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["layer1.0.conv1.weight"][:] = 255  # seven levels, and 7 is the eighth
    file.write_bytes(tensor_file.to_bytes(tensors, metadata, packing.FORMAT))
    with pytest.raises(UserError, match=r"'layer1\.0\.conv1\.weight' do not fit: code 7 is none"):
        packing.read(file)


# Files that are not right


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    network, recipe = small()
    file = tmp_path_factory.mktemp("good") / "net.safetensors"
    packing.write(file, network, note(recipe))
    return file.read_bytes()


def altered(good: bytes, tmp_path, change) -> str:
    """Rewrites the file with its tensors and metadata changed; the message that refuses it."""
    file = tmp_path / "net.safetensors"
    file.write_bytes(good)
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, file, metadata)
    with pytest.raises(UserError) as caught:
        packing.read(file)
    return str(caught.value)


@pytest.mark.core
def test_an_altered_tensor_is_named(good, tmp_path):
    def flip(tensors, metadata):
        changed = tensors["layer2.0.conv1.weight"].copy()
        changed[5] ^= 1
        tensors["layer2.0.conv1.weight"] = changed

    assert "'layer2.0.conv1.weight' does not have its checksum" in altered(good, tmp_path, flip)


@pytest.mark.parametrize("name", ["layer1.0.bn1.scale", "linear.bias"])
def test_a_tensor_that_was_removed_or_added_is_named(good, tmp_path, name):
    message = altered(good, tmp_path, lambda tensors, _: tensors.pop(name))
    assert repr(name) in message
    message = altered(good, tmp_path, lambda tensors, _: tensors.update(new=np.zeros(2)))
    assert "'new'" in message


def test_what_its_test_images_were_held_out_from_is_kept(tmp_path):
    network, recipe = small()
    for undivided in ({}, {"undivided": "0a" * 32}):
        packing.write(tmp_path / "net.safetensors", network, note(recipe) | undivided)
        assert packing.read(tmp_path / "net.safetensors")[1] == note(recipe) | undivided


def test_altered_metadata_is_refused(good, tmp_path):
    message = altered(good, tmp_path, lambda _, metadata: metadata.update(step="4"))
    assert "its metadata does not have its checksum" in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("class_names", "3"),
        ("mean", '["a"]'),
        ("mean", "[0.5]"),
        ("mean", "[0.5, NaN, 0.5]"),
        ("std", None),
        ("std", "[0.0, 0.2, 0.2]"),
        ("config", "{"),
        ("config", "{}"),
        ("tensors", "[1]"),
        ("undivided", "[1]"),
    ],
)
def test_metadata_that_was_made_up_with_a_right_checksum_is_refused(good, tmp_path, name, text):
    def change(_, metadata):
        metadata[name] = text
        if text is None:
            del metadata[name]
        metadata["sha256"] = tensor_file.digest_of_text(metadata)

    assert "metadata that cannot be read" in altered(good, tmp_path, change)


def test_every_flipped_byte_is_refused(good, tmp_path):
    file = tmp_path / "net.safetensors"
    draw = np.random.default_rng(0)
    for place in [*range(24), *draw.integers(24, len(good), 100).tolist()]:
        changed = bytearray(good)
        changed[place] ^= 1 << int(draw.integers(8))
        file.write_bytes(changed)
        with pytest.raises(UserError):
            packing.read(file)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut_off_is_refused(good, tmp_path, length):
    (tmp_path / "net.safetensors").write_bytes(good[:length])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        packing.read(tmp_path / "net.safetensors")


def test_a_foreign_file_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="not one of shiftnet's"):
        packing.read(tmp_path / "net.safetensors")


# The commands


def test_the_command_packs_a_checkpoint_that_evaluate_and_load_take(tmp_path, capsys):
    network, recipe = small("sign")
    _, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    arrays = checkpoint.to_arrays(params, stats)
    known = note(recipe) | {"class_names": [str(digit) for digit in range(10)]}
    saved = checkpoint.write(tmp_path / "ckpt", arrays, known)
    out = tmp_path / "net.safetensors"
    assert pack.main([str(saved), str(out)]) == 0
    before = out.read_bytes()
    assert pack.main([str(out), str(out), "--rest=float16"]) == 2
    assert "is the network that is to be packed; take another name" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert pack.main([str(saved), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "layer1.0.conv1" in printed
    assert f"({out.stat().st_size:,} bytes)" in printed
    rows = []
    for path in (saved, out):
        assert evaluate.main(["--ckpt", str(path), "--json"]) == 0
        rows += json.loads(capsys.readouterr().out)
    assert rows[0]["top1"] == rows[1]["top1"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nowhere", "out.safetensors"], "nowhere does not exist"),
        (["nowhere", "out.bin"], "out.bin must end in .safetensors"),
        (["nowhere", "out.safetensors", "--rest", "int8"], "invalid choice"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pack.main(argv) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_others_with_a_dtype_that_numpy_lacks_is_pointed_to_the_converter(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "net.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"^[^:]* is a safetensors file, but not one of shiftnet's"):
        shiftnet.load(path)


def test_two_weights_in_a_layer_are_refused():
    class Twice(nnx.Module):
        def __init__(self):
            make = quantizers.make("s3")
            self.first, self.second = (make((3, 8), rngs=nnx.Rngs(0)) for _ in "ab")

    network = nnx.Sequential(Twice())
    for use in (quantizers.of_layers, quantizers.regularizer):
        with pytest.raises(UserError, match=r"layers\.0 has more than one weight of a form"):
            use(network)


class Odd(nnx.Module):
    """A low-bit weight by a name of its own, and whole numbers as statistics."""

    def __init__(self, num_classes, *, rngs):
        self.kernel = quantizers.make("s3")((3, num_classes), rngs=rngs)
        self.order = nnx.BatchStat(jnp.array([2, 0, 1]))

    def __call__(self, x):
        return x.mean((1, 2))[:, self.order[...]] @ self.kernel()


def test_a_weight_of_any_name_and_whole_numbers_come_back(tmp_path, monkeypatch):
    recipe = config_lib.default_config()
    network = Odd(10, rngs=nnx.Rngs(0))
    monkeypatch.setattr(
        packing.models, "build", lambda _, classes, *, rngs: Odd(classes, rngs=rngs)
    )
    counts = counting.count(network, (8, 8, 3))
    assert (counts.parameters, counts.weight_bytes) == (30, 30 * 3 / 8 // 1 + 1)
    logits = np.asarray(network(images()))
    packing.write(tmp_path / "net.safetensors", network, note(recipe))
    found, _ = packing.read(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(found(images()), logits)
