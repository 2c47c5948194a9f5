"""Learning-rate schedules, built from optax's."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shiftnet.config import Config
from shiftnet.errors import UserError

# Of a one-cycle schedule without `schedule.warmup`: the share of the run in which the rate rises,
# how far below its peak it starts, and how far below that it ends (torch's OneCycleLR).
ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 25.0, 1e4


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    With `schedule.by` = `"epoch"` the rate is constant within an epoch, as in the originals: it is
    computed in float64 and rounded once. With `"step"` it changes with every step.

    Args:
      config: a validated recipe.
      steps_per_epoch: optimizer steps in an epoch.

    Returns:
      From a step (int32 [], counted from 0) to a rate (float32 []).

    Raises:
      UserError: where the warm-up is longer than the run.
    """
    schedule = _schedule(config, steps_per_epoch)
    if config.schedule.by == "step":
        return lambda step: schedule(jnp.asarray(step, jnp.result_type(float)))
    by_epoch = jnp.asarray(learning_rates(config, steps_per_epoch))
    return lambda step: by_epoch[step // steps_per_epoch]


def learning_rates(config: Config, steps_per_epoch: int = 1) -> np.ndarray:
    """The learning rate of each epoch's first step, float64 `[epochs]`; epochs count from 0."""
    with jax.enable_x64(True):
        steps = jnp.arange(config.epochs, dtype=jnp.float64) * steps_per_epoch
        rates = jnp.broadcast_to(_schedule(config, steps_per_epoch)(steps), steps.shape)
        return np.asarray(rates, np.float64)


def rates_of_steps(config: Config, steps_per_epoch: int) -> np.ndarray:
    """The learning rate of each step, floating `[epochs * steps_per_epoch]`.

    That of the update that it belongs to, where several steps make one.
    """
    every = config.optimizer.accumulate
    steps = np.arange(config.epochs * steps_per_epoch) // every * every
    return np.broadcast_to(learning_rate(config, steps_per_epoch)(steps), steps.shape)


def _schedule(config: Config, steps_per_epoch: int) -> Callable[[Any], jax.Array]:
    """The rate at a step, without regard to `schedule.by` but in the warm-up."""
    schedule, top = config.schedule, config.optimizer.lr
    total = config.epochs * steps_per_epoch
    warmup = round(schedule.warmup * steps_per_epoch)
    if warmup and warmup >= total:
        raise UserError(
            f"schedule.warmup must be shorter than the {config.epochs} epochs, "
            f"found {schedule.warmup:g}"
        )
    if schedule.name == "onecycle":
        # optax rounds the steps of the rise down.
        rise = (warmup + 0.5) / total if warmup else ONE_CYCLE_RISE
        cycle = optax.cosine_onecycle_schedule(total, top, rise, ONE_CYCLE_START, ONE_CYCLE_END)
        return jnp.vectorize(cycle)  # optax's takes one step at a time
    boundaries = [epoch * steps_per_epoch for epoch in schedule.boundaries]
    lowest, left = schedule.lr_min, total - warmup
    if schedule.name == "step":
        after = optax.piecewise_constant_schedule(
            top, {boundary - warmup: schedule.factor for boundary in boundaries}
        )
    elif schedule.name == "linear":
        after = optax.linear_schedule(top, lowest, left)
    elif schedule.name == "wsd":
        falling = max(round(schedule.decay * total), 1)
        stable = max(left - falling, 0)
        after = optax.join_schedules(
            [optax.constant_schedule(top), optax.linear_schedule(top, lowest, left - stable)],
            [stable],
        )
    elif schedule.name == "sgdr":
        inside = [boundary - warmup for boundary in boundaries if warmup < boundary < total]
        after = _cosines(top, lowest, [0, *inside, left])
    else:
        after = _cosines(top, lowest, [0, left])
    if not warmup:
        return after
    unit = 1 if schedule.by == "step" else steps_per_epoch

    def warmed(step: Any) -> jax.Array:
        rising = jnp.where(step + unit > warmup, top, top * (step + unit) / warmup)
        return jnp.where(step < warmup, rising, after(step - warmup))

    return warmed


def _cosines(top: float, lowest: float, edges: Sequence[int]) -> optax.Schedule:
    """Half a cosine wave from `top` to `lowest` between each two edges."""
    waves = [
        optax.cosine_decay_schedule(top, end - start, alpha=lowest / top)
        for start, end in itertools.pairwise(edges)
    ]
    return optax.join_schedules(waves, edges[1:-1])
