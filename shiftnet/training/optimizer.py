"""The optimiser and the learning rates that a recipe names."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax


def learning_rates(config: Any) -> np.ndarray:
    """The learning rate of each epoch, float64 `[epochs]`; epochs count from 0.

    `"step"`: `optimizer.lr`, times `schedule.factor` from each epoch in `schedule.boundaries` on.

    `"cosine"`: from `optimizer.lr` down half a cosine wave to `schedule.lr_min`, which the epoch
    after the last would have.

    `"sgdr"`: such a wave from the start, and a new one from each boundary that lies within the
    run, each as long as it is to the next boundary or to the end (Loshchilov and Hutter,
    arXiv:1608.03983).
    """
    schedule, top = config.schedule, config.optimizer.lr
    epochs = np.arange(config.epochs)
    if schedule.name == "step":
        passed = np.searchsorted(np.asarray(schedule.boundaries), epochs, side="right")
        return top * schedule.factor**passed
    inside = [b for b in schedule.boundaries if b < config.epochs and schedule.name == "sgdr"]
    edges = np.array([0, *inside, config.epochs])
    wave = np.searchsorted(edges, epochs, side="right") - 1
    done = (epochs - edges[wave]) / (edges[wave + 1] - edges[wave])
    return schedule.lr_min + (top - schedule.lr_min) * (1 + np.cos(np.pi * done)) / 2


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
