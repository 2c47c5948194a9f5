"""What training a recipe takes on devices that are not here: memory, traffic, and speed at best.

The real training step is compiled for the devices, which needs their compiler (libtpu, or JAX's
CUDA plugin) and none of them. What the compiled program holds and moves, over the devices' peak
rates, bounds how fast it can be: a roofline (Williams, Waterman, Patterson, CACM 52(4), 2009).
Nothing is run, downloaded or written.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shiftnet.data
from shiftnet import models, tables
from shiftnet.config import Config
from shiftnet.errors import UserError, unknown
from shiftnet.kernels import implementations
from shiftnet.kernels.layouts import LANES
from shiftnet.models.counting import count
from shiftnet.planning import chips, hlo
from shiftnet.planning.chips import CHIPS, Chip
from shiftnet.training.mesh import batch_sharded, make_mesh, replicated
from shiftnet.training.step import Program

# Of the training set, by `data.name`. ImageNet's are those of the ILSVRC 2012 classification task
# (Russakovsky et al., arXiv:1409.0575).
TRAINING_IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "digits": 1_442,
    "imagenet2012": 1_281_167,
}

NOT_MODELLED = (
    "Estimates, the best case: products, memory and network all at their peaks, and at the same "
    "time; not modelled: the input pipeline, latency, work within the chip other than products, "
    "evaluation, checkpoints."
)


class Memory(NamedTuple):
    """Bytes on each device during a step.

    Attributes:
      arguments: parameters, the optimiser's state, statistics and the batch.
      temporaries: activations, gradients and whatever else the compiler keeps.
      outputs: those that do not take an argument's place.
      code: the program itself, where the compiler keeps it there.
      data: the training set, where the run keeps that on its devices.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int
    data: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step as compiled for some devices; all figures are of one device.

    Attributes:
      batch: images of one device.
      memory: what it holds.
      flops: twice the multiply-adds of the network's products (`shiftnet.models.counting`), times
        3: the backward pass has two products for each of the forward pass.
      compiler_flops: as the compiler counts them, with everything else that is computed and
        without the kernels; None where it does not.
      traffic: bytes to and from the device's memory, see `hlo.memory_traffic`.
      collectives: see `hlo.collectives`.
    """

    batch: int
    memory: Memory
    flops: int
    compiler_flops: float | None
    traffic: int
    collectives: Sequence[hlo.Collective]

    @property
    def sent(self) -> float:
        return sum(one.sent for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a recipe takes on a topology.

    Attributes:
      topology: as it was asked for.
      chip: of each device.
      devices: how many.
      batch: images a step, all devices together.
      step: the compiled step; None where the compiler ran out of the device's memory.
      seconds: of a step at least, for "compute", "memory" and "network"; empty without a step.
      images_per_second: at most.
      hours: at least, for the recipe's epochs.
      largest: the largest batch found to fit, all devices together; 0 where none was.
    """

    topology: str
    chip: Chip
    devices: int
    batch: int
    step: Step | None
    seconds: Mapping[str, float]
    images_per_second: float
    hours: float
    largest: int

    @property
    def fits(self) -> bool:
        return self.step is not None and self.step.memory.total <= self.chip.memory

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of a data set, as far as a step depends on it.

    Attributes:
      images: to train on.
      classes: how many.
      side: of the square images of a batch, in pixels.
      resident: whether every device holds the whole training set.
    """

    images: int
    classes: int
    side: int
    resident: bool


def parse(text: str) -> list[str]:
    """The topologies in `"v5e:4x4,h200:8"`.

    Raises:
      UserError: for one that is not known.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        kind, _, size = name.partition(":")
        if kind not in CHIPS or size not in CHIPS[kind].topologies:
            known = "; ".join(f"{kind}:{'|'.join(chip.topologies)}" for kind, chip in CHIPS.items())
            raise UserError(f"unknown topology {name!r}; known: {known}")
    return names


def plan(
    config: Config, names: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> list[Estimate]:
    """Compiles the recipe's step for each topology, and some with other batches, for the largest.

    How many images fit is found for the first topology of a chip and taken for its others: what a
    device holds depends on its own share of the batch.

    Args:
      config: a validated recipe.
      names: topologies, see `parse`.
      say: told what is being compiled, since each takes from seconds to minutes.

    Raises:
      UserError: for a recipe that cannot be trained, a batch that does not divide over the devices,
        or a compiler that is not installed.
    """
    models.check(config.model)
    facts = _facts(config)
    places = [chips.devices(name) for name in names]
    for _, devices in places:  # before the first minute of compiling
        make_mesh(config.batch_size, devices)
    if config.batch_size > facts.images:
        raise UserError(
            f"batch_size {config.batch_size} is more than the {facts.images} training images"
        )
    most: dict[str, int] = {}
    estimates = []
    for name, (chip, devices) in zip(names, places, strict=True):

        def compiled(batch: int, name=name, chip=chip, devices=devices) -> Step | None:
            say(f"compiling a step of {batch * len(devices)} images for {name}")
            return compile_step(config, facts, chip, devices, batch)

        kind = name.partition(":")[0]
        step = compiled(config.batch_size // len(devices))
        if kind not in most:
            share, at_most = (n // len(devices) for n in (config.batch_size, facts.images))
            most[kind] = largest(compiled, step, share, chip.memory, at_most)
        estimates.append(_estimate(name, chip, len(devices), config, facts, step, most[kind]))
    return estimates


def compile_step(
    config: Config, facts: Facts, chip: Chip, devices: Sequence[jax.Device], batch: int
) -> Step | None:
    """Compiles `Program.train_batch`; None where the device's memory is too small for it.

    Args:
      config: the recipe, whose batch size is not looked at.
      facts: of its data set.
      chip: what the devices are.
      devices: of a topology.
      batch: images of each device.
    """
    config = dataclasses.replace(config, batch_size=batch * len(devices))
    mesh = make_mesh(config.batch_size, devices)
    name = config.data.name if config.data.source == "tfds" else shiftnet.data.IMAGENET
    mean, std = shiftnet.data.normalization(name, config.data.mean, config.data.std)
    program = Program(
        config,
        num_classes=facts.classes,
        mean=mean,
        std=std,
        steps_per_epoch=max(1, facts.images // config.batch_size),
        mesh=mesh,
    )
    divided = batch_sharded(mesh)
    images = (config.batch_size, facts.side, facts.side, 3)
    operands = (
        program.init.eval_shape(np.uint32(config.seed)),  # with the shardings that a run gives it
        jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(mesh)),
        jax.ShapeDtypeStruct(images, jnp.uint8, sharding=divided),
        jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=divided),
    )
    with implementations.lowered_for(chip.kernels), _uncached():
        lowered = program.train_batch.trace(*operands).lower(lowering_platforms=(chip.platform,))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
    held, text = compiled.memory_analysis(), compiled.as_text()
    network = nnx.eval_shape(lambda: models.build(config.model, facts.classes, rngs=nnx.Rngs(0)))
    counted = count(network, images[1:])
    return Step(
        batch=batch,
        memory=Memory(
            arguments=held.argument_size_in_bytes,
            temporaries=held.temp_size_in_bytes,
            outputs=held.output_size_in_bytes - held.alias_size_in_bytes,
            code=held.generated_code_size_in_bytes,
            data=facts.images * (3 * facts.side**2 + 4) if facts.resident else 0,
        ),
        flops=6 * counted.multiply_adds * batch,
        compiler_flops=(compiled.cost_analysis() or {}).get("flops"),
        traffic=hlo.memory_traffic(text),
        collectives=hlo.collectives(text, len(devices)),
    )


def largest(
    compiled: Callable[[int], Step | None], first: Step | None, batch: int, limit: float, most: int
) -> int:
    """The most images a device that were compiled and fit; at most four times is compiled.

    What a step holds is nearly a line over its images, but not quite: the compiler recomputes when
    it lacks memory, and kernels take some batches and not others. So the line through what is known
    says what to compile next, and only what was compiled counts.

    Args:
      compiled: a step of so many images a device; None where the compiler ran out of memory.
      first: what it gave for `batch`.
      batch: images a device.
      limit: bytes.
      most: images a device at most.

    Returns:
      `batch`, `most`, or what `_round` makes of a number of images; 0 where nothing fits.
    """
    known = {batch: first}

    def fitting() -> list[int]:
        return [b for b, step in known.items() if step and step.memory.total <= limit]

    for _ in range(4):
        fits = max(fitting(), default=0)
        fails = min(known.keys() - fitting(), default=most + 1)
        guess = min(_round(_images_at(limit, known)), most)
        if guess >= fails:
            guess = _round((fits + fails) // 2)
        if guess < 1.05 * fits or guess == 0 or guess in known:
            break
        known[guess] = compiled(guess)
    return max(fitting(), default=0)


def _images_at(limit: float, known: Mapping[int, Step | None]) -> int:
    """How many images take `limit` bytes, on the line through the largest step and another."""
    points = sorted((batch, step.memory) for batch, step in known.items() if step)
    if not points:
        return min(known) // 2
    batch, held = points.pop()
    # Of two steps that are close the difference is mostly in what the compiler chose.
    for smaller, less in reversed(points):
        if smaller <= 0.8 * batch:
            each = (held.total - less.total) / (batch - smaller)
            return max(0, int(batch + (limit - held.total) / each)) if each > 0 else 2 * batch
    # Of one point, or of close ones: as if all temporaries were the images'. That gives too few, so
    # if it does not go far, it is no second point for the line.
    guess = int(batch + (limit - held.total) * batch / max(held.temporaries, 1))
    return 2 * batch if batch <= guess < 1.25 * batch else max(0, guess)


def _round(batch: int) -> int:
    """Less by at most a tenth: a multiple of the lanes that kernels want to fill, or of 8."""
    multiples = (batch // n * n for n in (LANES, 8))
    return next((near for near in multiples if near >= 0.9 * batch), batch)


def _estimate(
    name: str,
    chip: Chip,
    devices: int,
    config: Config,
    facts: Facts,
    step: Step | None,
    most: int,
) -> Estimate:
    seconds = {}
    images_per_second = hours = float("nan")
    if step is not None:
        seconds = {
            "compute": step.flops / chip.flops[config.model.dtype],
            "memory": step.traffic / chip.memory_bandwidth,
            "network": step.sent / chip.link_bandwidth,
        }
        a_step = max(seconds.values())
        images_per_second = config.batch_size / a_step
        hours = config.epochs * (facts.images // config.batch_size) * a_step / 3600
    return Estimate(
        topology=name,
        chip=chip,
        devices=devices,
        batch=config.batch_size,
        step=step,
        seconds=seconds,
        images_per_second=images_per_second,
        hours=hours,
        largest=min(most, facts.images // devices) * devices,
    )


def _facts(config: Config) -> Facts:
    """Those of the recipe's data set; a folder of image files is looked at, nothing else is."""
    data = config.data
    if data.source == "folder":
        dataset = shiftnet.data.load(
            data.name, source=data.source, data_dir=data.dir, validation=data.validation
        )
        return Facts(len(dataset.train), len(dataset.class_names), data.size, resident=False)
    if data.name not in TRAINING_IMAGES:
        raise unknown("dataset", data.name, TRAINING_IMAGES)
    images = TRAINING_IMAGES[data.name] - data.validation
    if images < 1:
        raise UserError(f"data.validation is {data.validation}; {data.name} has fewer images")
    if data.name == shiftnet.data.IMAGENET:
        return Facts(images, 1000, data.size, resident=False)
    return Facts(images, len(shiftnet.data.class_names(data.name)), 32, resident=True)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps what is compiled out of JAX's cache: without such a device it cannot be read back."""
    flags: Any = jax.config  # older versions of JAX do not declare what it holds
    seconds = flags.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def report(config: Config, estimates: Sequence[Estimate]) -> str:
    """The estimates as a table, a column each, and what they leave out."""
    kinds = sorted({c.kind for one in estimates if one.step for c in one.step.collectives})
    columns = [_column(one, kinds) for one in estimates]
    rows: list[Sequence[object]] = [("", *(one.topology for one in estimates))]
    for title in max(columns, key=len):  # one without a step is shorter
        rows.append((title, *(column.get(title, "-") for column in columns)))
    title = (
        f"{config.model.arch} on {config.data.dir or config.data.name}, {config.model.dtype}, "
        f"{config.epochs} epochs in steps of {config.batch_size} images; of a step, on each device:"
    )
    return "\n".join([title, "", tables.aligned(rows), "", NOT_MODELLED])


def _column(one: Estimate, kinds: Sequence[str]) -> dict[str, object]:
    """An estimate's cells, by the titles of their rows."""
    column: dict[str, object] = {
        "devices": one.devices,
        "images a device": one.batch // one.devices,
    }
    if step := one.step:
        column |= {
            "memory: state and batch": _si(step.memory.arguments, "B"),
            "memory: temporaries": _si(step.memory.temporaries, "B"),
            "memory: outputs besides": _si(step.memory.outputs, "B"),
            "memory: program": _si(step.memory.code, "B"),
            "memory: training set": _si(step.memory.data, "B"),
            "memory: in all": _si(step.memory.total, "B"),
        }
    column |= {"of": _si(one.chip.memory, "B"), "fits": "yes" if one.fits else "NO"}
    if step:
        moved = hlo.by_kind(step.collectives)
        for kind in kinds:
            times, nbytes = moved.get(kind, (0, 0))
            column[f"{kind}: times"] = times
            column[f"{kind}: operands"] = _si(nbytes, "B")
        compiler = step.compiler_flops
        column |= {
            "sent to other devices": _si(step.sent, "B"),
            "memory read and written": _si(step.traffic, "B"),
            "FLOPs of products": _si(step.flops, "FLOP"),
            "FLOPs, by the compiler": "-" if compiler is None else _si(compiler, "FLOP"),
            **{f"{unit}, at peak": _si(s, "s") for unit, s in one.seconds.items()},
            "bound by": one.bound,
            "images/s, at most": round(one.images_per_second),
            "hours, at least": f"{one.hours:.2g}",
        }
    return column | {"largest batch that fits": one.largest}


def _si(value: float, unit: str) -> str:
    """With four digits and a prefix: `229.4 MB`, `1.962 ms`."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1), ("m", 1e-3)):
        if value >= scale or (value == 0 and scale == 1):
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value / 1e-6:.4g} µ{unit}"
