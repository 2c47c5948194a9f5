"""The trained network that `shiftnet.load` returns."""

import dataclasses
import functools
import itertools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shiftnet.config
from shiftnet import checkpoint, models, packing, tensor_file
from shiftnet.config import Config
from shiftnet.data import RGB, augment, described
from shiftnet.errors import UserError
from shiftnet.files import path_of
from shiftnet.inference.preprocessing import ImageLike, Preprocessing, each, stacked
from shiftnet.kernels.implementations import compiler_options
from shiftnet.layers.folding import Packed, fix_weights, pack_weights
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
      class_names: of all classes, by class number.
    """

    classes: np.ndarray
    names: list[str]
    probabilities: np.ndarray
    class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Returns each image's `k` most probable classes, `(name, probability)`, the first first.

        Classes that are equally probable keep their order.

        Raises:
          ValueError: for a `k` below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        order = np.argsort(-self.probabilities, axis=-1, kind="stable")[:, :k]
        return [
            [(self.class_names[label], float(row[label])) for label in labels]
            for row, labels in zip(self.probabilities, order, strict=True)
        ]


class Classifier:
    """A trained network. Its first call fixes the numbers that all calls compute with.

    It can be pickled, without its compiled programs, and called by several threads.

    Attributes:
      config: the recipe it was trained by.
      class_names: by class number.
      mean: per channel, for pixels in [0, 1]; `predict` subtracts it and divides by `std`.
      std: likewise.
      preprocess: from people's images to `__call__`'s input, `preprocess(images)`; a tuple of the
        numbers that it was trained with, see `Preprocessing`.
      path: the checkpoint or file that it was read from.
      metadata: the checkpoint's: among others the recipe, the step and the accuracies.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], network: nnx.Module):
        self.path = path
        self.config: Config = shiftnet.config.from_json(metadata["config"])
        self.class_names: tuple[str, ...] = tuple(metadata["class_names"])
        self.mean: RGB = tuple(metadata["mean"])
        self.std: RGB = tuple(metadata["std"])
        self.preprocess = Preprocessing.of(self.config, self.mean, self.std)
        self.metadata = metadata
        fold_shifts(network)
        self.graphdef, *states = nnx.split(network, nnx.Param, nnx.BatchStat)
        self.params, self.stats = states
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        compiled = ("_lock", "_inputs", "_fixed", "_logits", "_probabilities", "_features")
        return {name: value for name, value in vars(self).items() if name not in compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()  # held while something is compiled
        self._inputs: set[Any] = set()  # the functions, shapes and dtypes that have a program
        self._features: dict[str | None, Callable[[jax.Array], jax.Array]] = {}  # by layer

    def __repr__(self) -> str:
        model = self.config.model
        bits = f"{model.weight_bits}-bit " if model.weight_bits else ""
        return (
            f"Classifier({model.arch} with {bits}{model.weights} weights, "
            f"{len(self.class_names)} classes of {described(self.config.data)}, "
            f"{self.preprocess.size}x{self.preprocess.size} images, from {self.path})"
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Classifier":
        """Reads a checkpoint, a packed file or a folder in the hub's layout."""
        path = path_of(path, "the checkpoint")
        in_hub_layout = path / tensor_file.HUB_NAME
        file = in_hub_layout if in_hub_layout.is_file() else path
        if (
            file.suffix == tensor_file.SUFFIX
            and file.is_file()
            and tensor_file.kind_of(file) != checkpoint.FILE_FORMAT
        ):
            network, metadata = packing.read(file)
            return cls(file.absolute(), metadata, network)
        return cls.of(checkpoint.read(file))

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
        x = _normalized(x)
        if isinstance(x, jax.core.Tracer):  # JAX takes no options of a program within another
            with self._lock:
                fixed = self._fixed
            return nnx.merge(*fixed)(x)
        return self._run("_logits", x)

    def _run(self, function: str, x: jax.Array | np.ndarray) -> jax.Array:
        """Calls a compiled function; one thread compiles, and others that need it wait."""
        inputs = function, x.shape, x.dtype
        if inputs in self._inputs:
            return getattr(self, function)(x)
        with self._lock:
            result = getattr(self, function)(x)
            self._inputs.add(inputs)
        return result

    @functools.cached_property
    def _fixed(self) -> tuple[nnx.GraphDef[nnx.Module], nnx.State]:
        """The network without latents; the first use needs the lock."""
        with jax.ensure_compile_time_eval():  # the first call may be traced
            network = self.network
            fix_weights(network)
            pack_weights(network)
            return nnx.split(network)

    @functools.cached_property
    def _logits(self) -> Callable[[Any], jax.Array]:
        def logits(network: Any, x: jax.Array) -> jax.Array:
            return network(x)

        return self._compile(logits)

    @functools.cached_property
    def _probabilities(self) -> Callable[[Any], jax.Array]:
        """From uint8 to probabilities in one program: JAX takes longer to start each of ten small
        ones than this takes for one image."""

        def probabilities(network: Any, pixels: jax.Array) -> jax.Array:
            return jax.nn.softmax(network(augment.normalize(pixels, self.mean, self.std)))

        return self._compile(probabilities)

    def _compile(
        self, function: Callable[[nnx.Module, jax.Array], jax.Array]
    ) -> Callable[[Any], jax.Array]:
        """Returns a function of the network that is compiled for each shape and dtype.

        The first use needs the lock. The arrays of a small network are constants: XLA computes what
        depends on them alone once. One image on 2 cores took ShiftResNet20 e=9 2.9 ms before and
        takes 1.7 ms, 1-bit WRN-20-10 77 and 52 ms, 3-bit ResNet-18 of 224x224 47 and 25 ms.
        """
        graphdef, state = self._fixed

        @functools.wraps(function)
        def run(state: nnx.State, x: jax.Array) -> jax.Array:
            return function(nnx.merge(graphdef, state), x)

        options = compiler_options(jax.default_backend())
        weights = jax.tree.leaves(nnx.filter_state(state, nnx.Not(Packed)))
        if sum(leaf.nbytes for leaf in weights) > CONSTANT_BYTES:
            return functools.partial(jax.jit(run, compiler_options=options), state)
        return jax.jit(functools.partial(run, state), compiler_options=options)

    def predict(
        self,
        images: np.ndarray | ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 500,
    ) -> Predictions:
        """Classifies images.

        Compiles one program per image size for each power of two below `batch_size`, and for
        `batch_size` itself: the last batch is filled up with black images, which no other image's
        result depends on.

        Args:
          images: one or more paths, images of Pillow's or arrays (uint8 `[H, W, 3]` or `[H, W]`),
            which are resized and cut as `preprocess` says; or a uint8 array `[N, H, W, 3]` of
            images in the network's size, which are taken as they are.
          batch_size: images per call of the network.

        Raises:
          CorruptImage: for a file that cannot be read (`shiftnet.data.images`); a `ValueError`.
          ValueError: for an array of another shape or dtype, or a `batch_size` below 1.
          TypeError: for what is no image.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows = [np.zeros((0, len(self.class_names)), np.float32)]
        for batch in self._batches(images, batch_size):
            count = len(batch)
            size = min(1 << (count - 1).bit_length(), batch_size)
            if size > count:
                batch = np.pad(batch, [(0, size - count), (0, 0), (0, 0), (0, 0)])
            rows.append(np.asarray(self._run("_probabilities", batch))[:count])
        probabilities = np.concatenate(rows)
        classes = probabilities.argmax(-1).astype(np.int32)
        names = [self.class_names[label] for label in classes]
        return Predictions(classes, names, probabilities, self.class_names)

    def _batches(self, images: Any, batch_size: int) -> Iterator[np.ndarray]:
        """Yields uint8 `[at most batch_size, H, W, 3]`; files are read when their turn comes."""
        if (array := stacked(images)) is not None:
            for start in range(0, len(array), batch_size):
                yield array[start : start + batch_size]
            return
        left = iter(each(images))
        while some := list(itertools.islice(left, batch_size)):
            yield self.preprocess.stack(some)

    def features(self, x: jax.Array | np.ndarray, layer: str | None = None) -> jax.Array:
        """Returns what a layer computes, for example as the input of another classifier.

        Compiles one program per layer, shape and dtype.

        Args:
          x: normalized images `[N, H, W, 3]`, as in calling and as `preprocess` makes them.
          layer: the path of a module in the network, such as `"layer3.2"`, whose output is
            returned; None: what goes into the last layer, `[N, features]`.

        Raises:
          ValueError: for images as in calling.
          UserError: for a layer that there is not, or that is computed as a part of another one;
            the message lists those that there are. Also a `ValueError`.
        """
        x = _normalized(x)
        with self._lock:
            if layer not in self._features:
                self._features[layer] = self._recorder(layer)
            compute = self._features[layer]
        return compute(jnp.asarray(x))

    def _recorder(self, layer: str | None) -> Callable[[jax.Array], jax.Array]:
        graphdef, state = self._fixed

        def run(state: nnx.State, x: jax.Array, wanted: str | None) -> dict[str, jax.Array]:
            network: Any = nnx.merge(graphdef, state)
            found: dict[str, jax.Array] = {}
            for path, module in list(nnx.iter_modules(network)):
                name = ".".join(map(str, path))
                if name and callable(module) and wanted in (None, name):
                    _record(module, name, found, inputs=wanted == last and layer is None)
            network.set_mode(train=False)
            network.logits(x.astype(network.dtype or x.dtype), train=False)
            return found

        last = nnx.merge(graphdef, state).first_and_last[1]  # type: ignore[attr-defined]
        shape = jax.ShapeDtypeStruct((1, self.preprocess.size, self.preprocess.size, 3), "float32")
        known = jax.eval_shape(functools.partial(run, wanted=None), state, shape)
        if layer is not None and layer not in known:
            names = ", ".join(known)
            raise UserError(f"no layer {layer!r} is computed on its own; there are {names}")
        if layer is None and not last:
            raise UserError(
                f"which layer is the last one is not known of a network of your own; name one of "
                f"{', '.join(known)}"
            )
        at = last if layer is None else layer
        options = compiler_options(jax.default_backend())
        program = jax.jit(lambda state, x: run(state, x, at)[at], compiler_options=options)
        return functools.partial(program, state)


def _normalized(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns an array as it is, and what else JAX takes for one as an array of its own.

    Raises:
      ValueError: if it is not floating `[N, H, W, 3]`.
    """
    if not isinstance(x, np.ndarray):
        x = jnp.asarray(x)
    if x.ndim != 4 or x.shape[-1] != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "expected normalised floating [N, H, W, 3] "
            f"(predict takes uint8), got {x.dtype} {x.shape}"
        )
    return x


def _record(
    module: nnx.Module, name: str, found: MutableMapping[str, jax.Array], *, inputs: bool
) -> None:
    """Lets a module write what it is called with, or returns, into `found` when it is called.

    It becomes an instance of a class of its own, so that it is still one of its former class.
    """
    former: Any = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = former.__call__(self, *args, **kwargs)
        if args and isinstance(result, jax.Array):  # weights are called with nothing
            found[name] = args[0] if inputs else result
        return result

    body = {"__call__": call}
    recording = types.new_class(
        former.__name__, (former,), exec_body=lambda space: space.update(body)
    )
    object.__setattr__(module, "__class__", recording)
