"""Class-balanced sampling."""

import numpy as np

from shiftnet.data.order import balanced

LABELS = np.repeat(np.array([0, 1, 3], np.int32), (70, 5, 25))


def test_every_class_comes_equally_often_and_no_image_more_often_than_it_must():
    order = balanced(0, 3, LABELS)
    assert sorted(np.bincount(LABELS[order], minlength=4)) == [0, 33, 33, 34]
    uses = np.bincount(order, minlength=100)
    assert set(uses[:70]) == {0, 1}
    assert set(uses[70:75]) <= {6, 7}
    assert set(uses[75:]) == {1, 2}


def test_the_order_follows_from_seed_and_epoch_alone():
    assert np.array_equal(balanced(5, 2, LABELS), balanced(5, 2, LABELS))
    for seed, epoch in ((6, 2), (5, 3)):
        assert not np.array_equal(balanced(5, 2, LABELS), balanced(seed, epoch, LABELS))
    # Small classes are not bunched together: the first half has about half of the second class.
    halves = [LABELS[balanced(seed, 0, LABELS)][:50] for seed in range(20)]
    assert 10 < np.mean([(half == 1).sum() for half in halves]) < 23
