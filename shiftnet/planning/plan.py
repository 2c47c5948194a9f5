"""Estimates the memory, traffic and best speed of training a recipe on devices that are not here.

The real training step is compiled for the devices. That needs their compiler (libtpu, or JAX's
CUDA plugin), not the devices. The compiled program's arithmetic and traffic, divided by the
devices' peak rates, bound its speed: a roofline (Williams, Waterman, Patterson, CACM 52(4), 2009).
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

# Sizes of the training sets, by `data.name`. ImageNet's is that of the ILSVRC 2012 classification
# task (Russakovsky et al., arXiv:1409.0575).
TRAINING_IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "digits": 1_442,
    "imagenet2012": 1_281_167,
}

NOT_MODELLED = (
    "These are best-case estimates, with products, memory and network all at their peak rates at "
    "the same time. Not modelled: the input pipeline, latency, work within the chip other than "
    "products, a teacher's forward pass, evaluation, checkpoints."
)


class Memory(NamedTuple):
    """Bytes on each device during a step.

    Attributes:
      arguments: parameters, optimizer state, statistics and the batch.
      temporaries: activations, gradients and whatever else the compiler keeps.
      outputs: outputs that do not reuse an argument's memory.
      code: the program itself, if the compiler keeps it in the device's memory.
      data: the training set, if the run keeps it on its devices.
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
    """A compiled training step; all figures are per device.

    Attributes:
      batch: number of images.
      memory: bytes in use.
      flops: 6 times the multiply-adds of the network's products (`shiftnet.models.counting`): two
        operations each, in the forward pass and in the two products of the backward pass.
      compiler_flops: the compiler's own count, which includes everything else that is computed and
        excludes kernels; None if it has none.
      traffic: bytes read from and written to the device's memory, see `hlo.memory_traffic`.
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
    """What training a recipe needs on a topology.

    Attributes:
      topology: its name, as the user gave it.
      chip: the kind of its devices.
      devices: the number of its devices.
      batch: images per step, over all devices.
      step: the compiled step; None if the compiler ran out of the device's memory.
      seconds: lower bounds of a step's time, for "compute", "memory" and "network"; empty without a
        step.
      images_per_second: an upper bound.
      hours: a lower bound for the recipe's epochs.
      largest: the largest batch found to fit, over all devices; 0 if none was.
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
        """The resource that takes the longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a data set that a step depends on.

    Attributes:
      images: number of training images.
      classes: number of classes.
      side: height and width of a batch's images, in pixels.
      resident: whether every device holds the whole training set.
    """

    images: int
    classes: int
    side: int
    resident: bool


def parse(text: str) -> list[str]:
    """Returns the topologies in a text such as `"v5e:4x4,h200:8"`.

    Raises:
      UserError: if one of them is unknown.
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
    """Compiles the recipe's step for each topology, and searches the largest batch that fits.

    The search runs on the first topology of each chip; its result is taken for the chip's other
    topologies, because a device's memory depends only on its own part of the batch.

    Args:
      config: a validated recipe.
      names: topologies, see `parse`.
      say: is called with what is being compiled, since each compilation takes seconds to minutes.

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
    """Compiles `Program.train_batch`; returns None if the device's memory is too small for it.

    Args:
      config: the recipe; its batch size says how many steps an epoch has, and no more.
      facts: the facts about its data set.
      chip: the kind of the devices.
      devices: the devices of a topology.
      batch: images per device.
    """
    steps_per_epoch = max(1, facts.images // config.batch_size)
    config = dataclasses.replace(config, batch_size=batch * len(devices))
    mesh = make_mesh(config.batch_size, devices)
    name = config.data.name if config.data.source == "tfds" else shiftnet.data.IMAGENET
    mean, std = shiftnet.data.normalization(name, config.data.mean, config.data.std)
    program = Program(
        config,
        num_classes=facts.classes,
        mean=mean,
        std=std,
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
    )
    network = nnx.eval_shape(lambda: models.build(config.model, facts.classes, rngs=nnx.Rngs(0)))
    counted = count(network, (facts.side, facts.side, 3))
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
    """Returns the largest number of images per device that was compiled and fits.

    Memory grows almost linearly with the number of images, but not quite: the compiler recomputes
    when memory is short, and kernels take some batches and not others. So a linear fit to the known
    steps only proposes what to compile next, at most four times, and only compiled steps count.

    Args:
      compiled: compiles a step of that many images per device; returns None if the compiler ran out
        of memory.
      first: its result for `batch`.
      batch: images per device.
      limit: bytes of the device's memory.
      most: upper bound of images per device.

    Returns:
      `batch`, `most`, or a number rounded by `_round`; 0 if nothing fits.
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
    """Extrapolates how many images take `limit` bytes, from the largest step and another."""
    points = sorted((batch, step.memory) for batch, step in known.items() if step)
    if not points:
        return min(known) // 2
    batch, held = points.pop()
    # Two steps of nearly the same size differ mostly in what the compiler chose.
    for smaller, less in reversed(points):
        if smaller <= 0.8 * batch:
            each = (held.total - less.total) / (batch - smaller)
            return max(0, int(batch + (limit - held.total) / each)) if each > 0 else 2 * batch
    # With a single point, assume that all temporaries grow with the images. That underestimates,
    # so if the result is close to the point, it would not help as a second one.
    guess = int(batch + (limit - held.total) * batch / max(held.temporaries, 1))
    return 2 * batch if batch <= guess < 1.25 * batch else max(0, guess)


def _round(batch: int) -> int:
    """Rounds down by at most a tenth, to a multiple of the lanes that kernels fill, or of 8."""
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
    """Returns the facts about the recipe's data set; of data on disk it reads only folders."""
    data = config.data
    side = data.size or models.image_size(config.model.arch)
    if data.source != "tfds":
        dataset = shiftnet.data.load(
            data.name, source=data.source, data_dir=data.dir, validation=data.validation
        )
        resident = shiftnet.data.is_small(data.name, data.source, side)
        return Facts(len(dataset.train), len(dataset.class_names), side, resident)
    if data.name not in TRAINING_IMAGES:
        raise unknown("dataset", data.name, TRAINING_IMAGES)
    images = TRAINING_IMAGES[data.name]
    images -= shiftnet.data.num_validation(data.name, images, data.validation)
    if data.name == shiftnet.data.IMAGENET:
        return Facts(images, 1000, side, resident=False)
    return Facts(images, len(shiftnet.data.class_names(data.name)), 32, resident=True)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of JAX's cache, because without such a device they cannot be read back."""
    flags: Any = jax.config  # older versions of JAX do not declare what it holds
    seconds = flags.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def report(config: Config, estimates: Sequence[Estimate]) -> str:
    """Returns the estimates as a table, with one column each, and what they leave out."""
    kinds = sorted({c.kind for one in estimates if one.step for c in one.step.collectives})
    columns = [_column(one, kinds) for one in estimates]
    rows: list[Sequence[object]] = [("", *(one.topology for one in estimates))]
    for title in max(columns, key=len):  # one without a step is shorter
        rows.append((title, *(column.get(title, "-") for column in columns)))
    title = (
        f"{config.model.arch} on {config.data.dir or config.data.name}, {config.model.dtype}, "
        f"{config.epochs} epochs in steps of {config.batch_size} images; per step and device:"
    )
    return "\n".join([title, "", tables.aligned(rows), "", NOT_MODELLED])


def _column(one: Estimate, kinds: Sequence[str]) -> dict[str, object]:
    """Returns an estimate's cells, by the titles of their rows."""
    column: dict[str, object] = {
        "devices": one.devices,
        "images per device": one.batch // one.devices,
    }
    if step := one.step:
        column |= {
            "memory: state and batch": _si(step.memory.arguments, "B"),
            "memory: temporaries": _si(step.memory.temporaries, "B"),
            "memory: other outputs": _si(step.memory.outputs, "B"),
            "memory: program": _si(step.memory.code, "B"),
            "memory: training set": _si(step.memory.data, "B"),
            "memory: total": _si(step.memory.total, "B"),
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
    """Formats a value with four digits and a prefix: `229.4 MB`, `1.962 ms`."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1), ("m", 1e-3)):
        if value >= scale or (value == 0 and scale == 1):
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value / 1e-6:.4g} µ{unit}"
