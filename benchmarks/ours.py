"""The worker that times our own training step, inference and training loop."""

import dataclasses
import platform
import queue
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import shiftnet.config
import shiftnet.data
from benchmarks.protocol import Measurement, serve
from shiftnet import checkpoint, models
from shiftnet.inference import Classifier
from shiftnet.interchange import torch_names
from shiftnet.kernels import operation
from shiftnet.kernels.implementations import only_xla
from shiftnet.training import engine
from shiftnet.training.mesh import BATCH_AXIS, compiled, replicated
from shiftnet.training.processes import set_up
from shiftnet.training.step import Program, StackedProgram, TrainState, steps_per_dispatch

CIFAR_TRAINING_IMAGES = 50_000  # our loop's steps a call follow from the size of the data set
LOOP_STEPS_ON_CPU = 8  # an epoch of CIFAR would take minutes there
LOOP_EPOCHS = 10_000  # more than will be asked for; the loop tabulates the rate of each
# Images are made normalised, so that the step gets what it would get after normalisation.
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def recipe(net: Mapping[str, Any], batch_size: int, dtype: str) -> shiftnet.config.Config:
    """The default recipe with this net.

    Args:
      net: `num_classes`, and either a ShiftResNet's `depth` and `expansion`, or any network's
        `model`, the fields of `config.model`, and `size`, the side of its images.
      batch_size: images per step.
      dtype: as the recipes' `model.dtype`.
    """
    config = shiftnet.config.default_config()
    shift = {"arch": f"shiftresnet{net.get('depth')}", "expansion": net.get("expansion")}
    config.model.update(**net.get("model", shift), dtype=dtype)
    config.batch_size = batch_size
    return config


def export(*, net: dict[str, Any], batch_size: int, path: str) -> None:
    """Writes what both sides start from: our weights under PyTorch's names, images and labels.

    Batch norms get random scales, offsets and running statistics, so that the check would notice
    one that is left out or folded wrongly.
    """
    rng = np.random.default_rng(0)
    config = recipe(net, batch_size, "float32")
    model = models.build(config.model, net["num_classes"], rngs=nnx.Rngs(0))
    weights = torch_names.to_torch(model)
    for name, value in weights.items():
        if name.endswith(("bias", "running_mean")):
            weights[name] = rng.normal(0, 0.1, value.shape).astype(np.float32)
        elif value.ndim == 1:
            weights[name] = rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
    arrays: dict[str, Any] = {f"sd/{name}": value for name, value in weights.items()}
    size = net.get("size", 32)
    arrays["images"] = rng.standard_normal((batch_size, size, size, 3), np.float32)
    arrays["labels"] = rng.integers(0, net["num_classes"], batch_size, np.int32)
    np.savez(path, **arrays)


class _Setting:
    """What every measurement starts from, out of the arguments of the request "open"."""

    def __init__(
        self,
        *,
        net: dict[str, Any],
        optimizer: dict[str, float],
        dtype: str,
        tf32: bool,
        data: str,
    ):
        if not tf32:  # JAX's default on a GPU is to use it
            jax.config.update("jax_default_matmul_precision", "highest")
        with np.load(data) as arrays:
            weights = {name[3:]: arrays[name] for name in arrays if name.startswith("sd/")}
            self.images, self.labels = jax.device_put((arrays["images"], arrays["labels"]))
        self.config = recipe(net, len(self.images), dtype)
        self.config.optimizer.update(optimizer)
        self.class_names = tuple(str(number) for number in range(net["num_classes"]))
        model = models.build(self.config.model, net["num_classes"], rngs=nnx.Rngs(0))
        torch_names.from_torch(model, weights)
        self.params = nnx.state(model, nnx.Param)
        self.stats = nnx.state(model, nnx.BatchStat)

    def program(self, steps_per_epoch: int) -> Program:
        """Returns the recipe's program on one device."""
        return Program(
            self.config,
            num_classes=len(self.class_names),
            mean=MEAN,
            std=STD,
            steps_per_epoch=steps_per_epoch,
            mesh=Mesh(np.array(jax.devices()[:1]), (BATCH_AXIS,)),
        )


class Training:
    """Our training step, `Program.update`, on one batch and one device, as our loop calls it."""

    def __init__(self, **arguments: Any):
        setting = _Setting(**arguments)
        self._batch = (setting.images, setting.labels)
        steps_per_epoch = CIFAR_TRAINING_IMAGES // setting.config.batch_size
        self._program = setting.program(steps_per_epoch)
        everywhere = replicated(self._program.mesh)
        self._state = dataclasses.replace(
            self._program.init(np.int32(0)),
            # As they are after a step, or the second call would compile once more.
            **jax.device_put({"params": setting.params, "stats": setting.stats}, everywhere),
        )
        self._length = steps_per_dispatch(steps_per_epoch, jax.default_backend())
        mesh = self._program.mesh
        self._one = compiled(self._program.update, mesh, donate_argnums=0)
        self._call = compiled(self._several, mesh, donate_argnums=0)

    def _several(self, state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        def one(state: TrainState, _: None) -> tuple[TrainState, None]:
            return self._program.update(state, images, labels)[0], None

        if self._length == 1:
            return one(state, None)[0]
        return jax.lax.scan(one, state, length=self._length)[0]

    def check(self, steps: int) -> list[float]:
        """The losses of the first `steps` steps."""
        losses = []
        for _ in range(steps):
            self._state, loss, _ = self._one(self._state, *self._batch)
            losses.append(float(loss))
        return losses

    def run(self, steps: int) -> float:
        """Runs `steps` steps, in whole calls, to the end of the device's work; seconds of each."""
        calls = -(-steps // self._length)
        start = time.perf_counter()
        for _ in range(calls):
            self._state = self._call(self._state, *self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / (calls * self._length)


class Stacked:
    """Several seeds of one recipe at once, `StackedProgram.train`, as our loop calls it.

    On random images in memory, cropped and mirrored on the device; a step is one of each seed.
    """

    def __init__(self, *, runs: int, **arguments: Any):
        setting = _Setting(**arguments)
        batch_size = setting.config.batch_size
        platform = jax.default_backend()
        count = CIFAR_TRAINING_IMAGES if platform != "cpu" else 2 * batch_size
        steps_per_epoch = count // batch_size
        program = setting.program(steps_per_epoch)
        self._program = StackedProgram(program, runs)
        self._seeds = np.arange(runs, dtype=np.uint32)
        rng = np.random.default_rng(0)
        shape = (count, *setting.images.shape[1:])
        self._data = jax.device_put(
            (
                rng.integers(0, 256, shape, np.uint8),
                rng.integers(0, len(setting.class_names), count, np.int32),
            ),
            replicated(program.mesh),
        )
        self._orders = self._program.order(self._seeds, 0, count)
        self._states = self._program.init(self._seeds)
        self._length = steps_per_dispatch(steps_per_epoch, platform)

    def check(self, steps: int) -> list[float]:
        """The losses of the next call's first step, one of each seed."""
        del steps
        return self._call()[:, 0].tolist()

    def run(self, steps: int) -> float:
        """Runs `steps` steps, in whole calls, to the end of the device's work; seconds of each."""
        calls = -(-steps // self._length)
        start = time.perf_counter()
        for _ in range(calls):
            losses = self._call()
        losses.block_until_ready()
        return (time.perf_counter() - start) / (calls * self._length)

    def _call(self) -> jax.Array:
        self._states, losses, _ = self._program.train(
            self._states, self._seeds, *self._data, self._orders, length=self._length
        )
        return losses


class Inference:
    """What `shiftnet.load` returns, called on one batch."""

    def __init__(self, **arguments: Any):
        setting = _Setting(**arguments)
        self._images = setting.images
        note = {
            "config": shiftnet.config.to_json(setting.config),
            "class_names": setting.class_names,
            "mean": MEAN,
            "std": STD,
        }
        arrays = checkpoint.to_arrays(setting.params, setting.stats)
        self._model = Classifier.of(checkpoint.Saved(Path("memory"), arrays, note))
        self._wait_each = jax.default_backend() == "cpu"  # where calls could run side by side

    def check(self, steps: int) -> list[float]:
        """The logits of the batch in a row; `steps` plays no part."""
        return np.asarray(self._model(self._images), np.float32).ravel().tolist()

    def run(self, steps: int) -> float:
        """Runs `steps` calls to the end of the device's work; returns the seconds of each."""
        start = time.perf_counter()
        for _ in range(steps):
            logits = self._model(self._images)
            if self._wait_each:
                logits.block_until_ready()
        logits.block_until_ready()
        return (time.perf_counter() - start) / steps


class PlainInference(Inference):
    """The same with no operation but in plain XLA, as it was before there were kernels."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        with only_xla():
            self._model(self._images)  # traced here, and not again


class Loop:
    """Our training loop, `shiftnet.training.engine.train`; one run of this is one epoch of it.

    It is the real loop on random images in memory: order, crop, flip and normalisation, dispatch,
    running means, progress and the check for a finite loss. Evaluation and checkpoints, which come
    once an epoch and are no part of a step, are off. The time is the loop's own, the one behind
    `images_per_second` in `metrics.jsonl`; between two epochs, where that is written, it waits.
    """

    def __init__(self, **arguments: Any):
        setting = _Setting(**arguments)
        self._config = setting.config
        self._batch_size = setting.config.batch_size
        self._steps = LOOP_STEPS_ON_CPU
        if jax.default_backend() != "cpu":
            self._steps = CIFAR_TRAINING_IMAGES // self._batch_size
        for part in (self._config.eval, self._config.checkpoint):
            part.every_epochs = LOOP_EPOCHS
        self._config.epochs = LOOP_EPOCHS
        self._workdir = Path(arguments["data"]).parent / "loop"
        self._dataset = self._random_images(setting.class_names)
        self._requests: queue.Queue[None] = queue.Queue()
        self._epochs: queue.Queue[float | Exception] = queue.Queue()
        threading.Thread(target=self._train, daemon=True).start()

    def _random_images(self, class_names: tuple[str, ...]) -> shiftnet.data.Dataset:
        rng = np.random.default_rng(0)
        count = self._steps * self._batch_size
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = rng.integers(0, len(class_names), count, np.int32)
        split = shiftnet.data.Split(images, labels)
        return shiftnet.data.Dataset("random", split, split, None, class_names, MEAN, STD)

    def _train(self) -> None:
        def epoch_ends(_: object, metrics: Mapping[str, float]) -> None:
            self._epochs.put(self._batch_size / metrics["images_per_second"])
            self._requests.get()

        self._requests.get()
        try:
            with (
                mock.patch.object(shiftnet.data, "load", return_value=self._dataset),
                mock.patch.object(engine.MetricsLog, "write", epoch_ends),
            ):
                engine.train(self._config, self._workdir)
        except Exception as error:
            self._epochs.put(error)

    def check(self, steps: int) -> list[float]:
        """There is nothing to compare: the step is `Training`'s."""
        return []

    def steps_a_run(self) -> int:
        """The steps of an epoch."""
        return self._steps

    def run(self, steps: int) -> float:
        """Runs an epoch, whatever `steps` says; returns the seconds of each of its steps."""
        self._requests.put(None)
        seconds = self._epochs.get()
        if isinstance(seconds, Exception):
            raise seconds
        return seconds


def describe() -> dict[str, Any]:
    """Versions and device, for the report."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "left_out": left_out(),
    }


def left_out() -> str | None:
    """Which of this device's kernels are not used, and why; None where all are, and on a CPU."""
    found = operation.decide()
    return "; ".join(f"{name}: {reason}" for name, reason in found.items()) or None


def open_measurement(*, task: str, **arguments: Any) -> Measurement:
    """Opens one.

    Args:
      task: "training", "stacked", "inference", "plain inference" or "loop".
      **arguments: `net` with `depth`, `expansion` and `num_classes`; `optimizer` with `lr`,
        `momentum` and `weight_decay`; `dtype` as the recipes' `model.dtype`; `tf32`, whether
        float32 products on a GPU may round their inputs to TF32; `data`, the path of what `export`
        wrote; `runs` of "stacked", the number of seeds.
    """
    tasks: dict[str, Callable[..., Measurement]]
    tasks = {
        "training": Training,
        "stacked": Stacked,
        "inference": Inference,
        "plain inference": PlainInference,
        "loop": Loop,
    }
    return tasks[task](**arguments)


if __name__ == "__main__":
    set_up()
    with operation.choices() as seen:
        serve(
            open_measurement,
            describe=describe,
            export=export,
            kernels=lambda: list(seen),  # that programs so far were traced with
        )
