"""Trained networks for use in Python: what `shiftnet.load` returns."""

import dataclasses
import functools
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
from shiftnet.data import RGB, augment
from shiftnet.kernels.implementations import compiler_options
from shiftnet.layers.folding import fix_weights

# Of a network's arrays, up to which they are constants of its programs, each of which then holds
# them. ShiftNet-A in float32 (16 MiB) and any network for CIFAR but the widest are below it.
CONSTANT_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network says of images, most probable class of each.

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

    Attributes:
      config: the recipe it was trained by.
      class_names: by class number.
      mean: per channel, for pixels in [0, 1]; what `predict` normalises by.
      std: likewise.
      path: the checkpoint or file it came from.
      note: what is known of it: the recipe, the step, the accuracies.
    """

    def __init__(self, path: Path, note: Mapping[str, Any], network: nnx.Module):
        self.path = path
        self.config: Any = shiftnet.config.from_json(note["config"])
        self.class_names: tuple[str, ...] = tuple(note["class_names"])
        self.mean: RGB = tuple(note["mean"])
        self.std: RGB = tuple(note["std"])
        self.note = note
        self.graphdef, *states = nnx.split(network, nnx.Param, nnx.BatchStat)
        self.params, self.stats = states

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Classifier":
        """Reads a checkpoint, or a packed file; `shiftnet.load` calls this."""
        if Path(path).is_file():
            network, note = packing.read(path)
            return cls(Path(path).absolute(), note, network)
        return cls.of(checkpoint.read(path))

    @classmethod
    def of(cls, saved: checkpoint.Saved) -> "Classifier":
        """The network that a checkpoint was read from."""
        recipe = shiftnet.config.from_json(saved.note["config"])
        classes = len(saved.note["class_names"])
        network = nnx.eval_shape(lambda: models.build(recipe.model, classes, rngs=nnx.Rngs(0)))
        graphdef, *states = nnx.split(network, nnx.Param, nnx.BatchStat)
        filled = [checkpoint.from_arrays(state, saved.arrays, saved.path) for state in states]
        return cls(saved.path, saved.note, nnx.merge(graphdef, *filled))

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
            return nnx.merge(*self._fixed)(x)
        return self._compiled(x)

    @functools.cached_property
    def _fixed(self) -> tuple[nnx.GraphDef[nnx.Module], nnx.State]:
        """The network without latents."""
        with jax.ensure_compile_time_eval():  # the first call may be traced
            network = self.network
            fix_weights(network)
            return nnx.split(network)

    @functools.cached_property
    def _compiled(self) -> Callable[[jax.Array], jax.Array]:
        """What is compiled for each shape and dtype.

        Where the network's arrays are few they are constants: XLA folds, once, what depends on them
        alone. One image on 2 cores took ShiftResNet20 e=9 2.9 ms before and takes 1.7 ms, 1-bit
        WRN-20-10 77 and 52 ms, 3-bit ResNet-18 of 224x224 47 and 25 ms.
        """
        graphdef, state = self._fixed

        def logits(state: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(x)

        options = compiler_options(jax.default_backend())
        if sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > CONSTANT_BYTES:
            return functools.partial(jax.jit(logits, compiler_options=options), state)
        return jax.jit(functools.partial(logits, state), compiler_options=options)

    def predict(self, images: np.ndarray, *, batch_size: int = 500) -> Predictions:
        """Classes of images, uint8 `[N, H, W, 3]`.

        Args:
          images: as stored, not normalised.
          batch_size: images a step.

        Raises:
          ValueError: for another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
        rows = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(images), batch_size):
            batch = augment.normalize(
                jnp.asarray(images[start : start + batch_size]), self.mean, self.std
            )
            rows.append(np.asarray(jax.nn.softmax(self(batch))))
        probabilities = np.concatenate(rows)
        classes = probabilities.argmax(-1).astype(np.int32)
        return Predictions(classes, [self.class_names[c] for c in classes], probabilities)
