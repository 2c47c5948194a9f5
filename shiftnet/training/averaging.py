"""A network averaged over the steps of its training."""

from typing import Any

import jax
import jax.numpy as jnp


def moving_average(average: Any, now: Any, step: jax.Array, *, decay: float, every: int) -> Any:
    """Moves an exponential moving average on by one step.

    As PyTorch's `AveragedModel` with `get_ema_multi_avg_fn(decay)` and `use_buffers=True`: the
    first update takes the numbers as they are, and each later one moves `1 - decay` of the way to
    them.

    Args:
      average: a tree of floating arrays; of no meaning before the first step.
      now: likewise, the numbers after the step.
      step: int32 [], counted from 0.
      decay: at least 0 and below 1.
      every: steps for one update of the parameters, see `optimizer.accumulate`.

    Returns:
      The tree of averages.
    """
    is_first, is_update = step < every, (step + 1) % every == 0

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
        later = jnp.where(is_update, old + (1 - decay) * (new - old), old)
        return jnp.where(is_first, new, later)

    return jax.tree.map(moved, average, now)
