"""Where a run begins: at its newest good checkpoint, at another network's numbers, or afresh."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet import models, quantizers
from shiftnet.checkpoint import CheckpointManager, Saved, from_arrays, to_arrays
from shiftnet.config import Config, from_json
from shiftnet.data import Dataset
from shiftnet.errors import UserError
from shiftnet.models.network import norms_after
from shiftnet.training.batch_statistics import BATCHES, make_estimator, unfold
from shiftnet.training.distillation import Teacher
from shiftnet.training.low_bit import Codes, LevelWatch
from shiftnet.training.mesh import replicated
from shiftnet.training.step import Program, StackedProgram, TrainState
from shiftnet.training.trained import read as read_trained

# Arrays that a message on fresh ones names.
MOST_NAMED = 12


@dataclasses.dataclass
class Record:
    """What a run knows of its past besides the arrays; part of each checkpoint's metadata.

    Lists have one entry per seed.

    Attributes:
      step: steps taken.
      sums: of the epoch under way, see `MetricAccumulator`; None at its start.
      data: the data iterator's state.
      best: `{"epoch", "accuracy", "test_accuracy"}` (fractions) of the epoch with the highest
        accuracy so far; None before the first evaluation.
      final: test accuracy after the last epoch, a fraction; None before that.
      seconds: spent in all sessions, compilation included.
      epoch_end: seconds that the longest evaluation at an epoch's end took.
      sessions: what `train` was told of each session, each once, the last one last.
    """

    step: int
    sums: Sequence[Mapping[str, float] | None]
    data: dict[str, Any]
    best: list[dict[str, Any] | None]
    final: list[float | None]
    seconds: float
    epoch_end: float
    sessions: list[Mapping[str, Any]]

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], runs: int) -> "Record":
        """Reads a checkpoint's metadata; `{}` gives the record of a run that has not begun."""

        def each(key: str, value: Any = None) -> list[Any]:
            found = metadata.get(key, value)
            return list(found) if isinstance(found, (list, tuple)) else [found] * runs

        return cls(
            step=metadata.get("step", 0),
            sums=each("tallies", metadata.get("tally")),
            data=dict(metadata.get("feed", {})),
            best=[b and {"test_accuracy": b["accuracy"], **b} for b in each("best")],
            final=each("final"),
            seconds=metadata.get("seconds", 0.0),
            epoch_end=metadata.get("epoch_end", 0.0),
            sessions=list(metadata.get("visits", [])),
        )

    def metadata(self) -> dict[str, Any]:
        """Returns what `of_metadata` reads."""
        values = dict(vars(self))
        names = {"sums": "tallies", "data": "feed", "sessions": "visits"}
        return {names.get(name, name): value for name, value in values.items()}


def facts(dataset: Dataset, steps_per_epoch: int, teacher: Teacher | None = None) -> dict[str, Any]:
    """Describes what a run learns from in its checkpoints' metadata."""
    return {
        **({"teacher": teacher.digest} if teacher else {}),
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "images": dataset.images,
        "undivided": dataset.undivided,
        "steps_per_epoch": steps_per_epoch,
    }


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Compares the data, and the teacher, that a checkpoint was trained on with those here.

    Args:
      saved: the checkpoint's metadata; what older ones lack is not compared.
      now: from `facts`.
      source: the checkpoint, named in errors.

    Raises:
      UserError: where the classes, the numbers of images, the steps per epoch or the teacher
        differ.
    """
    changes = []
    old, new = (one.get("class_names", []) for one in (saved, now))
    if old and len(old) != len(new):
        changes.append(f"classes: {len(old)} -> {len(new)}")
    elif old and set(old) != set(new):
        (gone, *_), (came, *_) = (sorted(set(a) - set(b)) for a, b in ((old, new), (new, old)))
        changes.append(f"class names: {gone!r} -> {came!r}")
    elif old and old != new:
        changes.append("the order of the classes")
    for part, count in saved.get("images", {}).items():
        if count != now["images"][part]:
            changes.append(f"{part} images: {count} -> {now['images'][part]}")
    known = [one["undivided"] for one in (saved, now) if "undivided" in one]
    if len(set(known)) > 1:
        changes.append("the files, of which others would be held out")
    if saved.get("teacher") != now.get("teacher"):
        changes.append("the teacher")
    steps = saved.get("steps_per_epoch", now["steps_per_epoch"])
    if steps != now["steps_per_epoch"]:
        changes.append(f"steps per epoch: {steps} -> {now['steps_per_epoch']}")
    if changes:
        raise UserError(
            f"{source} was trained on other data ({'; '.join(changes)}): "
            "continue it on the same data, or take another --workdir"
        )


def restore(
    program: Program | StackedProgram,
    watch: LevelWatch,
    seed: np.uint32 | np.ndarray,
    checkpoints: CheckpointManager,
    step: int,
    metadata: Mapping[str, Any],
) -> tuple[TrainState, Codes, dict[str, jax.Array] | None]:
    """Reads the state of a run, or of several, at a checkpoint.

    Until 2026-11 a single seed of the results was saved like several, with a first axis on every
    array, and the first seed's best network lay in each checkpoint instead of in `best/`.

    Args:
      program: the run's.
      watch: likewise.
      seed: as for `program.init`.
      checkpoints: where it is.
      step: which.
      metadata: the checkpoint's.

    Returns:
      The state; the low-bit weights' levels at the last epoch's end; the first seed's best network
      where the checkpoint has it.
    """

    def on_mesh(tree: Any, axes: tuple[int, ...] = ()) -> Any:
        where = replicated(program.mesh)  # as after a step, or that is compiled once more
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*axes, *leaf.shape), leaf.dtype, sharding=where),
            tree,
        )

    like = program.init.eval_shape(seed)  # with its shardings
    parts = {"model": to_arrays(like.params, like.stats), "optimizer": like.opt_state}
    if like.ema is not None:
        parts["ema"] = to_arrays(*like.ema)
    if watch:
        parts["levels"] = on_mesh(jax.eval_shape(watch.codes, like.params, like.stats))
    of_old = "seeds" in metadata and "stacked" not in metadata
    if of_old and program.runs == 1:
        parts = on_mesh(parts, (1,))
    if of_old:
        first = jax.eval_shape(lambda state: program.of(state, 0), like)
        parts["best"] = on_mesh(to_arrays(first.params, first.stats))
    found, _ = checkpoints.restore(step, **parts)
    best = found.pop("best", None)
    if of_old and program.runs == 1:
        found = jax.tree.map(lambda leaf: jax.device_put(leaf[0], replicated(program.mesh)), found)
    source = checkpoints.path(step)
    state = TrainState(
        step=jax.device_put(jnp.full(like.step.shape, step, jnp.int32), replicated(program.mesh)),
        params=from_arrays(like.params, found["model"], source),
        stats=from_arrays(like.stats, found["model"], source),
        opt_state=found["optimizer"],
        ema=like.ema
        and (
            from_arrays(like.ema[0], found["ema"], source),
            from_arrays(like.ema[1], found["ema"], source),
        ),
    )
    return state, found.get("levels", {}), best


@dataclasses.dataclass(frozen=True)
class Init:
    """The numbers that a run starts from in place of fresh ones.

    Attributes:
      path: a checkpoint, or a packed file.
      partial: take what fits from a network of another architecture.
      fresh_head: draw the last layer anew.
    """

    path: str | Path
    partial: bool = False
    fresh_head: bool = False


def start_from(
    program: Program, state: TrainState, init: Init, config: Config, dataset: Dataset
) -> tuple[TrainState, str]:
    """Puts the numbers of a checkpoint or of a packed file into a fresh state.

    Where a layer has another form of weights in the checkpoint, it gets the weights nearest to what
    it computes with there, see `requantize`; another form of activations starts afresh. In the last
    layer the classes are matched by name;
    where no name is the same, it is taken as it is if there are as many classes, and stays fresh
    otherwise. Other arrays that the checkpoint lacks stay as they were drawn. The batch norms of a
    packed file, which are folded, get statistics anew, see `unfold`.

    Args:
      program: the run's.
      state: fresh.
      init: what to start from.
      config: the run's.
      dataset: the run's.

    Returns:
      The state, and a message on what was taken.

    Raises:
      UserError: where the checkpoint has none of the arrays, or is of another architecture and
        `init.partial` is not set.
    """
    saved, notes = _saved(init, program, config, dataset)
    own = to_arrays(state.params, state.stats)
    network = nnx.merge(program.graphdef, state.params, state.stats, copy=True)
    if not init.partial:
        _check_same_layers(saved, own)
    last = network.first_and_last[1]
    head = tuple(f"{layer}." for layer in (last, norms_after(network).get(last)) if layer)
    given, names = (list(one) for one in (saved.metadata["class_names"], dataset.class_names))
    columns = {names.index(name): given.index(name) for name in given if name in names}
    keeps_order = given == names or (not columns and len(given) == len(names))
    in_order = {} if keeps_order else {last: columns}
    converted, changes, more = requantize(network, saved, in_order)
    taken, fresh = {}, []
    for name, array in own.items():
        other = changes.get(name, None if name.startswith(converted) else saved.arrays.get(name))
        is_ordered = keeps_order or (name in changes and name.startswith(f"{last}.weight."))
        if other is not None and name.startswith(head) and (init.fresh_head or not is_ordered):
            both = other.shape[-1:] + array.shape[-1:]
            if init.fresh_head or not columns:
                other = None
            elif both == (len(given), len(names)) and other.shape[:-1] == array.shape[:-1]:
                other = _by_class(array, other, columns)
            elif both:  # not a number for the whole layer, such as a scale
                other = None
        if other is not None and other.shape == array.shape:
            taken[name] = jax.device_put(np.asarray(other), array.sharding)
        elif other is None or init.partial:
            fresh.append(name)
        else:
            raise UserError(
                f"{saved.path}: {name!r} has shape {other.shape}, the network needs {array.shape}; "
                "--init-partial takes what fits"
            )
    if not taken:
        raise UserError(f"{saved.path} has none of the network's arrays")
    if columns and not keeps_order and not init.fresh_head:
        notes.append(f"the last layer has {len(columns)} of {len(names)} classes from there")
    arrays = own | taken
    state = dataclasses.replace(
        state,
        params=from_arrays(state.params, arrays, saved.path),
        stats=from_arrays(state.stats, arrays, saved.path),
    )
    message = f"started from {saved.path}: {len(taken)} arrays taken"
    if fresh:
        more_fresh = len(fresh) - MOST_NAMED
        message += f"; fresh: {', '.join(fresh[:MOST_NAMED])}"
        message += f" and {more_fresh} more" if more_fresh > 0 else ""
    return state, "\n".join([message, *notes, *more])


def _saved(
    init: Init, program: Program, config: Config, dataset: Dataset
) -> tuple[Saved, list[str]]:
    """Reads what a run starts from, as a checkpoint has it, and messages on it."""
    trained = read_trained(init.path, "--init")
    if trained.saved is not None:
        return trained.saved, []
    network = trained.network()
    model, classes = from_json(trained.metadata["config"]).model, len(trained.class_names)
    unfold(
        network,
        nnx.eval_shape(lambda: models.build(model, classes, rngs=nnx.Rngs(0))),
        functools.partial(
            make_estimator,
            part=dataset.train,
            data=config.data,
            mean=dataset.mean,
            std=dataset.std,
            batch_size=config.batch_size,
            batches=BATCHES,
            mesh=program.mesh,
        ),
    )
    _give_latents(network, models.build(model, classes, rngs=nnx.Rngs(0)))
    _, *states = nnx.split(network, nnx.Param, nnx.BatchStat)
    images = min(BATCHES * config.batch_size, len(dataset.train))
    return (
        Saved(trained.path, to_arrays(*states), trained.metadata),
        [f"its batch norms are folded: their statistics are estimated on {images} training images"],
    )


def _give_latents(network: nnx.Module, like: nnx.Module) -> None:
    """Puts latents that give the same weights in the place of a packed file's weights.

    Args:
      network: changed in place.
      like: the same network, with latents of whatever value; they become the network's.
    """
    forms = quantizers.of_layers(like)
    for path, layer in list(nnx.iter_modules(network)):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, quantizers.Fixed):
            form, quantized = forms[".".join(map(str, path))], weight.quantized()
            assert isinstance(form, quantizers.LowBitWeight)
            scale = None if form.scale_shape is None else np.asarray(quantized.scale)
            form.set_quantized(np.asarray(quantized.codes), scale)
            layer.weight = nnx.data(form)  # type: ignore[attr-defined]


def _check_same_layers(saved: Saved, own: Mapping[str, Any]) -> None:
    """Checks that a checkpoint's network has the layers of another one.

    Raises:
      UserError: where it has not.
    """
    theirs, ours = ({_layer(name) for name in arrays} for arrays in (saved.arrays, own))
    if not theirs & ours:
        raise UserError(f"{saved.path} has none of the network's arrays")
    for words, some, others in (("has", theirs, ours), ("lacks", ours, theirs)):
        for layer in sorted(some - others):
            # A part of a layer, as of its activations, makes no other architecture, nor do the
            # rectifiers that one form of activations has.
            arrays = saved.arrays if some is theirs else own
            if f"{layer}.shift_in" in arrays:
                continue
            if not any(layer.startswith(f"{other}.") for other in others):
                raise UserError(
                    f"{saved.path} is of another architecture, which {words} {layer!r}; "
                    "--init-partial takes what fits"
                )


def _layer(name: str) -> str:
    """Returns the path of the layer that an array belongs to."""
    return name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]


def _by_class(
    own: jax.Array | np.ndarray, other: jax.Array | np.ndarray, columns: Mapping[int, int]
) -> np.ndarray:
    """Returns an array of the last layer with another one's numbers for the classes of both."""
    result = np.array(own)
    result[..., list(columns)] = np.asarray(other)[..., list(columns.values())]
    return result


def requantize(
    network: nnx.Module,
    saved: Saved,
    columns: Mapping[str | None, Mapping[int, int]] = types.MappingProxyType({}),
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """Converts the weights of a checkpoint whose layers have other forms than a network's.

    A low-bit weight becomes the nearest one of its form up to a factor, see
    `LowBitWeight.start_from`. The factor goes into the running statistics of the batch norm behind
    the layer, which then normalizes to the same; where there is none it is lost, and a message says
    so if it is not 1.

    Args:
      network: with fresh weights.
      saved: the checkpoint.
      columns: of a layer whose outputs are to be in another order, which of the checkpoint's each
        one is; others stay fresh.

    Returns:
      The starts of the names of arrays that are not to be taken from the checkpoint, the arrays in
      their place, and messages.
    """
    weights = quantizers.of_layers(network)
    config = from_json(saved.metadata["config"])
    try:
        shape = nnx.eval_shape(
            lambda: models.build(config.model, len(saved.metadata["class_names"]), rngs=nnx.Rngs(0))
        )
        graphdef, *states = nnx.split(shape, nnx.Param, nnx.BatchStat)
        filled = [from_arrays(part, saved.arrays, saved.path) for part in states]
    except UserError:  # not a whole network of ours: its arrays are taken by name alone
        return (), {}, []
    other_network = nnx.merge(graphdef, *filled)
    given = quantizers.of_layers(other_network)
    norms = norms_after(network)
    starts, lost, errors = _other_activations(network, other_network), [], []
    changes: dict[str, np.ndarray] = {}
    kinds: dict[str, None] = {}
    for layer, weight in weights.items():
        other = given.get(layer)
        if other is None or _form(other) == _form(weight):
            continue
        value = np.asarray(other(), np.float64)
        if (order := columns.get(layer)) and value.shape[:-1] == weight.shape[:-1]:
            value = _by_class(np.asarray(weight(), np.float64), value, order)
        if value.shape != weight.shape:
            continue
        starts.append(f"{layer}.weight.")
        if not isinstance(weight, quantizers.LowBitWeight):
            changes[f"{layer}.weight.value"] = value.astype(np.float32)
            continue
        weight.start_from(value)
        nearest = np.asarray(weight(), np.float64)
        factor = (value * nearest).sum() / max(np.square(nearest).sum(), 1e-30) or 1.0
        for keys, latent in nnx.to_flat_state(nnx.state(weight, nnx.Param)):
            path = ".".join(map(str, keys))
            changes[f"{layer}.weight.{path}"] = np.asarray(latent.get_value())
        errors.append((np.square(value - factor * nearest).sum(), np.square(value).sum()))
        kinds[f"{_form(other)} -> {_form(weight)}"] = None
        norm = norms.get(layer)
        if norm is None or f"{norm}.mean" not in saved.arrays:
            if abs(factor - 1) > 1e-3:
                lost.append(f"{layer} ({factor:.3g})")
            continue
        for name, divisor in ((f"{norm}.mean", factor), (f"{norm}.var", factor**2)):
            changes[name] = np.asarray(saved.arrays[name], np.float32) / np.float32(divisor)
    notes = []
    if errors:
        distance, power = map(sum, zip(*errors, strict=True))
        notes.append(
            f"the weights of {len(errors)} layers became the nearest {', '.join(kinds)} ones, "
            f"{distance / max(power, 1e-30):.1%} of their power apart"
        )
    if lost:
        notes.append(f"no batch norm takes up the factor of {', '.join(lost)}: it is lost")
    return tuple(starts), changes, notes


def _other_activations(network: nnx.Module, given: nnx.Module) -> list[str]:
    """Starts of the names of activation forms' arrays that mean something else in `given`."""
    own, others = map(quantizers.activations_of_layers, (network, given))
    return [
        f"{layer}.activation."
        for layer, form in own.items()
        if layer in others and (type(form), form.bits) != (type(others[layer]), others[layer].bits)
    ]


def _form(weight: quantizers.Weight) -> str:
    """The form of a weight: its class, and its bits where it is a low-bit one."""
    name = type(weight).__name__.lower()
    return f"{name} {weight.bits}-bit" if isinstance(weight, quantizers.LowBitWeight) else name
