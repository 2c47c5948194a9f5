"""CIFAR from archive to arrays, on small archives of the official layout served on loopback."""

import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from shiftnet import data
from shiftnet.data import cifar, cifar_tfds
from shiftnet.errors import UserError
from tests.loopback import QuietHandler, Server

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "cifar"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real CIFAR images are not in ../shared/cifar"
)

TRAIN, TEST = 20, 6  # images in the small archives
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse"]
CIFAR10_CLASSES += ["ship", "truck"]
FILES = {
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch"),
    "cifar100": ("cifar-100-binary", ["train.bin"], "test"),
}


def examples(name):
    """Random images and labels; the labels include the first and the last class."""
    rng = np.random.default_rng(len(name))
    classes = 10 if name == "cifar10" else 100
    made = {}
    for split, count in ("train", TRAIN), ("test", TEST):
        labels = rng.integers(0, classes, count)
        labels[:2] = 0, classes - 1
        made[split] = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8), labels
    return made


def coarse_labels(fine):
    return fine % 20


def members(name):
    """The files of an archive of the official layout, {name: content}."""
    folder, train_files, test_file = FILES[name]
    records = {}
    for split, (images, labels) in examples(name).items():
        columns = [labels] if name == "cifar10" else [coarse_labels(labels), labels]
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        records[split] = np.column_stack([*columns, pixels]).astype(np.uint8)
    files = {
        f"{folder}/{file}": part.tobytes()
        for file, part in zip(
            train_files, np.split(records["train"], len(train_files)), strict=True
        )
    }
    files[f"{folder}/{test_file}.bin"] = records["test"].tobytes()
    if name == "cifar10":
        files[f"{folder}/batches.meta.txt"] = "\n".join([*CIFAR10_CLASSES, "\n"]).encode()
    else:
        files[f"{folder}/fine_label_names.txt"] = "\n".join(data.class_names(name)).encode()
        coarse = "\n".join(f"coarse_{i}" for i in range(20))
        files[f"{folder}/coarse_label_names.txt"] = coarse.encode()
    return files


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file, content in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def nowhere():
    """A URL that refuses the connection."""
    with http.server.HTTPServer(("127.0.0.1", 0), QuietHandler) as closed:
        port = closed.server_port
    return f"http://127.0.0.1:{port}/archive.tar.gz"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "tfds"


@pytest.fixture
def prepared(root):
    """A TFDS directory with a prepared cifar10, from an archive put in place by hand."""
    archive = tar(members("cifar10"))
    path = root / "downloads" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(archive)
    cifar.prepare("cifar10", root, "http://never.invalid/", sha256(archive))
    return root


def assert_is(name, splits):
    for split, (images, labels) in examples(name).items():
        found_images, found_labels = splits[split]
        assert found_images.dtype == np.uint8
        assert found_labels.dtype == np.int32
        np.testing.assert_array_equal(found_images, images)
        np.testing.assert_array_equal(found_labels, labels)


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.core
@pytest.mark.parametrize("name", cifar.NAMES)
def test_a_fresh_machine_downloads_prepares_and_reads(name, server, root, capfd):
    archive = tar(members(name))
    url = server.put(archive)
    loaded = data.load(name, data_dir=str(root), url=url, sha256=sha256(archive).upper())
    assert_is(
        name,
        {
            "train": (loaded.train.images, loaded.train.labels),
            "test": (loaded.test.images, loaded.test.labels),
        },
    )
    # Three plain lines, and none of TFDS's own.
    out, err = capfd.readouterr()
    assert out == ""
    path = root / "downloads" / Path(cifar.ARCHIVES[name].url).name
    folder = root / name / "3.0.2"
    assert err.splitlines() == [
        f"{name}: downloading {url} to {path}",
        f"{name}: preparing {folder}",
        f"{name}: decoding {folder}",
    ]


@pytest.mark.parametrize("name", cifar.NAMES)
def test_tfds_itself_reads_what_we_prepared(name, server, root):
    archive = tar(members(name))
    cifar.load(name, str(root), url=server.put(archive), sha256=sha256(archive))
    for split, (images, labels) in examples(name).items():
        source = tfds.data_source(name, split=split, data_dir=root)
        assert len(source) == len(images)
        for example in source:
            index = int(example["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(example["image"], images[index])
            assert example["label"] == labels[index]
            if name == "cifar100":
                assert example["coarse_label"] == coarse_labels(labels[index])
    features = tfds.builder(name, data_dir=root).info.features
    assert features["label"].names == list(data.class_names(name))


def test_an_archive_put_in_place_by_hand_needs_no_network(root, nowhere):
    archive = tar(members("cifar10"))
    path = root / "downloads" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(archive)
    assert_is("cifar10", cifar.load("cifar10", str(root), url=nowhere, sha256=sha256(archive)))


def test_a_prepared_directory_is_used_without_network(prepared, nowhere, monkeypatch):
    assert_is("cifar10", cifar.load("cifar10", str(prepared), url=nowhere))
    (prepared / "cifar10" / "3.0.2-decoded.npz").unlink()
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert_is("cifar10", cifar.load("cifar10", url=nowhere))


def test_without_network_one_sentence_says_where_we_looked_and_what_to_do(root, nowhere):
    with pytest.raises(UserError) as caught:
        cifar.load("cifar100", str(root), url=nowhere)
    message = str(caught.value)
    assert str(root / "cifar100" / "3.0.2") in message
    assert nowhere in message
    assert "data.dir or $TFDS_DATA_DIR" in message
    assert str(root / "downloads" / "cifar-100-binary.tar.gz") in message
    assert "\n" not in message
    assert not root.exists()


@pytest.mark.parametrize("url", ["not a url", "http://127.0.0.1:{port}/missing.tar.gz"])
def test_a_wrong_url_is_a_sentence(url, server, root):
    url = url.format(port=server.http.server_port)
    with pytest.raises(UserError, match="cannot be downloaded"):
        cifar.load("cifar10", str(root), url=url)
    assert not root.exists()


def test_a_wrong_digest_is_refused_and_nothing_is_kept(server, root):
    archive = tar(members("cifar10"))
    url = server.put(archive)
    with pytest.raises(UserError) as caught:
        cifar.load("cifar10", str(root), url=url)
    official = checksums.get_all_url_infos()[cifar.ARCHIVES["cifar10"].url].checksum
    assert f"{url} has SHA-256 {sha256(archive)}, expected {official}" in str(caught.value)
    assert files_in(root) == []


def test_a_download_cut_short_is_refused_and_nothing_is_kept(server, root):
    archive = tar(members("cifar10"))
    url = server.put(archive[:-100])
    with pytest.raises(UserError, match="nothing was kept"):
        cifar.load("cifar10", str(root), url=url, sha256=sha256(archive))
    assert files_in(root) == []


def test_a_file_in_place_with_a_wrong_digest_is_refused_and_left_alone(root, nowhere):
    path = root / "downloads" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{path} has SHA-256 .* expected c4a38c50.*; remove it"):
        cifar.load("cifar10", str(root), url=nowhere)
    assert files_in(root) == ["downloads/cifar-10-binary.tar.gz"]


def without(file):
    files = members("cifar10")
    del files[f"cifar-10-batches-bin/{file}"]
    return tar(files)


def with_content(file, content):
    return tar({**members("cifar10"), f"cifar-10-batches-bin/{file}": content})


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (tar(members("cifar10"))[:-2000], "is damaged"),
        (b"plain text", "is damaged"),
        (without("data_batch_3.bin"), "has no cifar-10-batches-bin/data_batch_3.bin"),
        (with_content("test_batch.bin", bytes(3072)), "3072 bytes, expected a multiple of 3073"),
        (with_content("test_batch.bin", b""), "0 bytes"),
        (with_content("test_batch.bin", b"\x0a" + bytes(3072)), "label 10, expected less than 10"),
        (with_content("batches.meta.txt", b"truck\nship\n"), "does not list the classes"),
    ],
    ids=["cut", "text", "missing", "length", "empty", "label", "classes"],
)
def test_an_archive_that_is_not_cifar_is_a_sentence(archive, says, server, root):
    with pytest.raises(UserError, match=says):
        cifar.load("cifar10", str(root), url=server.put(archive), sha256=sha256(archive))
    assert files_in(root) == ["downloads/cifar-10-binary.tar.gz"]


def test_no_member_of_an_archive_is_written_outside(server, root):
    files = members("cifar10")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as out:
        for name in ("../escaped", "../../escaped", str(root.parent / "escaped")):
            out.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("cifar-10-batches-bin/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(root.parent)
        out.addfile(link)
        out.addfile(tarfile.TarInfo("cifar-10-batches-bin/link/escaped"))
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    content = archive.getvalue()
    assert_is(
        "cifar10", cifar.load("cifar10", str(root), url=server.put(content), sha256=sha256(content))
    )
    assert not list(root.parent.rglob("escaped"))
    assert not list(root.parent.rglob("link"))


def test_a_remote_directory_is_a_sentence():
    with pytest.raises(UserError, match=r"data\.dir must be a local path, found the URL 'gs://"):
        cifar.load("cifar10", "gs://bucket/tfds")


def test_without_a_home_directory_one_sentence_says_what_to_set(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(UserError, match=r"no home directory .*set data.dir or \$TFDS_DATA_DIR$"):
        cifar.load("cifar10")


@pytest.mark.parametrize("deep", ["cifar10", "cifar10/3.0.2"])
def test_a_directory_inside_of_the_data_set_names_the_one_above(prepared, nowhere, deep):
    before = files_in(prepared)
    with pytest.raises(UserError, match=f"inside of a data set; expected {prepared}, the dir"):
        cifar.load("cifar10", str(prepared / deep), url=nowhere)
    assert files_in(prepared) == before


def test_another_version_of_the_data_set_that_lies_there_is_named(root, nowhere, capfd):
    other = "cifar10/3.0.0"
    (root / other).mkdir(parents=True)
    (root / other / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be downloaded"):
        cifar.load("cifar10", str(root), url=nowhere)
    assert f"; {root / other}: not read, another form or version" in capfd.readouterr().err


# A prepared directory that cannot be read


def test_a_tfrecord_directory_is_a_sentence(prepared):
    info = prepared / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="is prepared as tfrecord, which only TensorFlow reads"):
        cifar.load("cifar10", str(prepared))


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
        lambda folder: (folder / "features.json").unlink(),
        lambda folder: next(folder.glob("*train*")).unlink(),
        lambda folder: next(folder.glob("*test*")).write_bytes(b"short"),
    ],
    ids=["no info", "bad info", "no features", "no shard", "short shard"],
)
def test_a_damaged_directory_is_a_sentence_and_left_alone(harm, prepared):
    folder = prepared / "cifar10" / "3.0.2"
    harm(folder)
    before = files_in(prepared)
    with pytest.raises(UserError, match=r"3\.0\.2 is not a complete TFDS data set .*; remove it"):
        cifar.load("cifar10", str(prepared))
    assert files_in(prepared) == before


def test_a_set_that_has_one_image_twice_and_lacks_another_is_refused(prepared, monkeypatch):
    generate = cifar_tfds.Cifar10._generate_examples

    def twice(self, split, records):
        for index, example in generate(self, split, records):
            yield index, {**example, "id": f"{split}_{index // 2:05d}"}

    monkeypatch.setattr(cifar_tfds.Cifar10, "_generate_examples", twice)
    shutil.rmtree(prepared / "cifar10")
    digest = sha256((prepared / "downloads" / "cifar-10-binary.tar.gz").read_bytes())
    with pytest.raises(UserError, match="an example is there twice"):
        cifar.load("cifar10", str(prepared), sha256=digest)


def test_labels_under_other_class_names_are_refused(prepared):
    names = prepared / "cifar10" / "3.0.2" / "label.labels.txt"
    names.write_text("\n".join(reversed(CIFAR10_CLASSES)))
    with pytest.raises(UserError, match="does not list the classes of cifar10"):
        cifar.load("cifar10", str(prepared))


# The decoded copy


@pytest.fixture
def decodes(monkeypatch):
    """Counts how often the prepared files are decoded."""
    calls = []
    read = cifar_tfds.read
    monkeypatch.setattr(cifar_tfds, "read", lambda *args: calls.append(args) or read(*args))
    return calls


def test_the_images_are_decoded_once(prepared, decodes):
    for _ in range(3):
        assert_is("cifar10", cifar.load("cifar10", str(prepared)))
    assert len(decodes) == 1


def test_changed_files_are_decoded_again(prepared, decodes):
    cifar.load("cifar10", str(prepared))
    folder = prepared / "cifar10" / "3.0.2"
    shard = next(folder.glob("*train*"))
    shard.touch()
    assert_is("cifar10", cifar.load("cifar10", str(prepared)))
    assert len(decodes) == 2
    (folder / "more.txt").touch()
    assert_is("cifar10", cifar.load("cifar10", str(prepared)))
    assert len(decodes) == 3


@pytest.mark.parametrize("position", [0.0, 0.25, 0.5, 0.75, 0.95, 1.0])
def test_a_damaged_copy_is_made_again(position, prepared, decodes):
    cifar.load("cifar10", str(prepared))
    cache = prepared / "cifar10" / "3.0.2-decoded.npz"
    sound = cache.read_bytes()
    content = bytearray(sound)
    content[int(position * (len(content) - 22))] ^= 0x10  # the last 22 bytes end every zip file
    cache.write_bytes(content)
    assert_is("cifar10", cifar.load("cifar10", str(prepared)))
    assert len(decodes) == 2
    assert_is("cifar10", cifar.load("cifar10", str(prepared)))
    assert len(decodes) == 2


@pytest.mark.parametrize("length", [0, 1000, -1])
def test_a_copy_cut_short_is_made_again(length, prepared, decodes):
    cifar.load("cifar10", str(prepared))
    cache = prepared / "cifar10" / "3.0.2-decoded.npz"
    cache.write_bytes(cache.read_bytes()[:length])
    assert_is("cifar10", cifar.load("cifar10", str(prepared)))
    assert len(decodes) == 2


def test_a_read_only_directory_works_without_a_copy(prepared, decodes, monkeypatch):
    # Root may write everywhere, so the permission is taken away in Python and not on disk.
    real_open = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(self))
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    before = files_in(prepared)
    for count in (1, 2):
        assert_is("cifar10", cifar.load("cifar10", str(prepared)))
        assert len(decodes) == count
    assert files_in(prepared) == before


def test_a_directory_that_cannot_be_written_is_a_sentence(server, tmp_path):
    archive = tar(members("cifar10"))
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz cannot be written"):
        cifar.load("cifar10", str(in_the_way), url=server.put(archive), sha256=sha256(archive))


# In processes of their own

CHILD = """
import sys
from shiftnet.data import cifar
splits = cifar.load(*sys.argv[1:3], url=sys.argv[3], sha256=sys.argv[4])
assert "tensorflow" not in sys.modules
print(splits["train"][0].sum(), splits["test"][1].sum())
"""


def child(root, url, digest):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD, "cifar100", str(root), url, digest],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_tensorflow_is_never_imported_and_two_first_runs_at_once_agree(server, root):
    archive = tar(members("cifar100"))
    url = server.put(archive)
    expected = examples("cifar100")
    line = f"{expected['train'][0].sum()} {expected['test'][1].sum()}\n"
    runs = [child(root, url, sha256(archive)) for _ in range(2)]
    results = [(*run.communicate(), run.returncode) for run in runs]
    for out, err, code in results:
        assert code == 0, err
        assert out == line
        assert all(word.startswith("cifar100: ") for word in err.splitlines()), err
    assert not list(root.rglob("*incomplete*"))


# Against what others say


@pytest.mark.parametrize("name", cifar.NAMES)
def test_the_official_digest_is_the_one_in_tfds(name):
    official = cifar.ARCHIVES[name]
    assert checksums.get_all_url_infos()[official.url].checksum == official.sha256


@needs_shared
@pytest.mark.parametrize("name", cifar.NAMES)
def test_a_directory_prepared_by_tfds_reads_back_bit_for_bit(name, tmp_path, monkeypatch):
    command = [sys.executable, "cifar.py", "--tfds", tmp_path, "--name", name, "--subset", "1000"]
    subprocess.run(command, cwd=SHARED, check=True, capture_output=True)
    monkeypatch.syspath_prepend(SHARED)
    import cifar as reference

    loaded = data.load(name, data_dir=str(tmp_path))
    for split, count in ("train", 1000), ("test", 200):
        images, labels = reference.load(name, split, count)
        np.testing.assert_array_equal(getattr(loaded, split).images, images)
        np.testing.assert_array_equal(getattr(loaded, split).labels, labels)
    assert loaded.class_names == tuple(reference.label_names(name))
