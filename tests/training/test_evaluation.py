"""Evaluation: what waits on the devices, and what becomes of images that are not there."""

import jax
import numpy as np
import pytest

from shiftnet.errors import UserError
from shiftnet.training import evaluation


def batch(labels):
    labels = np.array(labels, np.int32)
    ones = np.ones(len(labels), np.float32)
    return ones, labels, np.zeros_like(labels), ones, labels


def test_hundreds_of_steps_do_not_wait_on_the_devices_at_once(monkeypatch):
    """XLA's CPU client ends the process with a C++ stack trace then, on several devices."""
    started, fetched, most = 0, 0, 0

    def steps():
        nonlocal started, most
        for number in range(300):
            started += 1
            most = max(most, started - fetched)
            yield batch([number % 10])

    def device_get(result):
        nonlocal fetched
        fetched += 1
        return result

    monkeypatch.setattr(jax, "device_get", device_get)
    found = evaluation._evaluation(steps())
    assert most == evaluation.IN_FLIGHT == 2
    assert found.labels.tolist() == [number % 10 for number in range(300)]


def test_places_without_an_image_do_not_count():
    found = evaluation._evaluation([batch([3, 1]), batch([2, -1])])
    assert found.labels.tolist() == [3, 1, 2]
    assert found.indices.tolist() == [0, 1, 2]
    found = evaluation._evaluation([batch([3, -1]), batch([2, 1])])
    assert found.indices.tolist() == [0, 2, 3]
    assert found.top1 == 1.0


def test_no_image_at_all_is_a_sentence_and_not_a_number():
    with pytest.raises(UserError, match="none of the images to evaluate on can be decoded"):
        evaluation._evaluation([batch([-1, -1])])


RNG = np.random.default_rng(0)


def drawn(images=500, classes=7):
    """Predictions that are right more often the surer they are; the last class has no image."""
    confidences = RNG.uniform(0.15, 1, images).astype(np.float32)
    confidences[0] = 1.0
    labels = RNG.integers(0, classes - 1, images).astype(np.int32)
    right = RNG.uniform(size=images) < confidences**2
    predictions = np.where(right, labels, RNG.integers(0, classes, images)).astype(np.int32)
    return evaluation.Evaluation(0.0, 0.0, 0.0, predictions, labels, confidences, np.arange(images))


def test_calibration_error_is_that_of_guo_et_al():
    found = drawn()
    right = found.predictions == found.labels
    total = 0.0
    for number in range(15):  # in words: bins (m-1)/15 < confidence <= m/15
        inside = (found.confidences > number / 15) & (found.confidences <= (number + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - found.confidences[inside].mean(dtype=np.float64))
            total += inside.sum() / len(right) * gap
    assert 0.05 < total < 0.5
    assert found.calibration_error() == pytest.approx(total, rel=1e-6)


def test_precision_recall_and_f1_are_their_definitions():
    found = drawn()
    scores = found.per_class(7)
    for label in range(6):
        hits = int(((found.predictions == label) & (found.labels == label)).sum())
        assert scores.images[label] == (found.labels == label).sum()
        assert scores.recall[label] == hits / (found.labels == label).sum()
        assert scores.precision[label] == hits / (found.predictions == label).sum()
        mean = 2 / (1 / scores.recall[label] + 1 / scores.precision[label])
        assert scores.f1[label] == pytest.approx(mean)
    assert scores.images[6] == 0
    assert scores.precision[6] == 0
    assert np.isnan([scores.recall[6], scores.f1[6]]).all()
