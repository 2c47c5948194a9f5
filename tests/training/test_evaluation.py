"""Evaluation: what waits on the devices, and what becomes of images that are not there."""

import jax
import numpy as np
import pytest

from shiftnet.errors import UserError
from shiftnet.training import evaluation


def batch(labels):
    labels = np.array(labels, np.int32)
    return np.ones(len(labels), np.float32), labels, np.zeros_like(labels), labels


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
    assert found.top1 == 1.0


def test_no_image_at_all_is_a_sentence_and_not_a_number():
    with pytest.raises(UserError, match="none of the images to evaluate on can be decoded"):
        evaluation._evaluation([batch([-1, -1])])
