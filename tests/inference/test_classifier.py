"""A loaded network as a part of other programs: transformed, served, pickled, in threads."""

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import shiftnet
from shiftnet import packing
from shiftnet.data.images import CorruptImage
from shiftnet.errors import UserError
from tests.test_packing import images, note, small


@pytest.fixture
def model(tmp_path):
    network, recipe = small("s3")
    packing.write(tmp_path / "net.safetensors", network, note(recipe))
    return shiftnet.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "transform",
    [
        *(jax.jit, jax.eval_shape, jax.grad),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (jax.make_jaxpr, jax.vmap)),
    ],
)
def test_the_first_call_may_be_traced(model, transform):
    x = jnp.asarray(images())
    if transform is jax.eval_shape:
        assert jax.eval_shape(model, x).shape == (3, 10)
    elif transform is jax.vmap:
        assert jax.vmap(model)(x[None]).shape == (1, 3, 10)
    elif transform is jax.grad:
        assert jax.grad(lambda x: model(x).sum())(x).shape == x.shape
    else:
        transform(model)(x)
    logits = np.asarray(model(x))  # fails where something of the trace was kept
    np.testing.assert_allclose(jax.jit(model)(x), logits, rtol=1e-4, atol=1e-4 * abs(logits).max())


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).integers(0, 256, (13, 8, 8, 3), np.uint8)


def test_requests_of_any_size_share_a_few_programs(model, pixels, caplog):
    def programs():
        return sum(m.startswith("Compiling jit(probabilities)") for m in caplog.messages)

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for size in range(1, 14):
            model.predict(pixels[:size], batch_size=6)
        assert programs() == 4  # for 1, 2, 4 and 6 images
        model.predict(pixels, batch_size=6)
        assert programs() == 4


def test_an_image_is_classified_alike_alone_and_among_others(model, pixels):
    together = model.predict(pixels)
    for size in (1, 3, 5):
        some = model.predict(pixels[:size])
        np.testing.assert_allclose(
            some.probabilities, together.probabilities[:size], rtol=1e-4, atol=1e-6
        )
        assert some.names == together.names[:size]
    alone = jax.nn.softmax(
        model((pixels[:3] / np.float32(255) - np.float32(model.mean)) / np.float32(model.std))
    )
    np.testing.assert_allclose(model.predict(pixels[:3]).probabilities, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_that_classifies_nothing_is_refused(model, pixels, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        model.predict(pixels, batch_size=batch_size)


def test_a_network_that_was_called_can_be_pickled(model, pixels):
    before = model.predict(pixels[:2])
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict(pixels[:2]).probabilities, before.probabilities)
    assert (copy.path, copy.class_names, repr(copy)) == (model.path, model.class_names, repr(model))


def test_threads_share_one_compilation(model, pixels, caplog):
    alone = model.predict(pixels[:4])
    copy = pickle.loads(pickle.dumps(model))

    def predict(_):
        with jax.log_compiles():
            return copy.predict(pixels[:4])

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as threads:
        found = list(threads.map(predict, range(16)))
    for each in found:
        np.testing.assert_array_equal(each.probabilities, alone.probabilities)
    assert sum(m.startswith("Compiling jit(probabilities)") for m in caplog.messages) == 1


def test_it_says_what_it_is(model):
    assert repr(model) == (
        "Classifier(shiftresnet8 with 3-bit s3 weights, 10 classes of digits, 32x32 images, "
        f"from {model.path})"
    )


def as_seen(image):
    """What a network for 32x32 images sees, by Pillow alone: shorter side 32, then the middle."""
    scale = 32 / min(image.size)
    width, height = (int(scale * side) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    return np.asarray(image.crop((left, top, left + 32, top + 32)))


def test_people_give_paths_images_and_arrays(model, tmp_path):
    drawn = np.random.default_rng(5).integers(0, 256, (64, 96, 3), np.uint8)
    photo = Image.fromarray(drawn)
    photo.save(tmp_path / "photo.png")
    expected = model.predict(as_seen(photo)[None]).probabilities
    assert expected.shape == (1, 10)
    for given in (tmp_path / "photo.png", str(tmp_path / "photo.png"), photo, [drawn], [photo]):
        np.testing.assert_array_equal(model.predict(given).probabilities, expected)
    mixed = model.predict(iter([drawn, tmp_path / "photo.png", photo.convert("L")]))
    assert len(mixed) == 3
    np.testing.assert_allclose(mixed.probabilities[:2], expected.repeat(2, 0), rtol=1e-4, atol=1e-6)
    grey = np.asarray(photo.convert("L"))
    np.testing.assert_array_equal(
        model.preprocess.pixels(grey), as_seen(photo.convert("L").convert("RGB"))
    )
    x = model.preprocess([tmp_path / "photo.png"])
    normalized = (as_seen(photo) / 255 - np.array(model.mean)) / np.array(model.std)
    np.testing.assert_allclose(x, normalized[None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(model(x)), expected, rtol=1e-4, atol=1e-6)
    assert model.predict([]).names == []


def test_the_most_probable_classes_come_first(model, pixels):
    predictions = model.predict(pixels[:2])
    for row, name, top in zip(
        predictions.probabilities, predictions.names, predictions.top(3), strict=True
    ):
        assert [share for _, share in top] == sorted(row.tolist(), reverse=True)[:3]
        assert top[0][0] == name
    with pytest.raises(ValueError, match="k must be at least 1, got -1"):
        predictions.top(-1)


def test_photos_are_turned_as_their_exif_says(model, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees to show it
    photo = Image.fromarray(np.random.default_rng(6).integers(0, 256, (40, 60, 3), np.uint8))
    photo.save(tmp_path / "photo.png", exif=turned)
    shown = photo.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(model.preprocess.pixels(tmp_path / "photo.png"), as_seen(shown))
    stored = model.preprocess._replace(exif=False)
    np.testing.assert_array_equal(stored.pixels(tmp_path / "photo.png"), as_seen(photo))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (["none.jpg"], CorruptImage, r"none.jpg cannot be read \(No such file or directory\)"),
        (
            [np.zeros((8, 8, 3))],
            ValueError,
            r"expected an image as uint8 .*got float64 \(8, 8, 3\)",
        ),
        ([np.zeros((8, 8, 4), np.uint8)], ValueError, "expected an image as uint8"),
        ([np.zeros((0, 8, 3), np.uint8)], ValueError, "expected an image as uint8"),
        (np.zeros((2, 0, 8, 3), np.uint8), ValueError, r"expected uint8 \[N, H, W, 3\]"),
        ([3], TypeError, "expected a path, a PIL image or an array, got int"),
    ],
)
def test_what_is_no_image_is_refused(model, images, error, message):
    with pytest.raises(error, match=message):
        model.predict(images)


def test_features_are_what_the_last_layer_computes_with(model, pixels):
    x = model.preprocess(pixels[:3])
    features = np.asarray(model.features(x))
    assert features.shape == (3, 64)
    linear = model.network.linear
    logits = features @ np.asarray(linear.weight()) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(logits, model(x), rtol=1e-4, atol=1e-4 * abs(logits).max())
    block = np.asarray(model.features(x, "layer3.0"))
    assert block.shape == (3, 2, 2, 64)
    np.testing.assert_allclose(
        block.mean((1, 2)), features, rtol=1e-4, atol=1e-4 * abs(block).max()
    )
    np.testing.assert_allclose(model.features(x, "linear"), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        UserError, match=r"no layer 'layer3.1' is computed on its own; there are .*layer3.0"
    ):
        model.features(x, "layer3.1")
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.features(x), features)


@pytest.mark.parametrize("name", ["net.pth", "net.t7", "nets.zip"])
def test_a_file_of_other_code_is_pointed_to_its_converter(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=f"python -m shiftnet.convert_torch .*{name}"):
        shiftnet.load(tmp_path / name)


def test_a_path_is_expanded_and_a_url_refused(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.path.parent))
    assert shiftnet.load(f"~/{model.path.name}").path == model.path
    with pytest.raises(UserError, match="must be a local path, found the URL 'https://host/net'"):
        shiftnet.load("https://host/net")


def test_low_bit_weights_are_computed_at_loading_and_not_in_each_call(tmp_path):
    def operations(weights):
        network, recipe = small(weights)
        path = tmp_path / f"{weights}.safetensors"
        packing.write(path, network, note(recipe))
        jaxpr = jax.make_jaxpr(shiftnet.load(path))(jnp.asarray(images()))
        return [str(equation.primitive) for equation in jaxpr.eqns]

    as_floats = operations("float")
    assert len(as_floats) > 10
    for weights in ("sign", "s3", "denseshift"):
        assert operations(weights) == as_floats, weights
