"""Every network with every weight form goes out under the originals' names and comes back whole."""

import json

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from shiftnet import config as config_lib
from shiftnet import interchange, packing, quantizers
from shiftnet.errors import UserError
from shiftnet.interchange import originals
from shiftnet.interchange.convert import Options, convert, fill
from shiftnet.interchange.recognition import recognise
from shiftnet.models import FAMILIES
from tests import networks, oracle
from tests.models.test_imagenet import weights_by_recipe
from tests.test_packing import note

FORMS = [
    (name, bits)
    for name, (_, choices) in quantizers.FORMS.items()
    for bits in (choices[:: len(choices) - 1] if len(choices) > 3 else choices or (0,))
]
LOW_BIT = FORMS[1:]
SMALL = ("shiftresnet8", "resnet8", "depthwiseresnet8", "wrn8")
RIVALS = ("mobileresnet8", "shuffleresnet8")
LARGE = ("shiftnet_a", "shiftnet_b", "shiftnet_c", "imagenet_resnet18", "imagenet_resnet50")
WIDTHS = {"wrn8": {"width": 0.5}, "shiftresnet8": {"expansion": 0.5}}
ROUNDED = ("ternary", "apot", "pot", "int")
# Of forms that round a float weight one network is enough: their arrays are named like the others'.
MATRIX = [
    (arch, form, bits)
    for form, bits in FORMS
    for arch in SMALL
    if arch == "shiftresnet8" or form not in ROUNDED
]
MATRIX += [(arch, form, bits) for arch in RIVALS for form, bits in (("float", 0), ("s3", 3))]


def thinned(rows):
    """Marks rows as slow whose architecture and form have been before, each with another."""
    seen, cases = set(), []
    for row in rows:
        new = {row[0], row[1:]} - seen
        seen |= new
        cases.append(pytest.param(*row, marks=() if new else pytest.mark.slow))
    return cases


def recipe_of(arch, form, bits, **fields):
    recipe = config_lib.default_config()
    recipe.model.update({"arch": arch, "weights": form, "weight_bits": bits})
    recipe.model.update({**WIDTHS.get(arch, {}), **fields})
    return recipe


def come_back(path, named, metadata, *, bare=False):
    """The network and metadata that a file of these arrays gives."""
    text = originals.description(metadata)
    path.write_bytes(originals.to_bytes(named, text, path.suffix, bare=bare))
    return convert(interchange.read(path), path.name, Options())


def assert_same(before, after):
    """The same program, equal numbers and equal weights: so equal logits.

    Bit for bit, but for integers whose scale is a mean of float32 latents, which rounds.
    """
    assert nnx.graphdef(after) == nnx.graphdef(before)
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(network))) for network in (before, after))
    assert ours.keys() == theirs.keys()
    differ = {path for path in ours if not np.array_equal(ours[path][...], theirs[path][...])}
    weights = [quantizers.of_layers(network) for network in (before, after)]
    for layer, weight in weights[0].items():
        latents = {path for path in differ if ".".join(map(str, path[:-1])) == f"{layer}.weight"}
        if latents:  # of integers, whose latents are made up; a scale follows from some latents
            apart = 1e-4 if isinstance(weight, quantizers.Rounded) else 0
            np.testing.assert_allclose(weights[1][layer](), weight(), rtol=apart, err_msg=layer)
        differ -= latents
    assert not differ


def test_the_matrix_has_every_family():
    assert {arch.rstrip("0123456789") for arch in (*SMALL, *RIVALS, *LARGE)} == set(FAMILIES)


@pytest.mark.parametrize(("arch", "form", "bits"), MATRIX)
def test_every_network_with_every_weight_form_comes_back_whole(arch, form, bits, tmp_path):
    recipe = recipe_of(arch, form, bits)
    network = networks.random(recipe.model, 10)
    back = come_back(tmp_path / "net.npz", originals.arrays(network, recipe.model), note(recipe))
    assert_same(network, back.network)
    if form == "float":
        with pytest.raises(UserError, match="--integers is for low-bit weights"):
            originals.integers(network, recipe.model)


@pytest.mark.parametrize(
    ("arch", "form", "bits"), thinned(row for row in MATRIX if row[1] != "float")
)
def test_integers_of_every_layer_come_back_as_the_same_network(arch, form, bits, tmp_path):
    recipe = recipe_of(arch, form, bits, quantize_first_last=True)
    network = networks.random(recipe.model, 10)
    named = originals.integers(network, recipe.model)
    back = come_back(tmp_path / "net.safetensors", named, note(recipe))
    assert_same(network, back.network)


def test_layers_of_different_forms_come_back_as_they_were(tmp_path):
    recipe = recipe_of(
        *("shiftresnet8", "s3", 3), weights_of="layer2.*:int/2", weights_first_last="int/8"
    )
    network = networks.random(recipe.model, 10)
    for name, write in (("all.npz", originals.arrays), ("integers.npz", originals.integers)):
        back = come_back(tmp_path / name, write(network, recipe.model), note(recipe))
        assert_same(network, back.network)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda named: named.pop("conv1.weight_scale"), "conv1.weight_scale must be floating num"),
        (
            lambda named: named.update({"conv1.weight_scale": np.float32(0)}),
            "conv1.weight_scale holds 0; a scale is finite and above 0",
        ),
        (
            lambda named: named.update({"conv1.weight": named["conv1.weight"].astype(np.uint8)}),
            "conv1.weight is packed in bits; expected a int weight",
        ),
    ],
)
def test_integers_without_a_sound_scale_are_refused(change, sentence, tmp_path):
    recipe = recipe_of("shiftresnet8", "int", 8, weights_first_last="int")
    named = originals.integers(networks.random(recipe.model, 10), recipe.model)
    named = {name: np.asarray(array) for name, array in named.items()}
    change(named)
    with pytest.raises(UserError, match=sentence):
        come_back(tmp_path / "net.npz", named, note(recipe))


@pytest.mark.parametrize("form", ROUNDED)
def test_weights_before_rounding_are_not_taken_for_float_ones(form):
    recipe = recipe_of("shiftresnet8", form, 0)
    named = originals.arrays(networks.random(recipe.model, 10), recipe.model)
    with pytest.raises(UserError, match=r"it holds weights before they are rounded \(layer1"):
        recognise(named)


@pytest.mark.parametrize(("form", "bits"), [("float", 0), ("sign", 0), ("denseshift", 3)])
@pytest.mark.parametrize("arch", LARGE)
@pytest.mark.covering
def test_large_networks_are_described_by_their_files_too(arch, form, bits):
    """By names and shapes alone: their numbers go the same way, and would take gigabytes."""
    recipe = recipe_of(arch, form, bits, quantize_first_last=form != "float")
    network = networks.abstract(recipe.model, 7)
    names = originals.torch_names.names(network, originals.naming(recipe.model))
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()}
    text = originals.description(note(recipe, classes=7))
    found = originals.recognise_described(zeros, originals.described({originals.DESCRIPTION: text}))
    assert (found.model, found.num_classes) == (recipe.model.to_dict(), 7)
    assert found.arrays.keys() == names.keys()


@pytest.mark.parametrize(
    "arch", ["shiftnet_b", pytest.param("imagenet_resnet18", marks=pytest.mark.slow)]
)
def test_a_large_network_comes_back_whole(arch, tmp_path):
    recipe = recipe_of(arch, "sign", 0)
    network = networks.random(recipe.model, 3)
    for form, name in ((originals.arrays, "a"), (originals.integers, "b")):
        named = form(network, recipe.model)
        back = come_back(tmp_path / f"{name}.safetensors", named, note(recipe, classes=3))
        assert_same(network, back.network)


@pytest.mark.core
@pytest.mark.parametrize(
    ("arch", "form", "bits"),
    [("shiftresnet8", "sign", 0), ("resnet8", "denseshift", 3), ("wrn8", "s3", 2)],
)
def test_logits_are_equal_to_the_bit(arch, form, bits, tmp_path):
    recipe = recipe_of(arch, form, bits, dtype="bfloat16")
    network = networks.random(recipe.model, 10)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    expected = networks.evaluate(network, x)
    for write in (originals.arrays, originals.integers):
        back = come_back(tmp_path / "net.npz", write(network, recipe.model), note(recipe))
        np.testing.assert_array_equal(networks.evaluate(back.network, x), expected)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_metadata_come_back_and_options_overrule_them(ending, tmp_path):
    recipe = recipe_of("shiftresnet8", "sign", 0)
    recipe.data.name, recipe.optimizer.lr = "digits", 0.5
    named = originals.arrays(networks.random(recipe.model, 10), recipe.model)
    path = tmp_path / f"net.{ending}"
    back = come_back(path, named, note(recipe))
    found = config_lib.from_json(back.metadata["config"])
    assert (found.data.name, found.optimizer.lr) == ("digits", 0.5)
    for name in ("class_names", "mean", "std"):
        assert back.metadata[name] == note(recipe)[name]
    options = Options(mean=(0.5, 0.5, 0.5), class_names=list("abcdefghij"))
    other = convert(interchange.read(path), "net", options).metadata
    assert other["mean"] == [0.5] * 3
    assert other["std"] == note(recipe)["std"]
    assert other["class_names"] == list("abcdefghij")
    with pytest.raises(UserError, match="--weights is float, the file says sign"):
        convert(interchange.read(path), "net", Options(weights="float"))


@pytest.mark.parametrize(
    ("arch", "form", "bits"), thinned(row for row in MATRIX if row[1] not in ROUNDED)
)
def test_without_its_description_a_network_is_right_or_refused(arch, form, bits):
    """But a 1-bit network under the names of a float one, which --weights sign names."""
    recipe = recipe_of(arch, form, bits)
    network = networks.abstract(recipe.model, 10)
    names = originals.torch_names.names(network, originals.naming(recipe.model))
    zeros = {name: np.broadcast_to(np.float32(0.5), shape) for name, shape in names.items()}
    weights = form if form in ("float", "sign") else None
    found = recognise(zeros, weights=weights).model
    assert {**found, "expansion": 1, "weight_bits": found["weight_bits"] or bits} == {
        **recipe.model.to_dict(),
        "expansion": 1,
    }
    if weights is None:
        with pytest.raises(
            UserError, match=f"--weights is sign, but the arrays are those of {form}"
        ):
            recognise(zeros, weights="sign")


def test_integers_without_their_description_are_refused():
    recipe = recipe_of("resnet8", "sign", 0)
    named = originals.integers(networks.random(recipe.model, 10), recipe.model)
    with pytest.raises(UserError, match="lost the description"):
        recognise(named)


@pytest.mark.parametrize("form", ["sign", "s3", "denseshift"])
def test_integers_times_scales_are_the_weights(form):
    recipe = recipe_of("depthwiseresnet8", form, 0 if form == "sign" else 4)
    network = networks.random(recipe.model, 10)
    named = originals.integers(network, recipe.model)
    for layer, weight in quantizers.of_layers(network).items():
        array, expected = named[f"{layer.replace('.projection', '')}.weight"], np.asarray(weight())
        if isinstance(weight, quantizers.LowBitWeight):
            assert array.dtype == (np.int16 if form == "denseshift" else np.int8)
            scale = named[f"{layer.replace('.projection', '')}.weight_scale"]
            assert (scale.dtype, scale.shape) == (np.float32, ())
            array = array * scale
        axes = (2, 3, 1, 0) if array.ndim == 4 else (1, 0)
        np.testing.assert_array_equal(array.transpose(axes), expected, err_msg=layer)


def test_a_packed_network_has_integers_and_scale_and_bias(tmp_path):
    recipe = recipe_of("shiftresnet8", "s3", 3)
    network = networks.random(recipe.model, 10)
    weight, var = (network.bn1.scale[...], network.bn1.var[...])
    packing.write(tmp_path / "net.safetensors", network, note(recipe))
    network, _ = packing.read(tmp_path / "net.safetensors")
    named = originals.integers(network, recipe.model)
    np.testing.assert_allclose(named["bn1.weight"], weight / np.sqrt(var + 1e-5), rtol=1e-6)
    assert "bn1.running_var" not in named
    with pytest.raises(UserError, match="its batch norms are no longer the original's"):
        originals.arrays(network, recipe.model)
    with pytest.raises(
        UserError, match=r"batch norms are folded \(there is no bn1\.running_mean\)"
    ):
        come_back(tmp_path / "integers.npz", named, note(recipe))


@oracle.needed
@pytest.mark.parametrize("case", ["s3_cifar8", "deployed_resnet18"])
def test_a_deployed_s3_file_comes_out_value_for_value(case, tmp_path):
    path = oracle.FOLDER / "checkpoints" / "s3_cifar8_deployed.pth.tar"
    if case == "deployed_resnet18":
        listed = json.loads((oracle.FOLDER / "img__deployed_resnet18.names.json").read_text())
        arrays = weights_by_recipe("deployed", listed["names"], listed["seed"])
        path = tmp_path / "net.npz"
        np.savez(path, **{f"module.{name}": array for name, array in arrays.items()})
    before = interchange.read(path)
    converted = convert(before, path.name, Options())
    model = config_lib.from_json(converted.metadata["config"]).model
    assert model.weights == "s3"
    named = originals.integers(converted.network, model)
    for name, array in before.arrays.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(named[name], array, err_msg=name)
    kept = {n for n in named if not n.endswith(("_scale", "_tracked"))}
    assert kept == {n for n in before.arrays if not n.endswith("_tracked")}
    back = come_back(tmp_path / "back.safetensors", named, converted.metadata)
    assert_same(converted.network, back.network)


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: "{", "cannot be read"),
        (lambda d: "7", "cannot be read"),
        (lambda d: json.dumps({**d, "class_names": [1]}), "class_names is not a list of texts"),
        (lambda d: json.dumps({**d, "mean": [0, 0]}), "expected three numbers"),
        (lambda d: json.dumps({**d, "std": [0, 0, 0]}), "expected three positive numbers"),
        (lambda d: json.dumps({**d, "config": "{}"[:1]}), "is not JSON"),
        (lambda d: json.dumps({n: d[n] for n in d if n != "std"}), "cannot be read: 'std'"),
        (lambda d: "[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_description_is_refused(change, reason):
    recipe = recipe_of("resnet8", "float", 0)
    text = originals.description(note(recipe))
    with pytest.raises(UserError, match="its description of the network cannot be read") as caught:
        originals.described({originals.DESCRIPTION: change(json.loads(text))})
    assert reason in str(caught.value)


def test_a_description_of_another_network_is_refused():
    recipe = recipe_of("resnet8", "float", 0)
    named = originals.arrays(networks.random(recipe.model, 10), recipe.model)
    recipe.model.arch = "resnet9998"
    found = note(recipe)
    with pytest.raises(UserError, match="resnet9998 is described, which has more than"):
        originals.recognise_described(named, found)
    recipe.model.update({"arch": "resnet8", "weights": "s3"})
    named["layer1.0.conv1.weight"] = np.full((16, 16, 3, 3), 3, np.int8)
    with pytest.raises(UserError, match=r"conv1\.weight holds 3; expected one of -4, -2"):
        fill(originals.recognise_described(named, note(recipe)))


def test_a_state_dict_is_all_that_others_find(tmp_path):
    recipe = recipe_of("shiftresnet8", "float", 0)
    named = originals.arrays(networks.random(recipe.model, 10), recipe.model)
    text = originals.description(note(recipe))
    (tmp_path / "a.npz").write_bytes(originals.to_bytes(named, text, ".npz", bare=False))
    assert set(np.load(tmp_path / "a.npz").files) == set(named)
    content = originals.to_bytes(named, text, ".safetensors", bare=False)
    assert set(safetensors.numpy.load(content)) == set(named)
    names = json.dumps({"a": "b" * 70_000})
    with pytest.raises(UserError, match=r"an \.npz can hold 65535; take \.safetensors"):
        originals.to_bytes(named, names, ".npz", bare=False)
