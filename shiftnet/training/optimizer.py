"""The optimiser and the learning rates that a recipe names."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax


def learning_rates(config: Any) -> np.ndarray:
    """The learning rate of each epoch, float64 `[epochs]`.

    `"step"`: `optimizer.lr`, times `schedule.factor` from each epoch in `schedule.boundaries` on
    (epochs count from 0).
    """
    epochs = np.arange(config.epochs)
    passed = np.searchsorted(np.asarray(config.schedule.boundaries), epochs, side="right")
    return config.optimizer.lr * config.schedule.factor**passed


def make_optimizer(config: Any, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD as PyTorch's: weight decay joins the gradient, momentum sums, the rate multiplies last.

    Weight decay applies to every parameter, batch norm's and biases included. Momentum runs on
    over epochs; the original ShiftResNet code built a new optimiser each epoch, which restarted it.
    """
    by_epoch = learning_rates(config)
    return optax.chain(
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.trace(decay=config.optimizer.momentum),
        optax.scale_by_learning_rate(lambda step: jnp.asarray(by_epoch)[step // steps_per_epoch]),
    )
