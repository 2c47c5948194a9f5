"""A network whose batch norms are folded computes the same and is no longer trained."""

import numpy as np
import pytest
from flax import nnx

from shiftnet.layers import BatchNorm
from shiftnet.models.folding import fix_weights, fold_batch_norms
from shiftnet.quantizers import Float, of_layers
from tests import networks
from tests.models.test_build import config


@pytest.mark.core
@pytest.mark.parametrize("arch", ["shiftresnet8", "depthwiseresnet8", "wrn8"])
def test_folding_changes_no_logits(arch):
    model = networks.random(config(arch), 10)
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    before = networks.evaluate(model, x)
    fold_batch_norms(model)
    assert not any(isinstance(module, BatchNorm) for _, module in nnx.iter_modules(model))
    assert not nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    np.testing.assert_allclose(networks.evaluate(model, x), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be trained"):
        model(np.moveaxis(x, 1, -1), train=True)


@pytest.mark.core
@pytest.mark.parametrize("form", ["sign", "s3", "denseshift"])
def test_fixing_weights_changes_no_logits(form):
    model = networks.random(config("shiftresnet8", weights=form), 10)
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    before = networks.evaluate(model, x)
    fix_weights(model)
    assert {type(weight) for weight in of_layers(model).values()} == {Float}
    np.testing.assert_allclose(networks.evaluate(model, x), before, rtol=1e-5, atol=1e-5)
