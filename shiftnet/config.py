"""The settings of a training run: their types, defaults, meaning, checks, command line and JSON.

Each setting is one line of a dataclass below: a type, a default, a text for `--help` and the rules
for its values. A recipe is a Python file with a function `get_config()` that starts from
`default_config()`, changes some fields and returns the result; every recipe has the same fields.
A command takes a recipe with `--config FILE`, or `--config FILE:ARGUMENT` for
`get_config(ARGUMENT)`, and changes single fields with `--config.FIELD=VALUE`:

    parser = Parser(prog="train.py")
    add_arguments(parser)
    config = from_arguments(parser.parse_args())

Fields are checked when they are set: an unknown name, a wrong type or a value out of range is a
`UserError`. `load` and `from_arguments` also refuse settings that would be ignored.
"""

import argparse
import dataclasses
import difflib
import fnmatch
import itertools
import json
import os
import re
import sys
import tomllib
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

from shiftnet.errors import UserError, unknown
from shiftnet.files import path_of


class Rule(NamedTuple):
    """A condition on a field's value; `words` completes the sentence "the field must be …"."""

    holds: Callable[[Any], bool]
    words: str


class Scope(NamedTuple):
    """The configurations in which a field has an effect; `words` completes "it applies to …"."""

    holds: Callable[["Config"], bool]
    words: str


AT_LEAST_0 = Rule(lambda value: value >= 0, "at least 0")
AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
ABOVE_0 = Rule(lambda value: value > 0, "above 0")
COUNT_OR_SHARE = Rule(
    lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
    "a whole number, or a share at least 0 and below 1",
)
SHARE = Rule(lambda value: 0 <= value <= 1, "from 0 to 1")
FRACTION = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
# Multiplying or dividing any number of channels by it gives a possible number of channels.
FACTOR = Rule(lambda value: 1e-6 <= value <= 1e6, "above 0, from 1e-6 to 1e6")
# Positions and areas in pixels are 32-bit integers on the device.
SIDE = Rule(lambda value: 0 <= value < 2**15, "at least 0 and below 2**15")
# jax.random.key silently drops the higher bits when 64-bit types are off.
SEED = Rule(lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
INCREASING = Rule(
    lambda value: all(before < after for before, after in itertools.pairwise((0, *value))),
    "increasing numbers, the first at least 1",
)
CHANNELS = Rule(lambda value: len(value) in (0, 3), "() or three numbers")
POSITIVE_CHANNELS = Rule(
    lambda value: len(value) in (0, 3) and all(number > 0 for number in value),
    "() or three numbers above 0",
)
SHA256 = Rule(
    lambda value: re.fullmatch("([0-9a-fA-F]{64})?", value) is not None,
    'empty ("") or 64 hexadecimal digits',
)
PARTS = Rule(
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    "two numbers above 0 and at most 1, the smaller first",
)
RATIOS = Rule(
    lambda value: len(value) == 2 and 1e-3 <= value[0] <= value[1] <= 1e3,
    "two numbers from 0.001 to 1000, the smaller first",
)
ARCH = Rule(
    lambda value: not re.search(r"\d{5}", value) or ".py:" in value,
    "a family and at most 4 digits of depth, or FILE.py:CLASS",
)
WORKERS = Rule(lambda value: value >= -1, "at least -1")
_FORM = r"[a-z0-9]+(/\d{1,3})?"
FORM = Rule(
    lambda value: re.fullmatch(f"({_FORM})?", value) is not None,
    "a form of weights and perhaps its bits, such as int/8",
)
FORMS_OF = Rule(
    lambda value: all(re.fullmatch(f"[^:]+:{_FORM}", entry) for entry in split_patterns(value)),
    "PATTERN:FORM or PATTERN:FORM/BITS with commas between them, such as "
    "'layer1.*:float,layer3.*:s3/2'",
)


def split_patterns(text: str) -> list[str]:
    """Returns the comma-separated entries of a setting."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def matches(path: str, pattern: str) -> bool:
    """Tells whether a dotted path is of a pattern: a glob over it or over a path above it.

    `"linear"` is that layer with its arrays, `"layer1.*"` all of that stage's.
    """
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def _reads_files(config: "Config") -> bool:
    data = config.data
    return data.source != "tfds" or data.name not in ("cifar10", "cifar100", "digits")


IMAGE_FILES = Scope(
    _reads_files, "image files, from data.source=folder or hf, or data.name=imagenet2012"
)
FOLDER = Scope(lambda config: config.data.source != "tfds", "data.source=folder or hf")
# Pixels on a side up to which image files are treated as a CIFAR's: read once, held in memory and
# cropped by `data.pad`. 80,000 images of this size are 1 GB, and the data sets of small images that
# are in use are not above it (CIFAR 32, Tiny ImageNet 64). ImageNet itself stays in its files.
SMALL = 64
# The size may be left to the network's family, which is not known here; then it counts as small.
IN_MEMORY = Scope(
    lambda config: (
        not _reads_files(config)
        or (
            (config.data.source != "tfds" or config.data.name != "imagenet2012")
            and config.data.size <= SMALL
        )
    ),
    f"images held in memory, which are cifar10's and others of at most {SMALL} pixels a side",
)
CIFAR = Scope(
    lambda config: config.data.source == "tfds" and config.data.name.startswith("cifar"),
    "data.name=cifar10 and cifar100",
)
AVERAGED = Scope(lambda config: config.ema.decay > 0, "ema.decay above 0")
DISTILLED = Scope(lambda config: bool(config.distill.teacher), "a distill.teacher")
HELD_OUT = Scope(lambda config: config.data.validation > 0, "data.validation above 0")
# A network of one's own is not given what its class would have to do.
OURS = Scope(lambda config: ".py:" not in config.model.arch, "this package's networks")
LOW_BIT = Scope(
    lambda config: config.model.weights != "float" and OURS.holds(config),
    "low-bit weights of this package's networks",
)
SPARSE = Scope(lambda config: config.model.shift == "sparse", "model.shift=sparse")
S3 = Scope(
    lambda config: (
        config.model.weights == "s3"
        or ":s3" in config.model.weights_of
        or config.model.weights_first_last.split("/")[0] == "s3"
    ),
    "model.weights=s3",
)


def schedules(*names: str) -> Scope:
    """Returns the scope of a field that only these schedules use."""
    return Scope(lambda config: config.schedule.name in names, _is_one_of("schedule.name", names))


def optimizers(*names: str) -> Scope:
    """Returns the scope of a field that only these optimizers use."""
    return Scope(lambda config: config.optimizer.name in names, _is_one_of("optimizer.name", names))


def _is_one_of(field: str, names: Sequence[str]) -> str:
    return f"{field}={' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"


def setting(default: Any, doc: str, rule: Rule | None = None, scope: Scope | None = None) -> Any:
    """Declares a field of the classes below.

    Args:
      default: the value in `default_config()`.
      doc: meaning, unit, and the source of the default; `--help` shows it.
      rule: the condition on its value, besides the type.
      scope: the configurations in which it has an effect; None for all.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "rule": rule, "scope": scope})


class UnknownField(UserError, AttributeError):
    """There is no such field; `hasattr` and `getattr` with a default catch it."""


class Settings(Mapping[str, Any]):
    """Base of the classes below: setting a field checks its name and value.

    Its fields can also be read and set by name, as a mapping's: `settings["lr"]`.
    """

    _prefix: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    def __init_subclass__(cls, group: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._prefix = group and f"{group}."

    def __setattr__(self, name: str, value: Any) -> None:
        path = f"{self._prefix}{name}"
        if path in FIELDS:
            value = FIELDS[path].check(value)
        elif path not in GROUPS:
            raise UnknownField(str(_unknown("field", path, FIELDS)))
        elif not isinstance(value, GROUPS[path]):
            inside = ", ".join(field for field in FIELDS if field.startswith(f"{path}."))
            raise UserError(f"{path} must hold {inside}, found {_text(value)}")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for many, to copy and to pickle
            raise AttributeError(name)
        raise UnknownField(str(_unknown("field", f"{self._prefix}{name}", FIELDS)))

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    def update(self, *values: Any, **more: Any) -> None:
        """Sets several fields, given as for `dict.update`."""
        for name, value in dict(*values, **more).items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary, groups as dictionaries in it."""
        return dataclasses.asdict(self)


# The defaults are the CIFAR recipe of the code published with arXiv:1711.08141 ("original").


@dataclasses.dataclass
class ModelConfig(Settings, group="model"):
    """The network."""

    arch: str = setting(
        "shiftresnet20",
        "architecture: a family and its depth, 6n+2, or FILE.py:CLASS of your own",
        ARCH,
    )
    expansion: float = setting(
        1.0,
        "middle channels of a shift block, as a multiple of its output channels",
        FACTOR,
        scope=OURS,
    )
    reduction: float = setting(
        1.0,
        "divides the channels of a resnet, depthwiseresnet, mobileresnet or shuffleresnet, see "
        "reduction_mode",
        FACTOR,
        scope=OURS,
    )
    reduction_mode: Literal["block", "net"] = setting(
        "net",
        "block: divides the middle channels of each block by the reduction; net: divides all "
        "channels by its square root",
        scope=OURS,
    )
    depthwise_skip: bool = setting(
        True, "shortcuts around the blocks of a depthwiseresnet; false: none", scope=OURS
    )
    width: float = setting(
        1.0,
        "widens a wrn: its stages have 16, 32 and 64 times as many channels",
        FACTOR,
        scope=OURS,
    )
    weights: str = setting(
        "float",
        "form of all weights except the first and last layer's: float, sign, s3, denseshift, "
        "ternary, apot, pot or int",
    )
    weight_bits: int = setting(
        0,
        "bits per weight, 2, 3 or 4 for s3, denseshift and apot, 2 to 5 for pot, 2 to 8 for int; "
        "0: the form's default, which is 3, 3, 4, 5 and 8",
        AT_LEAST_0,
    )
    weights_of: str = setting(
        "",
        "forms of single layers by path, such as 'layer1.*:float,layer3.*:s3/2'; the last pattern "
        "that matches a layer counts",
        FORMS_OF,
    )
    weights_first_last: str = setting(
        "",
        "form of the first and last layer's weights, such as int/8; empty: float, or that of the "
        "others with quantize_first_last",
        FORM,
    )
    quantize_first_last: bool = setting(
        False,
        "give the first and last layer low-bit weights too (originals: no)",
        scope=LOW_BIT,
    )
    activations: str = setting(
        "float",
        "form of the inputs of all convolutions but the first and last layer: float; int8, int4 or "
        "int2, with a learned step (LSQ); sign; rsign, with learned thresholds and RPReLU "
        "(ReActNet)",
        scope=OURS,
    )
    shift: Literal["fixed", "active", "sparse"] = setting(
        "fixed",
        "offsets of the shifts: fixed (original); learned: active, real numbers, bilinear "
        "(arXiv:1806.07370); sparse, rounded and few (arXiv:1903.05285)",
        scope=OURS,
    )
    drop_path: float = setting(
        0.0,
        "probability that the last residual branch is left out for a training image; it falls "
        "towards the first one (arXiv:1603.09382)",
        FRACTION,
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the computation; parameters and batch statistics stay float32"
    )


@dataclasses.dataclass
class DataConfig(Settings, group="data"):
    """The data set and its augmentation."""

    name: str = setting(
        "cifar100",
        "data set: cifar10, cifar100, digits, imagenet2012, or another that `tfds build` prepared "
        "in data.dir as array_record",
    )
    source: Literal["tfds", "folder", "hf"] = setting(
        "tfds",
        "tfds: the data set of that name; folder: the image files in train/<class>/ and "
        "val/<class>/ of data.dir, or in <class>/ of it, of which a tenth is held out as test set; "
        "hf: the Hugging Face data set data.name, or what save_to_disk wrote into data.dir",
    )
    dir: str = setting(
        "",
        "folder of prepared data sets, or of image files; empty: $TFDS_DATA_DIR or "
        "~/tensorflow_datasets",
        scope=Scope(
            lambda config: config.data.name != "digits" or config.data.source != "tfds",
            "data that is read from a folder, which the digits are not",
        ),
    )
    url: str = setting(
        "", "where to download the data set from; empty: its official address", scope=CIFAR
    )
    sha256: str = setting(
        "", "SHA-256 of the download; empty: the official one", SHA256, scope=CIFAR
    )
    validation: float = setting(
        0.0,
        "training images held out to choose the best checkpoint, a number such as 5000 or a share "
        "such as 0.1; 0: the test set chooses it (original)",
        COUNT_OR_SHARE,
    )
    mean: tuple[float, ...] = setting(
        (),
        "mean per channel (RGB) of pixels in [0, 1]; (): the data set's own, for image files "
        "CIFAR's up to 64 pixels a side, and ImageNet's above",
        CHANNELS,
    )
    std: tuple[float, ...] = setting(
        (),
        "standard deviation per channel of pixels in [0, 1]; (): the data set's own",
        POSITIVE_CHANNELS,
    )
    pad: int = setting(
        4,
        "pixels added on every side before the random crop; 0: no crop (original: 4)",
        SIDE,
        scope=IN_MEMORY,
    )
    pad_mode: Literal["zero", "reflect"] = setting(
        "zero", "content of the added pixels (original: zero)", scope=IN_MEMORY
    )
    cutout: int = setting(
        0,
        "side in pixels of a square of random pixels placed over each training image, possibly "
        "beyond its border; 0: none (arXiv:1802.08530's code: 18)",
        SIDE,
    )
    size: int = setting(
        0,
        "side in pixels of the images that image files are made into; 0: what the network was made "
        "for, 32 or 224. A folder's images of at most 64 are resized once, held in memory and "
        "cropped by data.pad; larger ones are cropped at random in size and place",
        SIDE,
        scope=IMAGE_FILES,
    )
    resize: int = setting(
        0,
        "shorter side in pixels that image files are resized to before the center crop; 0: 8/7 of "
        "data.size, so 256 for 224 (S3's code), and data.size up to 64",
        SIDE,
        scope=IMAGE_FILES,
    )
    crop_scale: tuple[float, ...] = setting(
        (0.08, 1.0),
        "smallest and largest part of an image file's area that a training crop has (S3's code)",
        PARTS,
        scope=IMAGE_FILES,
    )
    crop_ratio: tuple[float, ...] = setting(
        (3 / 4, 4 / 3),
        "smallest and largest ratio of a training crop's width to its height (S3's code)",
        RATIOS,
        scope=IMAGE_FILES,
    )
    workers: int = setting(
        -1,
        "processes that decode image files; 0: decode in the main process; -1: one per core",
        WORKERS,
        scope=IMAGE_FILES,
    )
    on_corrupt: Literal["error", "skip"] = setting(
        "error",
        "what to do with an image file that cannot be decoded: stop, or skip and count it",
        scope=IMAGE_FILES,
    )
    exif: bool = setting(
        True,
        "rotate the images of a folder or of hf by their EXIF orientation; a folder's of "
        "imagenet2012 never are, as in its published results",
        scope=FOLDER,
    )
    balance: bool = setting(
        False, "take images of every class equally often, those of small classes repeatedly"
    )
    flip: bool = setting(True, "mirror half of the training images, at random (original)")
    flip_by: Literal["chance", "turns"] = setting(
        "chance",
        "chance: draw in every epoch which images are mirrored (original); turns: each image is in "
        "every second epoch, half of them in the first (arXiv:2404.00498)",
        scope=Scope(lambda config: config.data.flip, "data.flip=true"),
    )
    policy: Literal["none", "trivial", "rand"] = setting(
        "none",
        "random operations on every training image: trivial: TrivialAugment (arXiv:2103.10158); "
        "rand: RandAugment (arXiv:1909.13719), two of strength 9",
    )
    mixup: float = setting(
        0.0,
        "alpha of mixup (arXiv:1710.09412); 0: none; with cutmix too, batches alternate at random",
        AT_LEAST_0,
    )
    cutmix: float = setting(0.0, "alpha of CutMix (arXiv:1905.04899); 0: none", AT_LEAST_0)
    erase: float = setting(
        0.0, "probability that a rectangle of an image is erased (arXiv:1708.04896)", SHARE
    )


@dataclasses.dataclass
class LossConfig(Settings, group="loss"):
    """The training loss."""

    label_smoothing: float = setting(
        0.0,
        "share of every target that is spread evenly over all classes (arXiv:1512.00567); 0: none",
        FRACTION,
    )
    class_weights: Literal["none", "balanced"] = setting(
        "none",
        "balanced: every image counts in inverse proportion to the number of training images of "
        "its class; data.balance draws classes equally often instead",
    )


@dataclasses.dataclass
class DistillConfig(Settings, group="distill"):
    """Distillation: learning from the logits of a trained network."""

    teacher: str = setting(
        "",
        "checkpoint, packed file or name of the network to learn from; it sees the same augmented "
        "images in the same step, and must know all classes by name; empty: none",
    )
    temperature: float = setting(
        4.0,
        "what both networks' logits are divided by (arXiv:1503.02531; arXiv:1910.10699's code: 4)",
        ABOVE_0,
        scope=DISTILLED,
    )
    weight: float = setting(
        0.9,
        "share of the loss that is the divergence from the teacher, times temperature²; the rest "
        "is the cross entropy of the labels (arXiv:1910.10699's code: 0.9)",
        SHARE,
        scope=DISTILLED,
    )
    standardize: bool = setting(
        False,
        "shift and scale each image's logits to mean 0 and deviation 1 before that "
        "(arXiv:2403.01427, with a temperature of 2)",
        scope=DISTILLED,
    )


@dataclasses.dataclass
class EmaConfig(Settings, group="ema"):
    """Averaging the network over the steps."""

    decay: float = setting(
        0.0,
        "decay per update of an exponential moving average of parameters and batch statistics, "
        "such as 0.999; the averaged network is what is evaluated, chosen and kept; 0: none",
        FRACTION,
    )
    estimate: int = setting(
        0,
        "batches of training images on which the averaged network's batch statistics are estimated "
        "anew before it is evaluated; 0: they are averaged as parameters are",
        AT_LEAST_0,
        scope=AVERAGED,
    )


@dataclasses.dataclass
class OptimizerConfig(Settings, group="optimizer"):
    """The optimizer."""

    name: Literal["sgd", "adamw", "lamb", "lion", "muon"] = setting(
        "sgd",
        "sgd (original), adamw, lamb or lion; muon: orthogonalized momentum for the kernels "
        "between the first and last layer, sgd for the other arrays",
    )
    lr: float = setting(0.1, "initial learning rate (original)", ABOVE_0)
    muon_lr: float = setting(
        0.1,
        "learning rate of the kernels that muon takes; it follows the schedule too",
        ABOVE_0,
        scope=optimizers("muon"),
    )
    muon_weight_decay: float = setting(
        0.0,
        "weight decay of the kernels that muon takes, decoupled and so times their rate; "
        "0: weight_decay, which hardly changes them",
        AT_LEAST_0,
        scope=optimizers("muon"),
    )
    momentum: float = setting(
        0.9,
        "momentum coefficient, in [0, 1); the first coefficient of adamw, lamb and lion (original)",
        FRACTION,
    )
    nesterov: bool = setting(False, "Nesterov momentum for sgd", scope=optimizers("sgd", "muon"))
    beta2: float = setting(
        0.999,
        "second coefficient of adamw, lamb (the papers' 0.999) and lion (its paper: 0.99)",
        FRACTION,
        scope=optimizers("adamw", "lamb", "lion"),
    )
    eps: float = setting(
        1e-8,
        "added to the denominator of adamw and lamb (PyTorch's)",
        ABOVE_0,
        scope=optimizers("adamw", "lamb"),
    )
    weight_decay: float = setting(
        5e-4,
        "L2 penalty on every parameter, batch norms and biases included (original)",
        AT_LEAST_0,
    )
    decay: Literal["all", "kernels"] = setting(
        "all",
        "parameters that decay: all (original); kernels: all but biases and batch norms",
    )
    clip_norm: float = setting(
        0.0,
        "largest norm of all gradients together, to which larger ones are scaled; 0: no limit",
        AT_LEAST_0,
    )
    accumulate: int = setting(
        1,
        "batches whose gradients are averaged for one update; batch norm's statistics are still "
        "those of each batch, and batches at the end of the run that are fewer update nothing",
        AT_LEAST_1,
    )
    groups: str = setting(
        "", "multipliers of the learning rate by path, such as 'layer1.*:0.1,linear:10'"
    )
    freeze: str = setting(
        "",
        "paths that are not trained, such as 'conv1,bn1,layer1.*'; their batch norms keep their "
        "running statistics",
    )
    regularizer: float = setting(
        1e-5,
        "coefficient of the weight form's own regularizer, which is in the gradient and not in "
        "the logged loss (S3's code)",
        AT_LEAST_0,
        scope=S3,
    )
    shift_penalty: float = setting(
        1e-4,
        "coefficient of the sum of the shifts' offsets, without sign, which is in the gradient and "
        "not in the logged loss",
        AT_LEAST_0,
        scope=SPARSE,
    )
    shift_share: float = setting(
        0.5,
        "share of the run after which the shifts' offsets no longer change",
        SHARE,
        scope=SPARSE,
    )


@dataclasses.dataclass
class ScheduleConfig(Settings, group="schedule"):
    """The learning rate over the run."""

    name: Literal["step", "cosine", "sgdr", "linear", "onecycle", "wsd"] = setting(
        "step",
        "step: multiplied by schedule.factor at each boundary; cosine, linear: falls to "
        "schedule.lr_min at the end; sgdr: a cosine that restarts at each boundary; onecycle: "
        "rises and falls once; wsd: constant, then linear over schedule.decay of the run",
    )
    by: Literal["epoch", "step"] = setting(
        "epoch", "change the rate with every epoch (originals) or with every step"
    )
    warmup: float = setting(
        0.0,
        "epochs in which the rate rises linearly from 0; for onecycle 0 means 0.3 of the run",
        AT_LEAST_0,
    )
    boundaries: tuple[int, ...] = setting(
        (82, 123),
        "epochs, counted from 0, at which step and sgdr change the rate (original)",
        INCREASING,
        scope=schedules("step", "sgdr"),
    )
    factor: float = setting(
        0.1,
        "what step multiplies the rate by at each boundary (original)",
        ABOVE_0,
        scope=schedules("step"),
    )
    lr_min: float = setting(
        0.0,
        "rate that cosine, sgdr, linear and wsd fall to",
        AT_LEAST_0,
        scope=schedules("cosine", "sgdr", "linear", "wsd"),
    )
    decay: float = setting(
        0.2,
        "share of the run, at its end, in which wsd's rate falls",
        FRACTION,
        scope=schedules("wsd"),
    )


@dataclasses.dataclass
class EvalConfig(Settings, group="eval"):
    """Evaluation during training."""

    batch_size: int = setting(500, "images per step of evaluation, over all devices", AT_LEAST_1)
    every_epochs: int = setting(1, "epochs between two evaluations", AT_LEAST_1)


@dataclasses.dataclass
class CheckpointConfig(Settings, group="checkpoint"):
    """Checkpoints."""

    every_epochs: int = setting(1, "epochs between two checkpoints", AT_LEAST_1)
    every_steps: int = setting(
        0, "steps between two further checkpoints; 0: none within an epoch", AT_LEAST_0
    )
    keep: int = setting(2, "checkpoints to keep, in case the newest is damaged", AT_LEAST_1)


@dataclasses.dataclass
class ParallelConfig(Settings, group="parallel"):
    """Training on several devices."""

    batch_norm: Literal["global", "per_device"] = setting(
        "global",
        "batch statistics: global, of the whole batch; per_device, of each device's part, keeping "
        "the first device's running averages (the originals' DataParallel)",
    )
    fsdp: bool = setting(
        False,
        "shard large parameters and the optimizer state over the devices instead of copying them "
        "to each",
    )


@dataclasses.dataclass
class LogConfig(Settings, group="log"):
    """Logging."""

    every_seconds: float = setting(10.0, "seconds between two lines of progress", AT_LEAST_0)
    tensorboard: bool = setting(True, "write TensorBoard events beside metrics.jsonl")
    every_steps: int = setting(
        0,
        "steps between two lines of steps.jsonl, with a step's loss, accuracy and learning rate; "
        "0: none",
        AT_LEAST_0,
    )
    tracker: Literal["none", "wandb", "trackio"] = setting(
        "none", "where else to send the numbers: Weights & Biases, or trackio"
    )
    project: str = setting(
        "shiftnet",
        "the project that the tracker files the run under",
        scope=Scope(lambda config: config.log.tracker != "none", "a log.tracker"),
    )


@dataclasses.dataclass
class Config(Settings):
    """All settings of a run."""

    seed: int = setting(
        0, "seed of the initial weights, the order of the images and the augmentation", SEED
    )
    epochs: int = setting(164, "passes over the training images (original)", AT_LEAST_1)
    patience: int = setting(
        0,
        "epochs without a higher validation accuracy after which the run ends; 0: it does not",
        AT_LEAST_0,
        scope=HELD_OUT,
    )
    batch_size: int = setting(
        128,
        "images per step, over all devices; an incomplete last batch is dropped (original: 128)",
        AT_LEAST_1,
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


@dataclasses.dataclass(frozen=True)
class Field:
    """What a class above declares for one setting.

    Attributes:
      path: its dotted name, such as `"optimizer.lr"`.
      default: its value in `default_config()`.
      kind: its type: bool, int, float, str or tuple.
      item: the type of a tuple's members.
      choices: all its values, where they can be listed.
      doc, rule, scope: see `setting`.
    """

    path: str
    default: Any
    kind: type
    item: type
    choices: tuple[str, ...]
    doc: str
    rule: Rule | None
    scope: Scope | None

    @classmethod
    def of(cls, path: str, declared: dataclasses.Field) -> "Field":
        origin, arguments = typing.get_origin(declared.type), typing.get_args(declared.type)
        choices = arguments if origin is Literal else ()
        item = arguments[0] if origin is tuple else float
        default = declared.default
        return cls(path, default, type(default), item, choices, **declared.metadata)

    def check(self, value: Any) -> Any:
        """Returns the value in the field's own type: 0 as 0.0, a list as a tuple.

        Raises:
          UserError: if it has another type or is not a value that the field can take.
        """
        if self.kind is tuple and isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        if not _is_a(value, self.kind, self.item):
            raise UserError(f"{self.path} must be {self.expected}, found {_text(value)}")
        if self.choices and value not in self.choices:
            raise unknown(self.path, value, self.choices)
        if self.rule and not self.rule.holds(value):
            raise UserError(f"{self.path} must be {self.rule.words}, found {_text(value)}")
        return tuple(map(self.item, value)) if self.kind is tuple else self.kind(value)

    def parse(self, text: str) -> Any:
        """Returns the value that a text stands for, as `override` describes; not checked."""
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if self.kind is tuple:
                inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
                parts = inner.split(",")
                if not parts[-1].strip():  # (), and the comma of (5,)
                    parts.pop()
                return tuple(self.item(part) for part in parts)
            return self.kind(text)
        except (KeyError, ValueError):
            raise UserError(f"{self.path} must be {self.expected}, found {text!r}") from None

    def applies(self, config: Config) -> bool:
        """Returns whether the field has an effect in a configuration."""
        return self.scope is None or self.scope.holds(config)

    @property
    def expected(self) -> str:
        """The field's type in the words of a sentence."""
        if self.kind is tuple:
            return f"a tuple of {'whole ' if self.item is int else ''}numbers, such as (5, 8)"
        return {
            bool: "true or false",
            int: "a whole number below 2**63",
            float: "a finite number",
            str: "a text",
        }[self.kind]

    @property
    def metavar(self) -> str:
        """What `--help` calls its value."""
        names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", tuple: "A,B,..."}
        return "|".join(self.choices) or names[self.kind]


GROUPS: Mapping[str, type[Settings]] = {
    declared.name: declared.type
    for declared in dataclasses.fields(Config)
    if isinstance(declared.type, type) and issubclass(declared.type, Settings)
}
_CLASSES: Sequence[type[Settings]] = (Config, *GROUPS.values())
FIELDS: Mapping[str, Field] = {
    path: Field.of(path, declared)
    for kind in _CLASSES
    for declared in kind.__dataclass_fields__.values()
    if (path := f"{kind._prefix}{declared.name}") not in GROUPS
}

# Fields that a result does not depend on: how a run is watched, where its data lie, how they are
# read.
IMMATERIAL = (
    "log.*",
    "eval.*",
    "checkpoint.*",
    "parallel.fsdp",
    "data.dir",
    "data.workers",
    "data.on_corrupt",
)
# Fields that may change when a run is resumed. Any other would make it another experiment. (The
# teacher may have moved; that it is the same one is told by its arrays.)
RESUMABLE = ("epochs", "distill.teacher", *IMMATERIAL)
# The fields that `--help` shows first.
MOST_USED = (
    *("epochs", "batch_size", "seed", "model.arch", "model.weights", "model.dtype", "data.name"),
    *("data.source", "data.dir", "optimizer.lr"),
)
# In a folder of recipes, the names that stand for a file of it with arguments.
NAMES = "names.toml"
# The recipes that come with the package; in a checkout also the folder `configs` at its top.
RECIPES = os.path.join(os.path.dirname(__file__), "configs")
# Recipes for any network on a CIFAR, which `recipe=NAME` in an argument takes in place of the
# family's own. short: a fifth of the original's epochs, by Muon; the rates, the smaller decay and
# the smaller crop were the best of those tried on ShiftResNet20 with expansion 1 and CIFAR-100; the
# wider ones decay more, see `SHORT_DECAY` in configs/shift_family.py.
# distilled: likewise, learning from the best network of the short recipe on the same data, with the
# temperature and weight of `DistillConfig`; a value by data set is a mapping.
# finetune: for low-bit weights that start from a float network; results/README.md has its search.
_SHORT = {
    "epochs": 30,
    "batch_size": 128,
    "data.pad": 2,
    "optimizer.name": "muon",
    "optimizer.muon_lr": 0.1,
    "optimizer.lr": 0.2,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 2e-4,
    "schedule.name": "linear",
    "schedule.by": "step",
    "schedule.warmup": 1.0,
}
CIFAR_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "short": _SHORT,
    "distilled": {
        **_SHORT,
        "distill.teacher": {
            "cifar10": "shiftresnet20_3c_c10_short",
            "cifar100": "shiftresnet20_6c_c100_short",
        },
    },
    "finetune": {
        "epochs": 6,
        "batch_size": 128,
        "data.pad": 2,
        "optimizer.name": "muon",
        "optimizer.muon_lr": 0.003,
        "optimizer.lr": 0.04,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 2e-4,
        "schedule.name": "linear",
        "schedule.by": "step",
        "ema.decay": 0.99,
        "ema.estimate": 50,
    },
}


def default_config() -> Config:
    """Returns a configuration with every field at its default."""
    return Config()


def validate(config: Config) -> None:
    """Checks what the fields' own checks cannot see: fields that must agree.

    The names of the architecture and of the data set are left to `shiftnet.models` and
    `shiftnet.data`, which know them.

    Raises:
      UserError: if one of `data.mean` and `data.std` is given without the other.
    """
    data = config.data
    if len(data.mean) != len(data.std):
        raise UserError(
            f"data.mean and data.std must be given together, found {data.mean} and {data.std}"
        )


def check_effects(config: Config, allowed: Collection[str] = ()) -> None:
    """Refuses settings of a new run that would be ignored, or fail when they are first used.

    Args:
      config: the configuration.
      allowed: fields that may have no effect.

    Raises:
      UserError: for the first field that differs from its default where it does not apply, for a
        `data.resize` below `data.size`, a `schedule.lr_min` above `optimizer.lr`, a warm-up that
        does nothing, and weights of classes where devices take means of their own or classes are
        balanced already.
    """
    for path, field in FIELDS.items():
        value, scope = _get(config, path), field.scope
        if scope and value != field.default and path not in allowed and not scope.holds(config):
            raise UserError(
                f"{path}={_written(value)} would be ignored: it applies to {scope.words}; "
                f"leave it at {_written(field.default)}"
            )
    data = config.data
    if data.size and 0 < data.resize < data.size:
        raise UserError(
            f"data.resize must be at least data.size, {data.size}, or 0; found {data.resize}"
        )
    schedule = config.schedule
    if 0 < schedule.warmup <= 1 and schedule.by == "epoch" and schedule.name != "onecycle":
        raise UserError(
            f"schedule.warmup={schedule.warmup:g} would be ignored: the rate changes by epoch, and "
            "the first one has the whole rate; give more than 1, or schedule.by=step"
        )
    if config.parallel.batch_norm == "per_device" and config.loss.class_weights != "none":
        raise UserError(
            "loss.class_weights=balanced takes the mean over the whole batch, found "
            "parallel.batch_norm=per_device, where each device has a mean of its own; "
            "data.balance=true works with both"
        )
    if config.data.balance and config.loss.class_weights != "none":
        raise UserError(
            "loss.class_weights=balanced and data.balance=true each let classes count the same; "
            "found both, by which rare classes would count more; give one of them"
        )
    top, lowest = config.optimizer.lr, config.schedule.lr_min
    if lowest > top:
        raise UserError(f"schedule.lr_min must be at most optimizer.lr, {top:g}; found {lowest:g}")


def differences(old: Config, new: Config, *, ignore: Sequence[str] = ()) -> list[str]:
    """Returns the fields that differ, each as `"optimizer.lr: 0.1 -> 0.05"`.

    Fields that apply to neither configuration do not count.

    Args:
      old: one configuration.
      new: the other.
      ignore: fields to pass over, as names or patterns such as `"log.*"`; see `IMMATERIAL`.
    """
    return [
        f"{path}: {_get(old, path)!r} -> {_get(new, path)!r}"
        for path, field in sorted(FIELDS.items())
        if _get(old, path) != _get(new, path)
        and not any(fnmatch.fnmatchcase(path, pattern) for pattern in ignore)
        and (field.applies(old) or field.applies(new))
    ]


def to_json(config: Config) -> str:
    """Returns the configuration as JSON, for a checkpoint to carry; `from_json` reads it."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> Config:
    """Returns the configuration that `to_json` wrote.

    Fields that did not exist yet when it was written have their defaults, and settings without an
    effect are accepted, so that what was saved once can always be loaded.

    Raises:
      UserError: if the text is not JSON, or not a valid configuration.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the configuration is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"the configuration must be a JSON object, found {_text(values)}")
    config = _from_mapping(values)
    validate(config)
    return config


def split_recipe(recipe: str) -> tuple[str, str]:
    """Splits `"FILE[:ARGUMENT]"` into file and argument; the file's name may have colons too."""
    ends = [match.start() for match in re.finditer(":", recipe)]
    for end in [*ends, len(recipe)]:
        if os.path.isfile(path_of(recipe[:end], "--config")):
            return recipe[:end], recipe[end + 1 :]
    match = re.match(r"(.*?\.py)(?::|$)", recipe, re.DOTALL)
    file = match[1] if match else recipe.partition(":")[0]
    return file, recipe[len(file) + 1 :]


def load(recipe: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Runs a recipe and returns its configuration, checked.

    A recipe is a file, or a name that `names.toml` in its folder lists: where there is no file
    `configs/NAME.py`, but the line `NAME = "FILE:ARGUMENT"`, that file is run with that argument.
    Anywhere else `NAME` or `configs/NAME.py` is the package's own recipe of that name.

    While the file runs, its folder is on `sys.path`, as for a script, so that it can import its
    neighbours whatever the current directory.

    Args:
      recipe: `"FILE"`, or `"FILE:ARGUMENT"` to call its `get_config` with that text.
      overrides: fields to change after that, as texts; see `override`.

    Raises:
      UserError: if there is no such file, if it raises, or if the configuration is not valid or
        has settings that would be ignored.
    """
    file, argument = split_recipe(recipe)
    path = os.fspath(path_of(file, "--config"))
    if not os.path.isfile(path):
        path, named = _named(path)
        argument = ",".join(filter(None, (named, argument)))
    try:
        config = _run(path, [argument] if argument else [])
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from error
    overrides = overrides or {}
    # A recipe's own settings may lose their effect by an override; those given here must have one.
    own = {name for name, field in FIELDS.items() if field.applies(config)} - overrides.keys()
    for name, text in overrides.items():
        override(config, name, text)
    try:
        validate(config)
        check_effects(config, allowed=own)
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from error
    return config


def apply_argument(
    config: Config,
    argument: str,
    fields: Mapping[str, str],
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> str | None:
    """Sets fields from a recipe's argument, `"expansion=3"` or `"reduction=2.8,dtype=bfloat16"`.

    Args:
      config: the configuration to change.
      argument: `name=value` pairs with commas between them; `""` changes nothing. A comma that no
        `name=` follows is part of the value. Of a name that is given twice, as where a row's own
        argument is followed by another, the last value counts.
      fields: the names that the recipe knows, with the field each stands for, for example
        `{"expansion": "model.expansion"}`.
      recipes: for a family on the CIFARs `CIFAR_RECIPES`, which `recipe=NAME` takes one of.

    Returns:
      The name of the recipe that was taken, if one was.

    Raises:
      UserError: if it is not of that form, or for an unknown name or a value of the wrong type.
    """
    chosen = None
    for pair in re.split(r",(?=\s*\w+\s*=|\s*$)", argument) if argument else ():
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"expected name=value after the colon, found {pair!r}")
        if name == "recipe" and recipes is not None:
            if text not in recipes:
                raise unknown("recipe", text, recipes)
            chosen = text
        elif name in fields:
            override(config, fields[name], text)
        else:
            raise unknown("argument", name, [*fields, *(["recipe"] if recipes else [])])
    if chosen is None or recipes is None:
        return None
    if not CIFAR.holds(config):
        raise UserError(f"recipe={chosen} is for {CIFAR.words}, found data.name={config.data.name}")
    config.optimizer, config.schedule = OptimizerConfig(), ScheduleConfig()
    for path, value in recipes[chosen].items():
        group, _, name = path.rpartition(".")
        value = value[config.data.name] if isinstance(value, Mapping) else value
        (config[group] if group else config)[name] = value
    return chosen


def override(config: Config, path: str, text: str) -> None:
    """Sets one field from text, by the field's own type.

    Args:
      config: the configuration to change.
      path: the field, for example `"schedule.boundaries"`.
      text: `3` or `0.05` for a number, `true` or `false`, `(5,8)` or `5,8` for a tuple.

    Raises:
      UserError: if there is no such field, or the text is not a value that it can take.
    """
    if path not in FIELDS:
        raise _unknown("field", path, FIELDS)
    group, _, name = path.rpartition(".")
    setattr(config[group] if group else config, name, FIELDS[path].parse(text))


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` for which a bad command line is a `UserError`, with the nearest option.

    Option names cannot be abbreviated.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            # Before Python 3.13, argparse takes `--option=--` for an option with no value.
            if word.startswith("-") and word.endswith("=--"):
                raise UserError(f"argument {word.removesuffix('=--')}: expected a value, found --")
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            option = rest[0].partition("=")[0]
            if not option.startswith("-"):
                raise UserError(f"unexpected argument {rest[0]!r}: it belongs to no option")
            # argparse has no public list of its options.
            raise _unknown("option", option, self._option_string_actions)
        return namespace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives a command `--config FILE[:ARGUMENT]` and `--config.FIELD VALUE` for every field."""
    sections = {
        "": parser.add_argument_group("recipe", "A file of settings, and the most used settings.")
    }
    for name, kind in GROUPS.items():
        sections[name] = parser.add_argument_group(f"{name} settings", kind.__doc__)
    sections[""].add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="the recipe, for example configs/shiftresnet20_c100.py:expansion=3; the options below "
        "change its settings",
    )
    for path in dict.fromkeys((*MOST_USED, *FIELDS)):
        field = FIELDS[path]
        sections["" if path in MOST_USED else path.rpartition(".")[0]].add_argument(
            f"--config.{path}",
            metavar=field.metavar,
            help=f"{field.doc} (default: {_written(field.default)})".replace("%", "%%"),
        )


def from_arguments(arguments: argparse.Namespace) -> Config:
    """Returns the configuration of the recipe on the command line, with its overrides; checked.

    Raises:
      UserError: as `load`, or if there is no `--config`.
    """
    given = vars(arguments)
    if given["config"] is None:
        raise UserError("--config is missing: name a recipe, such as configs/quickstart.py")
    overrides = {path: given[f"config.{path}"] for path in FIELDS}
    return load(
        given["config"], {path: text for path, text in overrides.items() if text is not None}
    )


def _get(config: Config, path: str) -> Any:
    group, _, name = path.rpartition(".")
    return (config[group] if group else config)[name]


def _from_mapping(values: Mapping[str, Any]) -> Config:
    """Returns the defaults with the given values, groups being mappings in it."""
    config = default_config()
    for name, value in values.items():
        if name in GROUPS and hasattr(value, "items"):  # ml_collections' are no Mappings
            config[name].update(value.items())
        else:
            config[name] = value
    return config


def _is_a(value: Any, kind: type, item: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(_is_a(member, item, item) for member in value)
    if isinstance(value, bool):  # Python takes it for an int
        return kind is bool
    if kind is float and isinstance(value, (int, float)):
        return abs(value) <= sys.float_info.max  # neither infinite, nor NaN, nor too large an int
    if kind is int and isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, kind)


def _written(value: Any) -> str:
    """A field's value as one would type it: true, not True."""
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _unknown(kind: str, found: str, known: Collection[str]) -> UserError:
    """`errors.unknown` for dotted names, whose last part counts as much as the whole.

    So `lr` finds `optimizer.lr`, and a group finds one of its fields.
    """

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def last(name: str) -> str:
        return name.lstrip("-").rpartition(".")[2]

    start = found[:200]  # comparing takes time, and no name is as long

    def likeness(name: str) -> float:
        inside = name.startswith(f"{found}.")
        return alike(start, name) + (1 if inside else alike(last(start), last(name)))

    nearest = max(known, key=likeness)
    hint = f"did you mean {nearest!r}?" if likeness(nearest) >= 0.9 else "--help lists them all"
    return UserError(f"unknown {kind} {found!r}; {hint}")


def _named(path: str) -> tuple[str, str]:
    """Returns the file and the argument that `names.toml` beside a recipe gives for its name.

    A name without a folder, or in a folder `configs` that is not there, is one of `RECIPES`.

    Raises:
      UserError: if that has no such name, with the nearest name or file of the folder.
    """
    folder, file = os.path.split(path)
    if folder in ("", "configs") and not os.path.isfile(os.path.join(folder, NAMES)):
        folder = RECIPES
        own = os.path.join(folder, f"{file.removesuffix('.py')}.py")
        if os.path.isfile(own):
            return own, ""
    index = os.path.join(folder, NAMES)
    names: dict[str, str] = {}
    if os.path.isfile(index):
        try:
            with open(index, "rb") as opened:
                names = tomllib.load(opened)
        except ValueError as error:
            raise UserError(f"{index} is damaged: {error}") from error
    found = names.get(file.removesuffix(".py"))
    if isinstance(found, str):
        return split_recipe(os.path.join(folder, found))
    try:
        files = {entry for entry in os.listdir(folder or ".") if entry.endswith(".py")}
    except (OSError, ValueError):
        raise UserError(f"there is no recipe {path!r}: its folder cannot be read") from None
    files |= {f"{name}.py" for name in names}
    if not files:
        raise UserError(f"there is no recipe {path!r}: its folder holds no .py file")
    typed, ending = os.path.dirname(path), "" if folder == RECIPES and file == path else ".py"
    known = [os.path.join(typed, name.removesuffix(".py") + ending) for name in files]
    raise unknown("recipe", path, known)


def _run(path: str, arguments: Sequence[str]) -> Config:
    """Returns what the file's `get_config` returns.

    Raises:
      UserError: for whatever the file raises, an exit too.
    """
    module = types.ModuleType("shiftnet_recipe")
    module.__file__ = path
    before, known, folder = list(sys.path), set(sys.modules), os.path.dirname(os.path.abspath(path))
    sys.modules["shiftnet_recipe"] = module  # where dataclasses look up a module's names
    sys.path.insert(0, folder)
    try:
        with open(path, "rb") as file:
            # Not by `importlib`: it would keep the compiled file, which it takes for the file's own
            # as long as that has the same length and second.
            exec(compile(file.read(), path, "exec", dont_inherit=True), module.__dict__)
        if not hasattr(module, "get_config"):
            raise UserError("the file defines no function get_config")
        found = module.get_config(*arguments)
        if not hasattr(found, "items"):
            raise UserError(f"get_config must return a Config, found {type(found).__name__}")
        return _from_mapping(dict(found.items()))
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        lines = [
            f"line {frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        message = " ".join(_text(error, str).split())
        raise UserError(f"{''.join(lines[-1:])}{type(error).__name__}: {message}") from error
    finally:
        sys.path[:] = before  # whatever the file did to it
        sys.modules.pop("shiftnet_recipe", None)
        for name in sys.modules.keys() - known:  # another recipe's neighbour may have that name
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


def _text(value: Any, form: Callable[[Any], str] = repr) -> str:
    """`value` in a sentence; a recipe's may be anything, long or with a `repr` that fails."""
    try:
        text = form(value)
    except Exception:  # a whole number of more than 4300 digits has none either
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 500 else f"{text[:500]}…"
