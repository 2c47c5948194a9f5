"""Which of a network's classes those of a data set are."""

import pickle

import numpy as np
import pytest

from shiftnet.data import Split, classes
from shiftnet.data.images import Encoded
from shiftnet.errors import UserError

NUMBERS = tuple("012")


def match(known, found, numbers=False):
    labels, message = classes.match(known, found, numbers=numbers, network="run", dataset="photos")
    return labels.tolist(), message


def test_the_same_classes_need_no_word():
    assert match(("cat", "dog"), ("cat", "dog")) == ([0, 1], "")
    assert match(NUMBERS, NUMBERS, numbers=True) == ([0, 1, 2], "")


def test_another_order_is_mapped_by_name():
    assert match(("cat", "dog", "eel"), ("eel", "cat", "dog")) == (
        [2, 0, 1],
        "classes in another order, matched by name",
    )


def test_a_subset_is_said_to_be_one():
    assert match(("cat", "dog", "eel"), ("eel", "cat")) == (
        [2, 0],
        "2 of the network's 3 classes",
    )


def test_classes_that_the_network_does_not_know_are_refused_by_name_and_number():
    with pytest.raises(UserError) as caught:
        match(("cat", "dog"), ("ant", "cat", "bee"))
    assert str(caught.value) == (
        "run does not know 2 of the 3 classes of photos (ant, bee); it knows 2: cat, dog"
    )


def test_a_refusal_of_a_thousand_classes_stays_short():
    with pytest.raises(UserError, match=r"\(a0, .*, a9 and 990 more\)") as caught:
        match(NUMBERS, [f"a{i}" for i in range(1000)])
    assert len(str(caught.value)) < 200


def test_a_network_without_names_is_matched_by_position_if_the_number_fits():
    labels, message = match(NUMBERS, ("cat", "dog", "eel"), numbers=True)
    assert labels == [0, 1, 2]
    assert "by position" in message
    with pytest.raises(UserError, match="run knows its 3 classes by number only, and photos has 2"):
        match(NUMBERS, ("cat", "dog"), numbers=True)


def test_digits_are_names_where_they_were_trained_on():
    with pytest.raises(UserError, match="does not know 3 of the 3"):
        match(NUMBERS, ("cat", "dog", "eel"))


def test_labels_are_mapped_in_memory_and_when_read():
    split = Split(np.zeros((3, 1, 1, 3), np.uint8), np.array([0, 1, 1], np.int32))
    labels = np.array([5, 2], np.int32)
    assert classes.relabel(split, labels).labels.tolist() == [5, 2, 2]
    assert split.labels.tolist() == [0, 1, 1]
    source = [Encoded(b"a", 1, "x", True), Encoded(b"b", 0, "y", False)]
    mapped = pickle.loads(pickle.dumps(classes.relabel(source, labels)))
    assert len(mapped) == 2
    assert [mapped[0], mapped[1]] == [Encoded(b"a", 2, "x", True), Encoded(b"b", 5, "y", False)]
    assert classes.relabel(source, np.arange(2)) is source
