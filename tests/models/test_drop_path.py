"""Stochastic depth: whole branches of single images, scaled so that the mean stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftnet.config import default_config
from shiftnet.errors import UserError
from shiftnet.models.drop_path import count_branches, drop_path, dropping
from shiftnet.training.mesh import make_mesh
from shiftnet.training.step import Program
from tests import networks

IMAGES = 4000


def dropped(rate, branches=4):
    """What is left of ones in each of four branches, `[branches, images]`."""
    keys = jax.random.split(jax.random.key(0), IMAGES)
    with dropping(keys, rate, branches):
        found = [np.asarray(drop_path(jnp.ones((IMAGES, 2, 2, 3)))) for _ in range(branches)]
    for one in found:
        assert (one == one[:, :1, :1, :1]).all(), "an image's branch is dropped as a whole"
    return np.stack([one[:, 0, 0, 0] for one in found])


@pytest.mark.core
def test_the_rate_rises_to_the_last_branch_and_what_stays_is_scaled():
    found = dropped(0.4)
    for number, one in enumerate(found, 1):
        keep = 1 - 0.1 * number
        np.testing.assert_allclose(np.unique(one), [0, 1 / keep], rtol=1e-6)
        assert abs((one > 0).mean() - keep) < 3.3 * (keep * (1 - keep) / IMAGES) ** 0.5
    agree = ((found[2] > 0) == (found[3] > 0)).mean()  # 0.7 * 0.6 + 0.3 * 0.4, if independent
    assert abs(agree - 0.54) < 0.03


def test_nothing_is_dropped_elsewhere():
    branch = jnp.ones((3, 2, 2, 1))
    assert drop_path(branch) is branch
    with dropping(None, 0.5, 4):
        assert drop_path(branch) is branch


@pytest.mark.parametrize(
    ("arch", "branches"),
    [
        ("shiftresnet20", 9),
        ("resnet8", 3),
        ("depthwiseresnet8", 3),
        ("wrn8", 3),
        ("imagenet_resnet50", 16),
        ("shiftnet_a", 17),  # the first block of each stage concatenates
    ],
)
def test_every_family_has_branches_to_drop(arch, branches):
    network = networks.abstract({**default_config().model, "arch": arch}, 10)
    assert count_branches(network) == branches


def test_a_network_without_branches_refuses_it():
    config = default_config()
    config.model.arch, config.model.drop_path = "mobileresnet8", 0.1
    sizes = {"num_classes": 10, "mean": (0,) * 3, "std": (1,) * 3, "steps_per_epoch": 1}
    with pytest.raises(UserError, match=r"drop_path=0\.1 would be ignored: mobileresnet8 has no"):
        Program(config, **sizes, mesh=make_mesh(2))
