"""The optimizers that a recipe can name, composed from optax's parts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from shiftnet.config import Config, OptimizerConfig, matches, split_patterns
from shiftnet.errors import UserError
from shiftnet.training.schedules import learning_rate

# Layer by layer, an array of a network's parameters or their pytree.
Params = Any


def make_optimizer(
    config: Config, steps_per_epoch: int, *, first_and_last: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimizer of a recipe, from gradients to updates.

    - `"sgd"`: as PyTorch's: weight decay joins the gradient, momentum sums (Nesterov's where
      `optimizer.nesterov`), the rate multiplies last. Momentum runs on over epochs; the original
      ShiftResNet code built a new optimizer each epoch, which restarted it.
    - `"adamw"` (Loshchilov and Hutter, arXiv:1711.05101), `"lamb"` (You et al., arXiv:1904.00962),
      `"lion"` (Chen et al., arXiv:2302.06675): decay is decoupled from the gradient.
      `optimizer.momentum` is their first coefficient, `optimizer.beta2` the second.
    - `"muon"` (Jordan et al., 2024): momentum orthogonalised, for the kernels of convolutions and
      linear layers between the first and the last, see `takes_muon`; they have `optimizer.muon_lr`
      as their rate and `optimizer.muon_weight_decay`, decoupled. The other arrays take `"sgd"`.

    Args:
      config: a validated recipe.
      steps_per_epoch: batches in an epoch.
      first_and_last: paths of the network's first and last layer, which Muon leaves to SGD.

    Raises:
      UserError: for a pattern of `optimizer.groups` or `optimizer.freeze` that no parameter's path
        matches (when the state is made), or a schedule or `optimizer.accumulate` that does not fit
        the run.
    """
    settings = config.optimizer
    steps = settings.accumulate
    if steps > config.epochs * steps_per_epoch:
        raise UserError(
            f"optimizer.accumulate must be at most the run's {config.epochs * steps_per_epoch} "
            f"steps, or nothing is ever updated; found {steps}"
        )
    rate = learning_rate(config, steps_per_epoch)
    groups = parse_groups(settings.groups)
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    chain = optax.chain(
        *clip,
        *_rule(settings, first_and_last, decays=_decaying(config)),
        optax.scale_by_learning_rate(lambda count: rate(count * steps)),
    )
    if config.model.shift == "sparse":
        # The share of all updates, however many there have been when the run is lengthened.
        last = round(settings.shift_share * config.epochs * steps_per_epoch) // steps
        until = optax.scale_by_schedule(lambda count: jnp.where(count < last, 1.0, 0.0))
        chain = optax.chain(
            chain, optax.masked(until, lambda params: _with_paths(_is_offset, params))
        )
    if groups:
        chain = optax.chain(chain, _scaled_by_path(groups))
    if settings.freeze:
        patterns = split_patterns(settings.freeze)
        chain = optax.partition(
            {"trained": chain, "frozen": optax.set_to_zero()},
            lambda params: _labels(params, patterns),
        )
    if steps > 1:
        return optax.MultiSteps(chain, steps).gradient_transformation()
    return chain


def _decaying(config: Config) -> Callable[[Params], Params] | None:
    """Which parameters decay, as a tree of bools; None for all. Learned offsets never do."""
    kernels = config.optimizer.decay == "kernels"
    if config.model.shift == "fixed":
        return _is_matrix if kernels else None
    return lambda params: _with_paths(
        lambda path, array: not _is_offset(path, array) and (array.ndim >= 2 or not kernels), params
    )


def _is_offset(path: str, array: Any) -> bool:
    """Whether a parameter is the offsets of a `LearnedShift`."""
    del array
    return path.endswith((".shift.rows", ".shift.columns"))


def _rule(
    settings: OptimizerConfig,
    first_and_last: Sequence[str],
    *,
    decays: Callable[[Params], Params] | None,
) -> Sequence[optax.GradientTransformation]:
    """What the optimizer makes of gradients before the learning rate, part by part."""
    decay = optax.add_decayed_weights(settings.weight_decay, decays)
    sgd = (decay, optax.trace(settings.momentum, nesterov=settings.nesterov))
    if settings.name == "sgd":
        return sgd
    if settings.name == "lion":
        return optax.scale_by_lion(settings.momentum, settings.beta2), decay
    if settings.name == "muon":
        muon = optax.chain(
            scale_by_muon(beta=settings.momentum, weight_dimension_numbers=_dimension_numbers),
            optax.stateless_with_tree_map(lambda update, _: update * _shape_factor(update.shape)),
            optax.add_decayed_weights(settings.muon_weight_decay or settings.weight_decay, decays),
            optax.scale(settings.muon_lr / settings.lr),
        )

        def labels(params: Params) -> Params:
            taken = takes_muon(params, first_and_last)
            return jax.tree.map(lambda is_taken: "muon" if is_taken else "sgd", taken)

        return (optax.partition({"muon": muon, "sgd": optax.chain(*sgd)}, labels),)
    adam = optax.scale_by_adam(settings.momentum, settings.beta2, settings.eps)
    if settings.name == "lamb":
        return adam, decay, optax.scale_by_trust_ratio()
    return adam, decay


def keep_frozen(old: Params, new: Params, freeze: str) -> Params:
    """New running statistics, but the old ones of what `optimizer.freeze` names.

    What the first batch alone sets, `LearnedStep.unit`, is set in frozen layers too.
    """
    patterns = split_patterns(freeze)
    if not patterns:
        return new

    def chosen(path: Sequence[Any], before: jax.Array, after: jax.Array) -> jax.Array:
        name = dotted(path)
        is_frozen = any(matches(name, p) for p in patterns) and not name.endswith(".unit")
        return before if is_frozen else after

    return jax.tree_util.tree_map_with_path(chosen, old, new)


def takes_muon(params: Params, first_and_last: Sequence[str]) -> Params:
    """Whether Muon takes each array: a tree of bools.

    It takes matrices: kernels `[k, k, in, out]` as `[k * k * in, out]`, and weights `[in, out]`.
    It leaves biases and batch norms, depthwise kernels (`[k, k, 1, out]`, which are vectors a
    channel), and the network's first and last layer.
    """

    def is_taken(path: str, array: Any) -> bool:
        is_depthwise = len(array.shape) == 4 and array.shape[2] == 1
        outside = any(path.startswith(f"{layer}.") for layer in first_and_last)
        return len(array.shape) >= 2 and not is_depthwise and not outside

    return _with_paths(is_taken, params)


def _is_matrix(params: Params) -> Params:
    return jax.tree.map(lambda array: array.ndim >= 2, params)


def _dimension_numbers(params: Params) -> Params:
    return jax.tree.map(
        lambda array: MuonDimensionNumbers(tuple(range(array.ndim - 1)), array.ndim - 1), params
    )


def _shape_factor(shape: Sequence[int]) -> float:
    """sqrt(max(1, outputs / inputs)), which makes one rate fit all shapes (Jordan et al., 2024)."""
    inputs = 1
    for size in shape[:-1]:
        inputs *= size
    return max(1.0, shape[-1] / inputs) ** 0.5


def parse_groups(text: str) -> dict[str, float]:
    """`optimizer.groups` as patterns and multipliers: `"layer1.*:0.1,linear:10"`.

    Raises:
      UserError: for another form, or a multiplier that is not at least 0.
    """
    groups: dict[str, float] = {}
    for entry in split_patterns(text):
        pattern, _, number = entry.rpartition(":")
        try:
            multiplier = float(number)
        except ValueError:
            multiplier = -1.0
        if not pattern or not 0 <= multiplier < float("inf"):
            raise UserError(
                "optimizer.groups must be PATTERN:MULTIPLIER pairs with commas between them, such "
                f"as 'layer1.*:0.1,linear:10', found {entry!r}"
            )
        groups.pop(pattern, None)  # its place is that of the last one
        groups[pattern] = multiplier
    return groups


def _scaled_by_path(groups: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the paths that a pattern matches; the last match counts."""

    def init(params: Params) -> optax.EmptyState:
        # Of the frozen ones this part of the optimizer sees nothing.
        _refuse_unmatched("optimizer.groups", params, groups, "trained parameter")
        return optax.EmptyState()

    def factor(path: str) -> float:
        return next((m for p, m in reversed(list(groups.items())) if matches(path, p)), 1.0)

    def update(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
        del params
        return _with_paths(lambda path, value: value * factor(path), updates), state

    return optax.GradientTransformation(init, update)


def _labels(params: Params, frozen: Sequence[str]) -> Params:
    _refuse_unmatched("optimizer.freeze", params, frozen)
    return _with_paths(
        lambda path, _: "frozen" if any(matches(path, p) for p in frozen) else "trained", params
    )


def _refuse_unmatched(
    field: str, params: Params, patterns: Iterable[str], kind: str = "parameter"
) -> None:
    paths = [dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            layers = sorted({path.split(".")[0] for path in paths})
            raise UserError(
                f"{field}: no {kind}'s path matches {pattern!r}; found {', '.join(layers)}"
            )


def _with_paths(function: Callable[[str, Any], Any], tree: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(dotted(path), leaf), tree)


def dotted(path: Sequence[Any]) -> str:
    """`"layer1.0.conv1.weight.value"`, as checkpoints call the array."""
    keys = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
    return ".".join(str(key) for key in keys if key is not None)
