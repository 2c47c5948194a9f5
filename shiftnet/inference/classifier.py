"""The trained network that `shiftnet.load` returns."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shiftnet.config
from shiftnet import checkpoint, models, packing
from shiftnet.config import Config
from shiftnet.data import RGB, augment
from shiftnet.files import path_of
from shiftnet.kernels.implementations import compiler_options
from shiftnet.layers.folding import fix_weights
from shiftnet.layers.learned_shift import fold_shifts

# Networks of up to this size are embedded in their compiled programs as constants, once in each.
# ShiftNet-A in float32 (16 MiB) and any network for CIFAR but the widest are below it.
CONSTANT_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The most probable class of each image.

    Attributes:
      classes: int32 `[N]`.
      names: the classes' names, N of them.
      probabilities: float32 `[N, num_classes]`, each row summing to 1.
    """

    classes: np.ndarray
    names: list[str]
    probabilities: np.ndarray


class Classifier:
    """A trained network. Its first call fixes the numbers that all calls compute with.

    It can be pickled, without its compiled programs, and called by several threads.

    Attributes:
      config: the recipe it was trained by.
      class_names: by class number.
      mean: per channel, for pixels in [0, 1]; `predict` subtracts it and divides by `std`.
      std: likewise.
      path: the checkpoint or file that it was read from.
      metadata: the checkpoint's: among others the recipe, the step and the accuracies.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], network: nnx.Module):
        self.path = path
        self.config: Config = shiftnet.config.from_json(metadata["config"])
        self.class_names: tuple[str, ...] = tuple(metadata["class_names"])
        self.mean: RGB = tuple(metadata["mean"])
        self.std: RGB = tuple(metadata["std"])
        self.metadata = metadata
        fold_shifts(network)
        self.graphdef, *states = nnx.split(network, nnx.Param, nnx.BatchStat)
        self.params, self.stats = states
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        compiled = ("_lock", "_inputs", "_fixed", "_compiled")
        return {name: value for name, value in vars(self).items() if name not in compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()  # held while something is compiled
        self._inputs: set[Any] = set()  # the shapes and dtypes of images that have a program

    def __repr__(self) -> str:
        model = self.config.model
        bits = f"{model.weight_bits}-bit " if model.weight_bits else ""
        return (
            f"Classifier({model.arch} with {bits}{model.weights} weights, "
            f"{len(self.class_names)} classes of {self.config.data.name}, from {self.path})"
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Classifier":
        """Reads a checkpoint or a packed file; see `shiftnet.load`."""
        path = path_of(path, "the checkpoint")
        if path.is_file() and path.suffix == ".safetensors":
            network, metadata = packing.read(path)
            return cls(path.absolute(), metadata, network)
        return cls.of(checkpoint.read(path))

    @classmethod
    def of(cls, saved: checkpoint.Saved) -> "Classifier":
        """Builds the network of a checkpoint that was read."""
        recipe = shiftnet.config.from_json(saved.metadata["config"])
        classes = len(saved.metadata["class_names"])
        network = nnx.eval_shape(lambda: models.build(recipe.model, classes, rngs=nnx.Rngs(0)))
        graphdef, *states = nnx.split(network, nnx.Param, nnx.BatchStat)
        filled = [checkpoint.from_arrays(state, saved.arrays, saved.path) for state in states]
        return cls(saved.path, saved.metadata, nnx.merge(graphdef, *filled))

    @property
    def network(self) -> nnx.Module:
        """A copy of the network: `network(x)` takes normalised images to logits."""
        return nnx.merge(self.graphdef, self.params, self.stats, copy=True)

    def __call__(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Logits `[N, num_classes]` of normalised images `[N, H, W, 3]`, in their float dtype.

        Raises:
          ValueError: for another shape, or a dtype that is not floating.
        """
        x = jnp.asarray(x)
        if x.ndim != 4 or x.shape[-1] != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                "expected normalised floating [N, H, W, 3] "
                f"(predict takes uint8), got {x.dtype} {x.shape}"
            )
        if isinstance(x, jax.core.Tracer):  # JAX takes no options of a program within another
            with self._lock:
                fixed = self._fixed
            return nnx.merge(*fixed)(x)
        if (x.shape, x.dtype) in self._inputs:
            return self._compiled(x)
        with self._lock:
            logits = self._compiled(x)
            self._inputs.add((x.shape, x.dtype))
        return logits

    @functools.cached_property
    def _fixed(self) -> tuple[nnx.GraphDef[nnx.Module], nnx.State]:
        """The network without latents; the first use needs the lock."""
        with jax.ensure_compile_time_eval():  # the first call may be traced
            network = self.network
            fix_weights(network)
            return nnx.split(network)

    @functools.cached_property
    def _compiled(self) -> Callable[[jax.Array], jax.Array]:
        """The function that is compiled for each shape and dtype; the first use needs the lock.

        The arrays of a small network are constants: XLA computes what depends on them alone once.
        One image on 2 cores took ShiftResNet20 e=9 2.9 ms before and takes 1.7 ms, 1-bit WRN-20-10
        77 and 52 ms, 3-bit ResNet-18 of 224x224 47 and 25 ms.
        """
        graphdef, state = self._fixed

        def logits(state: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(x)

        options = compiler_options(jax.default_backend())
        if sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > CONSTANT_BYTES:
            return functools.partial(jax.jit(logits, compiler_options=options), state)
        return jax.jit(functools.partial(logits, state), compiler_options=options)

    def predict(self, images: np.ndarray, *, batch_size: int = 500) -> Predictions:
        """Classifies images.

        Compiles one program per image size for each power of two below `batch_size`, and for
        `batch_size` itself: the last batch is filled up with black images, which no other image's
        result depends on.

        Args:
          images: uint8 `[N, H, W, 3]` as stored, not normalised.
          batch_size: images per call of the network.

        Raises:
          ValueError: for images of another shape or dtype, or a `batch_size` below 1.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            count = len(batch)
            size = min(1 << (count - 1).bit_length(), batch_size)
            filled = np.pad(batch, [(0, size - count), (0, 0), (0, 0), (0, 0)])
            x = augment.normalize(jnp.asarray(filled), self.mean, self.std)
            rows.append(np.asarray(jax.nn.softmax(self(x)))[:count])
        probabilities = np.concatenate(rows)
        classes = probabilities.argmax(-1).astype(np.int32)
        return Predictions(classes, [self.class_names[c] for c in classes], probabilities)
