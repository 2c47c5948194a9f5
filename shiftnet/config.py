"""The settings of a training run: what each means, its default, its checks, its command line.

A recipe is a Python file with a function `get_config()` that starts from `default_config()`,
changes some fields and returns the result; every recipe has the same fields. A command takes one
with `--config FILE`, or `--config FILE:ARGUMENT` for `get_config(ARGUMENT)`, and overrides single
fields with `--config.FIELD=VALUE`:

    parser = Parser(prog="train.py")
    add_arguments(parser)
    config = from_arguments(parser.parse_args())

Why not `ml_collections.config_flags`: on absl's flags an unknown field, a recipe that raises, or
a file that does not exist ends in a traceback or in no error at all, a tuple field takes any text,
every error exits with code 1, and the file loader is deprecated (ml_collections 1.1.0). Mending
that from outside takes more code than this parser.
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
import traceback
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

from shiftnet.errors import UserError, unknown


class Rule(NamedTuple):
    """What a value must satisfy; `words` completes the sentence "the field must be …"."""

    holds: Callable[[Any], bool]
    words: str


AT_LEAST_0 = Rule(lambda value: value >= 0, "at least 0")
AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
ABOVE_0 = Rule(lambda value: value > 0, "above 0")
# Times or by any number of channels, that stays a number of channels.
FACTOR = Rule(lambda value: 1e-6 <= value <= 1e6, "above 0, from 1e-6 to 1e6")
FRACTION = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
# Of positions and areas in pixels, which are 32-bit numbers on the device.
SIDE = Rule(lambda value: 0 <= value < 2**15, "at least 0 and below 2**15")
# jax.random.key drops the higher bits without a word when 64-bit types are off.
SEED = Rule(lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
RISING = Rule(
    lambda value: all(before < after for before, after in itertools.pairwise((0, *value))),
    "rising numbers, the first at least 1",
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


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting. Its type is the default's.

    Attributes:
      default: the value in `default_config()`.
      doc: meaning, unit, and the source of the default; `--help` shows it.
      rule: what a value must satisfy besides its type.
      choices: the values there are, when they can be listed.
      item: the type of the members when the field is a tuple.
    """

    default: bool | int | float | str | tuple
    doc: str
    rule: Rule | None = None
    choices: tuple[str, ...] = ()
    item: type[int] | type[float] = float


# The defaults are the CIFAR recipe of the code published with arXiv:1711.08141 ("the original").
FIELDS: Mapping[str, Field] = {
    "seed": Field(0, "draws the weights, the order of the images and the augmentation", SEED),
    "epochs": Field(164, "passes over the training images (original)", AT_LEAST_1),
    "batch_size": Field(
        128, "images a step, all devices together; an incomplete last batch is dropped", AT_LEAST_1
    ),
    "model.arch": Field(
        "shiftresnet20",
        "architecture: a family and its depth 6n+2",
        Rule(
            lambda value: not re.search(r"\d{5}", value), "a family and at most 4 digits of depth"
        ),
    ),
    "model.expansion": Field(
        1.0, "middle channels of a shift block, as a multiple of its output channels", FACTOR
    ),
    "model.reduction": Field(
        1.0, "divides the channels of a resnet or depthwiseresnet, see reduction_mode", FACTOR
    ),
    "model.reduction_mode": Field(
        "net",
        "block: the middle channels of each block / reduction; net: all channels / sqrt(reduction)",
        choices=("block", "net"),
    ),
    "model.width": Field(
        1.0, "of a wrn: its stages have 16, 32 and 64 times as many channels", FACTOR
    ),
    "model.weights": Field(
        "float",
        "form of all weights but the first and the last layer's: float, sign, s3 or denseshift",
    ),
    "model.weight_bits": Field(
        0, "2, 3 or 4 bits for s3 and denseshift; 0: the form's own, 3 there", AT_LEAST_0
    ),
    "model.quantize_first_last": Field(
        False, "give the first and the last layer the form of weights too (originals: no)"
    ),
    "model.dtype": Field(
        "float32",
        "type of the computation; parameters and batch statistics stay float32",
        choices=("float32", "bfloat16"),
    ),
    "data.name": Field("cifar100", "data set, for example cifar10, digits or imagenet2012"),
    "data.source": Field(
        "tfds",
        "tfds: the data set of that name; folder: the image files of data.dir's train/<class>/ and "
        "val/<class>/",
        choices=("tfds", "folder"),
    ),
    "data.dir": Field(
        "",
        "folder of prepared data sets, or of image files; empty: $TFDS_DATA_DIR or "
        "~/tensorflow_datasets",
    ),
    "data.url": Field("", "where to download the data set from; empty: its official address"),
    "data.sha256": Field("", "digest of the download; empty: the official one", SHA256),
    "data.validation": Field(
        0,
        "training images held out to choose the best checkpoint; 0: the test set does (original)",
        AT_LEAST_0,
    ),
    "data.mean": Field(
        (), "means of the red, green and blue pixels in [0, 1]; (): the data set's own", CHANNELS
    ),
    "data.std": Field(
        (), "standard deviations, like data.mean; (): the data set's own", POSITIVE_CHANNELS
    ),
    "data.pad": Field(
        4, "pixels added on every side before the random crop; 0: no crop (original: 4)", SIDE
    ),
    "data.pad_mode": Field(
        "zero", "what the added pixels hold (original: zero)", choices=("zero", "reflect")
    ),
    "data.cutout": Field(
        0,
        "side in pixels of the square of random pixels put over each training image, partly beside "
        "it; 0: none (arXiv:1802.08530's code: 18)",
        SIDE,
    ),
    "data.size": Field(
        224, "side in pixels that image files are cropped to (S3's code)", AT_LEAST_1
    ),
    "data.resize": Field(
        0,
        "shorter side in pixels of image files in evaluation, before the crop from their middle; "
        "0: 8/7 of data.size, so 256 for 224 (S3's code)",
        SIDE,
    ),
    "data.workers": Field(
        -1,
        "processes that decode image files; 0: none beside the run's own; -1: one a core",
        Rule(lambda value: value >= -1, "at least -1"),
    ),
    "data.on_corrupt": Field(
        "error",
        "what to do about an image file that cannot be decoded: stop, or skip and count it",
        choices=("error", "skip"),
    ),
    "data.exif": Field(
        True,
        "turn the images of a folder as their EXIF orientation says; those of imagenet2012 never "
        "are, as in its published results",
    ),
    "data.flip": Field(True, "mirror every second training image, at random (original)"),
    "optimizer.lr": Field(0.1, "learning rate at the start (original)", ABOVE_0),
    "optimizer.momentum": Field(0.9, "of stochastic gradient descent (original)", FRACTION),
    "optimizer.weight_decay": Field(
        5e-4, "on every parameter, batch norm and biases included (original)", AT_LEAST_0
    ),
    "optimizer.regularizer": Field(
        1e-5,
        "times the weights' own regulariser, in the gradient and not in the logged loss; s3 has "
        "one (S3's code)",
        AT_LEAST_0,
    ),
    "schedule.name": Field(
        "step",
        "step: the rate times factor at each boundary; cosine: from the rate to lr_min at the end; "
        "sgdr: a cosine that starts anew at each boundary",
        choices=("step", "cosine", "sgdr"),
    ),
    "schedule.boundaries": Field(
        (82, 123), "epochs, counted from 0, of step and sgdr (original)", RISING, item=int
    ),
    "schedule.factor": Field(0.1, "of step: what the rate is multiplied by (original)", ABOVE_0),
    "schedule.lr_min": Field(0.0, "of cosine and sgdr: the rate that they fall to", AT_LEAST_0),
    "eval.batch_size": Field(500, "images a step of evaluation, all devices together", AT_LEAST_1),
    "eval.every_epochs": Field(1, "epochs between two evaluations", AT_LEAST_1),
    "checkpoint.every_epochs": Field(1, "epochs between two checkpoints", AT_LEAST_1),
    "checkpoint.every_steps": Field(
        0, "steps between two checkpoints besides those; 0: none within an epoch", AT_LEAST_0
    ),
    "checkpoint.keep": Field(2, "checkpoints to keep, should the newest be damaged", AT_LEAST_1),
    "parallel.batch_norm": Field(
        "global",
        "statistics of a batch on several devices: global, of the whole batch; per_device, of each "
        "device's share, the first one's running averages kept (the originals' DataParallel)",
        choices=("global", "per_device"),
    ),
    "parallel.fsdp": Field(
        False,
        "divide large parameters and the optimiser's state over the devices, in place of a copy on "
        "each",
    ),
    "log.every_seconds": Field(10.0, "seconds between two lines of progress", AT_LEAST_0),
    "log.tensorboard": Field(True, "write TensorBoard events beside metrics.jsonl"),
}

# What a result does not depend on: how a run is watched, where its data lie and how they are read.
IMMATERIAL = (
    "log.*",
    "eval.*",
    "checkpoint.*",
    "parallel.fsdp",
    "data.dir",
    "data.workers",
    "data.on_corrupt",
)
# What may change between the runs of one working directory. Any other field would make the resumed
# run another experiment.
RESUMABLE = ("epochs", *IMMATERIAL)


def default_config() -> ConfigDict:
    """Every field of `FIELDS` at its default."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        group, _, last = name.rpartition(".")
        if group and group not in config:
            config[group] = ConfigDict()
        (config[group] if group else config)[last] = field.default
    return config


def validate(config: ConfigDict | Mapping[str, Any]) -> None:
    """Checks the fields' names, types and ranges.

    The names of the architecture and of the data set are left to `shiftnet.models` and
    `shiftnet.data`, which know them.

    Raises:
      UserError: for the first field that is unknown, missing, or has a value it cannot take.
    """
    values = _flat(config)
    for name, value in values.items():
        if name not in FIELDS:
            inside = [field for field in FIELDS if field.startswith(f"{name}.")]
            if inside:
                raise UserError(f"{name} must hold {', '.join(inside)}, found {_text(value)}")
            raise _unknown("field", name, FIELDS)
    for name, field in FIELDS.items():
        if name not in values:
            raise UserError(f"field {name!r} is missing; its default is {field.default!r}")
        _check(name, values[name])
    if len(values["data.mean"]) != len(values["data.std"]):
        raise UserError(
            "data.mean and data.std must be given together, "
            f"found {_text(values['data.mean'])} and {_text(values['data.std'])}"
        )


def differences(
    old: ConfigDict | Mapping[str, Any],
    new: ConfigDict | Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
) -> list[str]:
    """The fields that differ, each as `"optimizer.lr: 0.1 -> 0.05"`.

    Args:
      old: one configuration.
      new: the other.
      ignore: fields to pass over, as names or patterns such as `"log.*"`; see `IMMATERIAL`.
    """
    before, after = _flat(old), _flat(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    ]


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON, for a checkpoint to carry; `from_json` brings it back."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ConfigDict:
    """The configuration that `to_json` wrote, tuples as tuples; locked, as from `load`.

    Fields that did not exist yet when it was written have their defaults, so that what was saved
    once can always be loaded.

    Raises:
      UserError: if the text is not JSON, or not a valid configuration.
    """
    try:
        loaded = json.loads(text)
        if not isinstance(loaded, dict):
            raise TypeError(f"found {type(loaded).__name__}")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the configuration is not a JSON object: {error}") from error
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in _flat(loaded).items()
    }
    return _typed(_flat(default_config()) | values)


def load(recipe: str) -> ConfigDict:
    """Runs a recipe: its configuration, checked, and locked against new fields.

    While the file runs, its folder is on `sys.path`, as for a script, so that it can import its
    neighbours whatever the current directory.

    Args:
      recipe: `"FILE"`, or `"FILE:ARGUMENT"` to call its `get_config` with that text.

    Raises:
      UserError: if there is no such file, if it raises, or if its configuration is not valid.
    """
    path, _, argument = recipe.partition(":")
    if not os.path.isfile(path):
        raise _no_file(path)
    try:
        return _typed(_run(path, [argument] if argument else []))
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from error


def apply_argument(config: ConfigDict, argument: str, fields: Mapping[str, str]) -> None:
    """Sets fields from a recipe's argument, `"expansion=3"` or `"reduction=2.8,dtype=bfloat16"`.

    Args:
      config: what to change.
      argument: `name=value` pairs with commas between them; `""` changes nothing.
      fields: the names that the recipe knows, with the field each stands for, for example
        `{"expansion": "model.expansion"}`.

    Raises:
      UserError: if it is not of that form, or for an unknown name or a value of the wrong type.
    """
    for pair in argument.split(",") if argument else ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"expected name=value after the colon, found {pair!r}")
        if name.strip() not in fields:
            raise unknown("argument", name.strip(), fields)
        override(config, fields[name.strip()], text.strip())


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets one field from text, by the field's own type; `validate` checks the range.

    Args:
      config: what to change.
      name: the field, for example `"schedule.boundaries"`.
      text: `3` or `0.05` for a number, `true` or `false`, `(5,8)` or `5,8` for a tuple.

    Raises:
      UserError: if there is no such field or the text does not read as its type.
    """
    if name not in FIELDS:
        raise _unknown("field", name, FIELDS)
    field = FIELDS[name]
    kind = type(field.default)
    value: Any
    try:
        if kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif kind is tuple:
            inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
            parts = inner.split(",")
            if not parts[-1].strip():  # (), and the comma of (5,)
                parts.pop()
            value = tuple(field.item(part) for part in parts)
        else:
            value = kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{name} must be {_kind(field)}, found {text!r}") from None
    group, _, last = name.rpartition(".")
    (config[group] if group else config)[last] = value


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
    group = parser.add_argument_group(
        "recipe", "a file of settings, and single settings that differ from it"
    )
    group.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="for example configs/shiftresnet20_c100.py:expansion=3",
    )
    for name, field in FIELDS.items():
        default = str(field.default).lower() or '""'  # as one would write it: true, not True
        group.add_argument(
            f"--config.{name}",
            metavar="|".join(field.choices) or type(field.default).__name__.upper(),
            help=f"{field.doc} (default: {default})".replace("%", "%%"),
        )


def from_arguments(arguments: argparse.Namespace) -> ConfigDict:
    """The recipe that the command line names, with its overrides; checked and locked.

    Raises:
      UserError: as `load`, `override` and `validate` do, or if there is no `--config`.
    """
    given = vars(arguments)
    if given["config"] is None:
        raise UserError("--config is missing: name a recipe, such as configs/quickstart.py")
    config = load(given["config"])
    for name in FIELDS:
        text = given[f"config.{name}"]
        if text is not None:
            override(config, name, text)
    validate(config)
    return config


def _flat(config: ConfigDict | Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Dotted names and values; an empty group is the value `{}`, so that nothing goes unseen."""
    if depth > 8:
        raise UserError("its fields are nested without end; expected field or group.field")
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(value, (ConfigDict, Mapping)):
            flat[str(key)] = value
        elif len(value) == 0:
            flat[str(key)] = {}
        else:
            flat.update({f"{key}.{name}": leaf for name, leaf in _flat(value, depth + 1).items()})
    return flat


def _typed(values: Mapping[str, Any]) -> ConfigDict:
    """Checks dotted names and values, gives each its field's own type (0 becomes 0.0), locks."""
    validate(values)
    config = default_config()
    config.update_from_flattened_dict(values)
    return config.lock()


def _check(name: str, value: Any) -> None:
    field = FIELDS[name]
    if not _is_a(value, type(field.default), field.item):
        raise UserError(f"{name} must be {_kind(field)}, found {_text(value)}")
    if any(abs(member) >= 2**63 for member in _whole(value)):
        raise UserError(f"{name} must be below 2**63, found {_text(value)}")
    if field.choices and value not in field.choices:
        raise unknown(name, value, field.choices)
    if field.rule and not field.rule.holds(value):
        raise UserError(f"{name} must be {field.rule.words}, found {_text(value)}")


def _whole(value: Any) -> list[int]:
    """The whole numbers among a field's value or its members."""
    members = value if isinstance(value, tuple) else (value,)
    return [member for member in members if isinstance(member, int)]


def _is_a(value: Any, kind: type, item: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(_is_a(member, item, item) for member in value)
    if isinstance(value, bool):  # Python takes it for an int
        return kind is bool
    if kind is float and isinstance(value, (int, float)):
        return abs(value) <= sys.float_info.max  # neither infinite, nor NaN, nor too large an int
    return isinstance(value, kind)


def _kind(field: Field) -> str:
    """What a value of the field's type is called in a sentence."""
    if isinstance(field.default, tuple):
        return f"a tuple of {'whole ' if field.item is int else ''}numbers, such as (5, 8)"
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    return names[type(field.default)]


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


def _no_file(path: str) -> UserError:
    folder = os.path.dirname(path)
    try:
        names = [name for name in os.listdir(folder or ".") if name.endswith(".py")]
    except (OSError, ValueError):
        return UserError(f"there is no recipe {path!r}: its folder cannot be read")
    if not names:
        return UserError(f"there is no recipe {path!r}: its folder holds no .py file")
    return unknown("recipe", path, [os.path.join(folder, name) for name in names])


def _run(path: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What the file's `get_config` returns, by dotted names.

    Raises:
      UserError: for whatever the file raises, an exit too.
    """
    module = types.ModuleType("recipe")
    module.__file__ = path
    before = list(sys.path)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        with open(path, "rb") as file:
            # Not by `importlib`: it would keep the compiled file, which it takes for the file's own
            # as long as that has the same length and second.
            exec(compile(file.read(), path, "exec", dont_inherit=True), module.__dict__)
        if not hasattr(module, "get_config"):
            raise UserError("the file defines no function get_config")
        found = module.get_config(*arguments)
        if not isinstance(found, ConfigDict):
            raise UserError(f"get_config must return a ConfigDict, found {type(found).__name__}")
        return _flat(found)
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


def _text(value: Any, form: Callable[[Any], str] = repr) -> str:
    """`value` in a sentence; a recipe's may be anything, long or with a `repr` that fails."""
    try:
        text = form(value)
    except Exception:  # a whole number of more than 4300 digits has none either
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 500 else f"{text[:500]}…"
