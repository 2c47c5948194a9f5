"""A CPU evaluates a few images at a time; that must not show in the logits."""

import numpy as np

from tests import networks
from tests.models.test_build import config


def test_logits_do_not_depend_on_how_many_images_come_together():
    model = networks.random(config("resnet8"), 10)
    x = np.random.default_rng(0).normal(size=(140, 3, 8, 8)).astype(np.float32)
    together = networks.evaluate(model, x)  # in three pieces, the last one filled up
    apart = np.concatenate([networks.evaluate(model, x[i : i + 28]) for i in range(0, 140, 28)])
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
