"""Exported networks compute the same elsewhere, and their arrays have the originals' names."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import shiftnet
from shiftnet import checkpoint, data, packing
from shiftnet import config as config_lib
from shiftnet.cli import convert, export
from shiftnet.interchange import recognition, torch_names
from shiftnet.interchange.stablehlo import stablehlo
from tests import networks, oracle
from tests.test_packing import note


def saved(tmp_path, **model):
    """A checkpoint of a small network, and that network."""
    recipe = config_lib.default_config()
    recipe.model.update({"arch": "shiftresnet8", **model})
    network = networks.random(recipe.model, 10)
    states = nnx.split(network, nnx.Param, nnx.BatchStat)[1:]
    return checkpoint.write(tmp_path / "ckpt", checkpoint.to_arrays(*states), note(recipe))


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)

MODELS = pytest.mark.parametrize(
    "model",
    [
        {},
        {"arch": "wrn8", "weights": "sign"},
        pytest.param({"weights": "s3"}, marks=pytest.mark.slow),
    ],
)

# What someone runs who has JAX and not this package; prints nothing of its own.
ELSEWHERE = """
import sys
import numpy as np
from jax import export

assert not any(name.startswith("shiftnet") for name in sys.modules)
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert sorted(program.platforms) == ["cpu", "cuda", "tpu"]
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([program.call(images), program.call(images[:2])]))
"""


@pytest.mark.core
@MODELS
def test_a_program_runs_in_a_fresh_process_without_this_package(model, tmp_path, capsys):
    ckpt = saved(tmp_path, **model)
    out = tmp_path / "net.stablehlo"
    assert export.main([str(ckpt), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "uint8 [batch, 32, 32, 3] to float32 [batch, 10]" in printed
    np.save(tmp_path / "images.npy", IMAGES)
    argv = [out, tmp_path / "images.npy", tmp_path / "logits.npy"]
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, argv)], check=True, cwd=tmp_path, timeout=300
    )
    logits = np.load(tmp_path / "logits.npy")
    loaded = shiftnet.load(ckpt)
    mean, std = (np.array(values, np.float32) for values in (loaded.mean, loaded.std))
    expected = np.asarray(loaded((IMAGES.astype(np.float32) / 255 - mean) / std))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits[:5], expected, atol=1e-4 * scale)
    np.testing.assert_allclose(logits[5:], expected[:2], atol=1e-4 * scale)


def test_a_low_bit_program_holds_a_byte_a_weight(tmp_path):
    sizes = []
    for weights in ("float", "s3"):
        folder = tmp_path / weights
        folder.mkdir()
        out = folder / "net.stablehlo"
        ckpt = saved(folder, arch="resnet20", weights=weights)
        assert export.main([str(ckpt), str(out)]) == 0
        sizes.append(out.stat().st_size)
    # 269,824 weights of 1 byte in place of 4.
    assert sizes[0] - sizes[1] > 2.9 * 269_824


def test_a_packed_file_exports_the_same_program(tmp_path):
    ckpt = saved(tmp_path, weights="s3")
    model = shiftnet.load(ckpt)
    packing.write(tmp_path / "packed.safetensors", model.network, model.metadata)
    logits = []
    for source in (ckpt, tmp_path / "packed.safetensors"):
        loaded = shiftnet.load(source)
        content = stablehlo(loaded.network, loaded.mean, loaded.std, 32)
        program = jax.export.deserialize(bytearray(content))
        logits.append(np.asarray(program.call(IMAGES)))
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ({}, 32),
        ({"weights": "denseshift"}, 32),
        ({"arch": "resnet8", "weights": "s3", "weight_bits": 2}, 32),
        ({"arch": "depthwiseresnet8"}, 32),
        ({"arch": "wrn8", "weights": "sign"}, 32),
        ({"arch": "imagenet_resnet18"}, 64),
        ({"arch": "shiftnet_b"}, 64),
        ({"dtype": "bfloat16"}, 32),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_an_onnx_program_of_every_family_computes_the_same(model, size, tmp_path, capsys):
    pytest.importorskip("jax2onnx", reason="needs jax2onnx, in an environment of its own")
    runtime = pytest.importorskip("onnxruntime")
    ckpt = saved(tmp_path, **model)
    out = tmp_path / "net.onnx"
    assert export.main([str(ckpt), str(out), "--image-size", str(size)]) == 0
    is_said = "computes in float32, the network in bfloat16" in capsys.readouterr().out
    assert is_said == ("dtype" in model)
    session = runtime.InferenceSession(out)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [size, size, 3])
    assert (result.name, result.type, result.shape[1:]) == ("logits", "tensor(float)", [10])
    loaded = shiftnet.load(ckpt)
    properties = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(properties["class_names"])) == loaded.class_names
    images = data.load("digits").test.images[:7]
    images = np.pad(images, [(0, 0), *[(0, size - images.shape[1])] * 2, (0, 0)])
    loaded.graphdef, *_ = nnx.split(_in_float32(loaded.network), nnx.Param, nnx.BatchStat)
    mean, std = (np.array(values, np.float32) for values in (loaded.mean, loaded.std))
    expected = np.asarray(loaded((images.astype(np.float32) / 255 - mean) / std))
    for count in (7, 1):
        (logits,) = session.run(None, {"images": images[:count]})
        np.testing.assert_allclose(logits, expected[:count], atol=1e-4 * np.abs(expected).max())


def _in_float32(network):
    network.dtype = None
    return network


@pytest.mark.parametrize(
    ("model", "naming"),
    [
        ({}, torch_names.SHIFT),
        ({"arch": "wrn8", "weights": "sign"}, torch_names.WRN),
        ({"arch": "resnet8", "weights": "s3"}, torch_names.TORCHVISION),
        ({"arch": "imagenet_resnet18"}, torch_names.TORCHVISION),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_arrays_go_back_under_the_originals_names(model, naming, ending, tmp_path):
    ckpt = saved(tmp_path, **model)
    out = tmp_path / f"net.{ending}"
    assert export.main([str(ckpt), str(out)]) == 0
    arrays = safetensors.numpy.load_file(out) if ending == "safetensors" else dict(np.load(out))
    expected = torch_names.to_torch(shiftnet.load(ckpt).network, naming)
    counts = {name for name in arrays if name.endswith("num_batches_tracked")}
    assert len(counts) == sum(name.endswith("running_var") for name in arrays) > 0
    assert set(arrays) - counts == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    # Also by itself, where the description is lost.
    found = recognition.recognise(arrays)
    assert found.naming == naming
    assert found.model["arch"] == model.get("arch", "shiftresnet8")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nowhere", "net.stablehlo"], "nowhere does not exist"),
        (["nowhere", "net.pb"], "must end in one of .stablehlo"),
        (["nowhere", "net.stablehlo", "--image-size", "0"], "--image-size must be at least 1"),
        (["nowhere", "net.npz", "--image-size", "64"], "--image-size is for programs"),
        (
            ["nowhere", "net.stablehlo", "--calibration-images", "7"],
            "--calibration-images is for .c",
        ),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_wide_network_goes_back_in_the_originals_packed_form(ending, tmp_path):
    ckpt = saved(tmp_path, arch="wrn8", weights="sign")
    out = tmp_path / f"net.{ending}"
    assert export.main([str(ckpt), str(out), "--packed"]) == 0
    arrays = safetensors.numpy.load_file(out) if ending == "safetensors" else dict(np.load(out))
    assert all(name.startswith("module.") for name in arrays)
    bits = arrays["module.group1.block0.conv0"]
    assert (bits.dtype, bits.shape) == (np.uint8, (32, 2, 3, 3))
    plain = torch_names.to_torch(shiftnet.load(ckpt).network, torch_names.WRN)
    signs = np.unpackbits(bits, axis=1)
    np.testing.assert_array_equal(signs == 1, plain["group1.block0.conv0"] >= 0)
    # And back again, through the converter.
    assert convert.main([str(out), "--out", str(tmp_path / "back")]) == 0
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = np.asarray(shiftnet.load(ckpt)(x))
    logits = shiftnet.load(tmp_path / "back")(x)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@oracle.needed
def test_the_originals_packed_file_comes_back_as_it_was(tmp_path):
    file = oracle.FOLDER / "checkpoints" / "packed_dev.npz"
    assert convert.main([str(file), "--out", str(tmp_path / "ckpt")]) == 0
    out = tmp_path / "net.npz"
    assert export.main([str(tmp_path / "ckpt"), str(out), "--packed"]) == 0
    theirs, ours = np.load(file), np.load(out)
    assert set(theirs.files) == set(ours.files)
    for name in theirs.files:
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_only_1_bit_wide_networks_have_a_packed_form(tmp_path, capsys):
    for model, sentence in (
        ({}, "--packed is for 1-bit wide ResNets, this is a shiftresnet8"),
        ({"arch": "wrn8", "width": 0.25, "weights": "sign"}, "channels that 8 divides"),
    ):
        folder = tmp_path / model.get("arch", "shift")
        folder.mkdir()
        ckpt = saved(folder, **model)
        assert export.main([str(ckpt), str(folder / "net.npz"), "--packed"]) == 2
        assert sentence in capsys.readouterr().err
        assert not (folder / "net.npz").exists()
    for option in ("--packed", "--integers"):
        assert export.main([str(ckpt), str(tmp_path / "net.stablehlo"), option]) == 2
        assert f"{option} is for arrays" in capsys.readouterr().err


def test_integers_of_a_checkpoint_come_back_as_the_same_network(tmp_path, capsys):
    ckpt = saved(tmp_path, weights="denseshift", weight_bits=2)
    assert export.main([str(ckpt), str(tmp_path / "net.npz"), "--integers"]) == 0
    assert convert.main([str(tmp_path / "net.npz"), "--out", str(tmp_path / "back")]) == 0
    assert "shiftresnet8 with 2-bit denseshift weights" in capsys.readouterr().out
    before, after = (shiftnet.load(path) for path in (ckpt, tmp_path / "back"))
    assert after.metadata["class_names"] == before.metadata["class_names"]
    assert (after.mean, after.std) == (before.mean, before.std)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(after(x), before(x))


def test_what_cannot_be_exported_is_said(tmp_path, capsys, monkeypatch):
    ckpt = saved(tmp_path)
    model = shiftnet.load(ckpt)
    packing.write(tmp_path / "packed.safetensors", model.network, model.metadata)
    assert export.main([str(tmp_path / "packed.safetensors"), str(tmp_path / "net.npz")]) == 2
    assert "its batch norms are no longer the original's" in capsys.readouterr().err
    packed = tmp_path / "packed.safetensors"
    before = packed.read_bytes()
    assert export.main([str(packed), str(packed), "--integers"]) == 2
    assert "is the network that is to be exported" in capsys.readouterr().err
    assert packed.read_bytes() == before
    assert export.main([str(ckpt), str(tmp_path / "net.npz"), "--integers"]) == 2
    assert "--integers is for low-bit weights, this shiftresnet8" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert export.main([str(ckpt), str(tmp_path / "net.pth")]) == 2
    assert "torch, which is not installed here; take .safetensors" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert export.main([str(ckpt), str(tmp_path / "net.onnx")]) == 2
    assert "jax2onnx, which is not installed here; --help says how" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export.main([str(ckpt), str(tmp_path / "net.onnx"), "--integers"]) == 2
    assert "needs onnx, which is not installed here; --help says how" in capsys.readouterr().err
    assert not list(tmp_path.glob("net.*"))
