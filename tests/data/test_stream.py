"""Streams of batches: what is in them, and that nothing but the seed and the step decides it."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from shiftnet.data import images, stream
from shiftnet.data.folder import FolderSource
from shiftnet.data.images import Encoded
from shiftnet.data.stream import EvalStream, TrainStream
from shiftnet.errors import RunFailed, UserError
from tests.data import image_files

ROOT = Path(__file__).parents[2]
SIZE, RESIZE = 16, 20
STEPS = 4  # an epoch, of 5 images each; the source has 23


class Memory:
    """A source that holds its files; some of them may be corrupt."""

    def __init__(self, count, corrupt=()):
        rng = np.random.default_rng(0)
        self.files = [image_files.encoded(image_files.pixels(rng, 24, 28)) for _ in range(count)]
        for index in corrupt:
            self.files[index] = self.files[index][:200]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Encoded(self.files[index], 100 + index, f"file {index}")


@pytest.fixture(scope="module")
def source():
    return Memory(23)


def train(source, *, workers=0, **options):
    settings = {
        "size": SIZE,
        "batch_size": 5,
        "steps_per_epoch": STEPS,
        "total_steps": 2 * STEPS + 1,
        "seed": 7,
        "flip": True,
        "on_corrupt": "error",
        **options,
    }
    return TrainStream(source, workers=workers, **settings)


def evaluation(source, *, workers=0, **options):
    settings = {"size": SIZE, "resize": RESIZE, "batch_size": 4, "on_corrupt": "error", **options}
    return EvalStream(source, workers=workers, **settings)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.skipped == other.skipped
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.images, other.images)


def test_files_mirrored_in_turns_are_so_in_every_second_epoch(source):
    options = {"batch_size": 23, "steps_per_epoch": 1, "total_steps": 3}
    whole = {"scale": (1.0, 1.0), "ratio": (1e-3, 1e3)}
    flipped = []
    for batch in train(source, in_turns=True, **options):
        (plain,) = (
            one
            for number, one in enumerate(train(source, flip=False, **options))
            if number == len(flipped)
        )
        order = np.argsort(batch.labels)
        is_mirrored = (batch.images != plain.images).any((1, 2, 3))
        expected = np.where(
            is_mirrored[:, None, None, None], plain.images[:, :, ::-1], plain.images
        )
        np.testing.assert_array_equal(batch.images, expected)
        flipped.append(is_mirrored[order])
    np.testing.assert_array_equal(flipped[0], ~flipped[1])
    np.testing.assert_array_equal(flipped[0], flipped[2])
    assert 0 < flipped[0].sum() < 23
    # Crops of the whole image differ only by which image it is.
    same = [
        one.images[np.argsort(one.labels)] for one in train(source, flip=False, **options, **whole)
    ]
    np.testing.assert_array_equal(same[0], same[1])


def examples(batches):
    """The indices in the source, batch by batch."""
    return [(batch.labels - 100).tolist() for batch in batches]


def flat(lists):
    return [item for items in lists for item in items]


def test_batches_have_the_stated_types(source):
    batch = next(train(source))
    assert (batch.images.shape, batch.images.dtype) == ((5, SIZE, SIZE, 3), np.uint8)
    assert (batch.labels.shape, batch.labels.dtype) == ((5,), np.int32)
    assert type(batch.images) is type(batch.labels) is np.ndarray
    assert batch.skipped == ()


def test_a_run_has_its_number_of_steps(source):
    assert len(list(train(source))) == 2 * STEPS + 1


def test_an_epoch_sees_no_image_twice_and_the_next_has_another_order(source):
    found = examples(train(source))
    first, second = flat(found[:STEPS]), flat(found[STEPS : 2 * STEPS])
    assert len(set(first)) == len(set(second)) == 5 * STEPS
    assert first != second
    assert first != sorted(first)
    assert set(first) != set(second)  # the three left out are others


def test_the_order_of_an_epoch_does_not_depend_on_the_batch_size(source):
    by_five = flat(examples(train(source))[:STEPS])
    by_ten = flat(examples(train(source, batch_size=10, steps_per_epoch=2))[:2])
    assert by_five == by_ten


def test_the_seed_decides_the_order_and_the_crops(source):
    one, other = list(train(source)), list(train(source, seed=8))
    assert examples(one) != examples(other)
    assert_same(one, list(train(source)))


def test_an_image_is_cut_by_seed_epoch_and_index_alone(source):
    """Restated from `TrainStream`'s docstring."""
    step = STEPS + 1
    batch = list(train(source))[step]
    for image, label in zip(batch.images, batch.labels, strict=True):
        index = int(label) - 100
        bits = np.random.Philox(key=7 + (1 << 64), counter=(index + 1) << 128)
        rng = np.random.Generator(bits)
        expected = images.for_training(source[index].data, size=SIZE, flip=True, rng=rng, name="x")
        np.testing.assert_array_equal(image, expected)


def test_crops_differ_from_epoch_to_epoch(source):
    seen = {}
    for batch in train(source):
        for image, label in zip(batch.images, batch.labels, strict=True):
            seen.setdefault(int(label), []).append(image)
    pairs = [images for images in seen.values() if len(images) == 2]
    assert pairs
    assert all((one != other).any() for one, other in pairs)


def test_the_repetitions_of_a_rare_classs_image_are_cut_anew():
    source = Memory(21)
    source.labels = np.array([0] * 20 + [1])
    options = {"batch_size": 20, "steps_per_epoch": 1, "total_steps": 1, "flip": False}
    (batch,) = train(source, balance=True, **options)
    rare = batch.images[batch.labels == 120]
    assert len(rare) >= 9
    assert len(np.unique(rare, axis=0)) > 6


def test_worker_processes_change_no_bit_of_evaluation(source):
    assert_same(list(evaluation(source, workers=2)), list(evaluation(source)))


def test_evaluation_can_be_repeated(source):
    stream = evaluation(source)
    assert_same(list(stream), list(stream))


@pytest.mark.parametrize(("before", "after"), [pytest.param(0, 0, marks=pytest.mark.slow), (1, 2)])
def test_a_continued_run_sees_what_an_uninterrupted_one_would(source, before, after):
    """Whatever the number of worker processes, before and after."""
    whole = list(train(source))
    stream = train(source, workers=before)
    head = [next(stream) for _ in range(3)]
    state = json.loads(json.dumps(stream.get_state()))
    stream.close()
    again = train(source, workers=after)
    if not after:
        next(again)
    again.set_state(state)
    assert again.get_state() == state
    assert_same(head + list(again), whole)


def test_a_stream_can_be_set_back(source):
    stream = train(source)
    start = stream.get_state()
    first = list(stream)
    stream.set_state(start)
    assert_same(list(stream), first)


def test_a_closed_stream_goes_on_when_asked(source):
    stream = train(source)
    head = [next(stream)]
    stream.close()
    assert_same(head + list(stream), list(train(source)))


@pytest.mark.parametrize("count", [1, 2])
def test_processes_share_each_batch_in_order(source, count):
    options = {"batch_size": 4, "process_count": count}
    shares = [list(train(source, process_index=k, **options)) for k in range(count)]
    for whole, *parts in zip(train(source, batch_size=4), *shares, strict=True):
        np.testing.assert_array_equal(whole.images, np.concatenate([p.images for p in parts]))
        np.testing.assert_array_equal(whole.labels, np.concatenate([p.labels for p in parts]))


def test_evaluation_shows_every_image_once_in_order(source):
    batches = list(evaluation(source))
    labels = np.concatenate([batch.labels for batch in batches])
    assert labels.tolist() == [*range(100, 123), -1]
    assert len(batches) == len(evaluation(source)) == 6
    for index, image in enumerate(np.concatenate([batch.images for batch in batches])[:23]):
        data = source[index].data
        expected = images.for_evaluation(data, size=SIZE, resize=RESIZE, name="x")
        np.testing.assert_array_equal(image, expected)
    assert not batches[-1].images[-1].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_its_workers_and_shows_the_same_again(source, workers):
    stream = evaluation(source, workers=workers)
    first = list(stream)
    children = multiprocessing.active_children()
    assert len(children) == workers
    next(iter(stream))  # one that is given up begins anew
    assert_same(list(stream), first)
    children = multiprocessing.active_children()
    assert_same(list(stream), first)
    assert multiprocessing.active_children() == children
    stream.close()
    assert not multiprocessing.active_children()


def test_processes_share_evaluation_with_equally_many_batches(source):
    shares = [
        list(evaluation(source, batch_size=12, process_index=k, process_count=3)) for k in range(3)
    ]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert shares[2][1].labels.tolist() == [120, 121, 122, -1]
    for whole, *parts in zip(evaluation(source, batch_size=12), *shares, strict=True):
        np.testing.assert_array_equal(whole.labels, np.concatenate([p.labels for p in parts]))
        np.testing.assert_array_equal(whole.images, np.concatenate([p.images for p in parts]))


@pytest.mark.parametrize(("make", "workers"), [(train, 0), (train, 2), (evaluation, 0)])
def test_a_corrupt_file_ends_the_run_with_its_name_and_nothing_else(make, workers):
    corrupt = Memory(23, corrupt=range(23))
    with pytest.raises(
        UserError, match=r"^file \d+ cannot be decoded \(.+\); to leave .*skip$"
    ) as caught:
        next(iter(make(corrupt, workers=workers)))
    assert "\n" not in str(caught.value)
    assert not getattr(caught.value, "__notes__", None)


def test_a_skipped_file_is_replaced_by_the_next_that_can_be_decoded(source):
    good = list(train(source))
    order = flat(examples(good)[:STEPS])
    # Two in a row, the second of them the first of the next batch.
    broken = Memory(23, corrupt=(order[4], order[5]))
    found = list(train(broken, on_corrupt="skip"))[:STEPS]
    assert flat(examples(found)) == [*order[:4], order[6], order[6], *order[6:]]
    skipped = [batch.skipped for batch in found]
    assert skipped == [(f"file {order[4]}",), (f"file {order[5]}",), (), ()]
    np.testing.assert_array_equal(found[0].images[4], good[1].images[1])
    np.testing.assert_array_equal(found[0].images[:4], good[0].images[:4])
    np.testing.assert_array_equal(found[1].images[1:], good[1].images[1:])


@pytest.mark.parametrize("good", [0, 3])
def test_the_search_for_a_replacement_goes_round_and_ends(good):
    broken = [index for index in range(5) if index != good]
    options = {"steps_per_epoch": 1, "total_steps": 1, "on_corrupt": "skip"}
    (batch,) = train(Memory(5, corrupt=broken), **options)
    assert batch.labels.tolist() == [100 + good] * 5
    assert sorted(batch.skipped) == [f"file {index}" for index in broken]
    with pytest.raises(UserError, match="none of the 5 training images can be decoded"):
        next(train(Memory(5, corrupt=range(5)), **options))


def test_a_file_skipped_in_evaluation_counts_as_no_image(source):
    broken = Memory(23, corrupt=(2, 9))
    found = list(evaluation(broken, on_corrupt="skip"))
    labels = np.concatenate([batch.labels for batch in found])
    assert labels[[2, 9]].tolist() == [-1, -1]
    assert (labels[:23] >= 0).sum() == 21
    assert [batch.skipped for batch in found[:3]] == [("file 2",), (), ("file 9",)]
    assert not found[0].images[2].any()
    np.testing.assert_array_equal(found[0].images[3], next(iter(evaluation(source))).images[3])


def test_a_file_that_went_away_is_skipped_or_ends_the_run_as_a_corrupt_one(tmp_path):
    folder = FolderSource(image_files.write_folder(tmp_path) / "val")
    gone = folder[0].name
    Path(gone).unlink()
    with pytest.raises(UserError, match=r"_0\.JPEG cannot be read \(No such file"):
        next(iter(evaluation(folder)))
    (batch,) = evaluation(folder, on_corrupt="skip")
    assert batch.skipped == (gone,)
    assert batch.labels.tolist() == [-1, 1, 1, 2]
    settings = {"batch_size": 4, "steps_per_epoch": 1, "total_steps": 1}
    assert next(train(folder, on_corrupt="skip", **settings)).skipped == (gone,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_corrupt": "skp"}, "unknown on_corrupt 'skp'; did you mean 'skip'?"),
        ({"process_count": 2}, "batch_size is 5; expected a multiple of 2"),
        ({"batch_size": 6}, "an epoch of 4 steps of 6 images is more than the 23 training"),
    ],
)
def test_settings_that_cannot_be_are_refused(source, options, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        train(source, **options)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (9, "killed (SIGKILL), as when the machine's memory is full: set data.workers lower"),
        (7, "killed (SIGBUS), as when /dev/shm is full: set data.workers lower"),
    ],
)
def test_a_killed_worker_is_a_sentence_with_a_hint(number, sentence):
    class Iterator:
        def __next__(self):
            raise RuntimeError(
                f"Worker process was terminated unexpectedly with exit code -{number}."
            )

    with pytest.raises(RunFailed) as caught:
        stream._next([Iterator()])
    assert sentence in str(caught.value)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_at_once(source):
    running = train(source, workers=1, total_steps=STEPS * 50)
    next(running)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RunFailed, match="SIGKILL"):
        list(running)


def test_too_little_shared_memory_means_fewer_workers_and_the_same_images(
    source, monkeypatch, capsys
):
    monkeypatch.setattr(stream, "fit_shared_memory", lambda *_: (0, 2, "/dev/shm is small"))
    assert_same(list(train(source, workers=2)), list(train(source)))
    assert_same(list(train(source, workers=2)), list(train(source)))
    assert capsys.readouterr().err == "/dev/shm is small\n"  # said once, not in each epoch


SCRIPT = """
    import os, signal, sys
    import numpy as np
    from shiftnet.data.images import Encoded
    from shiftnet.data.folder import FolderSource
    from shiftnet.data.stream import EvalStream, TrainStream

    class Nosy(FolderSource):
        def __getitem__(self, index):
            assert "jax" not in sys.modules
            return super().__getitem__(index)

    if __name__ == "__main__":
        source = Nosy(sys.argv[1] + "/train")
        stream = TrainStream(source, size=16, batch_size=2, steps_per_epoch=4, total_steps=100,
                             seed=0, flip=True, on_corrupt="error", workers=2)
        batch = [next(stream) for worker in range(2)][0]
        if sys.argv[2] == "wait":
            print("ready", flush=True)
            sys.stdin.read()
        if sys.argv[2] == "interrupt":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # as the loop, which finishes its step
                os.killpg(0, number)
            assert len(list(stream)) == 98
        if sys.argv[2] == "close":
            stream.close()
            held = [b for b in EvalStream(source, size=16, resize=16, batch_size=2,
                                          on_corrupt="error", workers=1)]
        print("done", batch.labels.shape)
"""


def started(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = image_files.write_folder(tmp_path / "imagenet")
    return subprocess.Popen(
        [sys.executable, "-W", "error", script, root, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "how", ["close", pytest.param("leave", marks=pytest.mark.slow), "interrupt"]
)
def test_a_plain_script_ends_without_a_word_from_its_workers(tmp_path, how):
    """Also: no worker has imported JAX, and no signal to all processes ends workers."""
    with started(tmp_path, how) as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (0, "done (2,)\n", "")


def test_workers_end_when_their_parent_is_killed(tmp_path):
    with started(tmp_path, "wait") as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # Reads to the end, and the output ends when the last process that holds it has ended.
        process.communicate(timeout=120)
    assert process.returncode < 0
