"""Gives the commands what nobody should: none may crash, hang, or leave a file behind.

    make fuzz

Each case is a command line, made from its number alone out of lines that people write, with a
recipe (`mutant.py`) and a checkpoint's recipe (as `config.from_json` reads it) that may be damaged
too. A case passes if the command

- exits with 0 and says nothing on stderr, or with 2 and one line there, `error: …` (`predict` also
  says there which sheets it wrote, and exits with 1 where it names files that are no images);
- names the recipe's file in that line, where the recipe is what is wrong;
- needs less than HANG seconds, and leaves the directory and the process as they were.

All in one process: what would train, read or write for long is replaced, right behind the checks.
Exits with 1 if any case failed.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from flax import nnx

from shiftnet import checkpoint, cli, config, data, models
from shiftnet.cli import count
from shiftnet.errors import UserError
from shiftnet.inference import Classifier
from shiftnet.layers import LearnedShift, Linear
from shiftnet.training.engine import Outcome
from shiftnet.training.evaluation import Evaluation
from tests.data import image_files
from tests.limit import limit

HANG = 20.0  # seconds of CPU, of all threads, compilation included
REAL = 0.05  # share of the networks that are really counted, or built

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    name: importlib.import_module(f"shiftnet.cli.{name}").main for name in cli.COMMANDS
}
# What people write; every case starts from one of these.
LINES = {
    "train": [
        "--config recipe.py",
        "--config recipe.py:expansion=3,dtype=bfloat16 --workdir new --init run",
        "--config named.py:dtype=bfloat16",
        "--config a:b/recipe.py:expansion=3",
        "--config mutant.py",
        "--config=mutant.py:expansion=3 --workdir=new --profile",
        "--config recipe.py --config.epochs=3 --config.optimizer.lr 0.05",
        "--config recipe.py --config.schedule.boundaries=(5,8) --config.data.flip=false",
        "--config recipe.py --config.data.mean 0.5,0.5,0.5 --config.data.std=1,1,1",
        "--config recipe.py --plan v5e:4x4,h200:8",
        "--config recipe.py --coordinator localhost:1234 --num-processes 2 --process-id 0",
    ],
    "evaluate": [
        "--ckpt run --dataset digits",
        "--ckpt run/best run --dataset digits --batch-size 100 --per-class",
        "--ckpt ru* --json --data-dir folder",
    ],
    "count": [
        "--arch shiftresnet8",
        "--arch shiftresnet8 --expansion 3 --true",
        "--arch resnet8 --reduction=2.8 --reduction-mode block --json",
        "--arch depthwiseresnet8 --reduction 1.5 --weights sign --quantize-first-last",
        "--arch wrn8 --width 2 --num-classes 100 --image-size 64",
        "--arch resnet8 --weights s3 --weight-bits 3",
        "--arch resnet8 --weights-of layer1.*:int/2,linear:pot --weights-first-last int/8",
    ],
    "convert": [
        "wrn8.npz",
        "wrn8.npz --out new --dataset cifar10 --weights float",
        "wrn8.npz --mean 0.5,0.5,0.5 --std=1,1,1 --class-names a,b,c,d,e,f,g,h,i,j",
        "wrn8.npz --class-names text.txt --entry state_dict",
        "text.txt --out=new",
    ],
    "predict": [
        "run cat.png",
        "run/best cat.png folder pictures --top 5 --csv",
        "run pictures --json --html new.html",
        "run cat.png --png=new.png",
        "shiftresnet20_1c_c100 -",
    ],
    "prepare": [
        "pictures new",
        "pictures new --side 8 --format jpeg --on-corrupt skip",
        "folder new --dataset imagenet2012 --no-exif",
    ],
    "shifts": ["run new.svg", "run/best new.svg"],
    "sweep": [
        "--config recipe.py --over optimizer.lr=0.1,0.2",
        "--config recipe.py --over optimizer.lr=0.02..0.2:log --over data.pad=0,2 --trials 3",
        "--config mutant.py --over batch_size=8..64 --config.data.validation=50 --no-prune",
        "--config recipe.py --over model.width=1.0..2.0 --seeds=2 --budget 9m --workdir new "
        "--config.data.validation=50",
        "--config recipe.py --over data.std=(1,1,1),(2,2,2) --config.data.validation 50",
    ],
    "models": ["", "*c100*", "shiftresnet20_1c_c100 --json", "shiftresnet20_3c_c100 --card"],
    "pack": ["run new.safetensors", "run/best new.safetensors --rest float16"],
    "export": [
        "run new.stablehlo --image-size 32",
        "run new.npz --packed",
        "run/best new.safetensors",
        "run --hub new",
        "run new.onnx",
        "run new.pth",
        "run new.c --calibrate-on folder --calibration-images 8 --report",
        "run new.json --requantize shift",
    ],
    "reproduce": [
        "",
        "--list --seeds 3 --results results",
        "--only row* --epochs 3 --budget 9m --workdir new --data-dir folder",
        "--next --budget=90s --together 2 --seeds=2",
    ],
    "report": ["run --out new.html", "results --out new.md --brief", "run results --out=text.md"],
}
OPTIONS = {
    command: [
        *sorted({word.partition("=")[0] for line in lines for word in line.split() if "-" in word}),
        *("--help", "-h", "--version", "--", "-", "---", "-9", "--config.", "--config.model"),
    ]
    for command, lines in LINES.items()
}
PATHS = [
    *("recipe.py", "mutant.py", "mutant.py:", "mutant.py::=,", "recipe", "recipe.py/", "run"),
    *("named.py", "nmed.py", "named", "names.toml", "a:b/recipe.py", "a:b", "a:b/rec.py:x=1"),
    *("missing.py", "missing/missing.py", "folder", "folder/", "folder.npz", "folder.safetensors"),
    *("text.txt", "text.txt/x.npz", "text.txt/x.safetensors", "secret.py", "secret/x.py"),
    *("secret/x.npz", "secret/x.safetensors", "loop", "loop/x.npz", "loop.py", "missing/x.npz"),
    *(".", "..", "/", "//", "", "~", "~root", "/dev/null", "/proc/self/mem", "run/checkpoints/7"),
    *("run/*", "[", "[!", "*", "?", "**", "{a,b}", "x" * 300, "x" * 250 + ".npz", "a/" * 3000),
    *("x" * 251 + ".safetensors", "x" * 90_000, "new\udcff.npz", "new\nline.npz", "\udcff.py"),
    *("cat.png", "pictures", "pictures/train", "new.html", "new.png", "new.svg", "new/x.svg"),
    *("new\x1b[31m.safetensors", "\u202enew.npz", "ü/😀.npz", "new\r", ".npz", "..npz", "new.NPZ"),
]
VALUES = [
    *("", " ", "0", "-0", "1", "-1", "3", "2.5", "-1e-3", "1e5", "1e999", "-1e999", "nan", "-nan"),
    *("inf", "-inf", "infinity", "1e-320", "1.7e308", "1e300", "1e-300", "9" * 20, "-" + "9" * 40),
    *("9" * 5000, "2147483648", "4294967295", "4294967296", "9223372036854775808", "0x10", "1_0"),
    *("٣", "³", "½", "+3", "--1", ".5", "1.", "1e", "1,2", "(1,2)", "(1", "1)", "()", "(,)", ",,"),
    *("((1))", "(1,2,)", "[1, 2]", "{}", "(1,1e999)", "(-1,2)", "(8,5)", "(nan,nan,nan)", "0,0,0"),
    *("lr=1", "optimizer.lr=0.1..0.01", "epochs=1..9", "epochs=1..9:log", "optimizer.lr=-1..1:log"),
    *("data.pad=", "data.pad=1,1", "model.arch=resnet8,x", "data.mean=(1,2),(", "optimizer.lr=.."),
    *("true", "True", "false", "none", "None", "null", "step", "tfds", "float16", "sign", "s3"),
    *("int/8", "int/0", "apot/9", "layer1.*:s3/2", "*:pot", ":int", "linear:", "a:b:ternary"),
    *("'", '"', '"\'"', "\\", "`touch PWNED`", "$(touch PWNED)", ";", "%s", "%(prog)s", "%", "{0}"),
    *("a\nb", "\n", "\t", "\x1b[31m", "\x7f", "\udcff", "ü", "😀", "\u202e", "\u2028", "e\u0301"),
    *("x" * 1000, "x" * 100_000, "lr" * 50_000, "(" * 10_000, "," * 10_000, "1," * 10_000),
    *("a=b", "=", "==", ":", ":=", "@text.txt", "-x", "--x", "resnet8", "shiftresnet20", "wrn-8"),
    *(
        "resnet21",
        "resnet" + "8" * 5000,
        "resnet-2",
        "shiftnet_a",
        "shiftnet_a8",
        "v5e:4x4,",
        "h200",
    ),
    *("localhost", "digits", "cifar10", "imagenet2012", "cifar", "expansion=3", "expansion=", "=3"),
]

RECIPE = """
from shiftnet.config import apply_argument, default_config

def get_config(argument=""):
    config = default_config()
    config.epochs = 7
    config.model.arch = "shiftresnet8"
    config.optimizer.lr = 0.05
    config.schedule.boundaries = (3, 5)
    apply_argument(config, argument, {"expansion": "model.expansion", "dtype": "model.dtype"})
    return config
"""
# What a mutated recipe may use besides.
PRELUDE = """
import sys
import numpy as np
from types import MappingProxyType, SimpleNamespace
from shiftnet.config import Config, ModelConfig
class Bad:
    def __repr__(self): raise RuntimeError("no repr")
class BadError(Exception):
    def __str__(self): raise RuntimeError("no text")
"""
STATEMENTS = [
    *("pass", "return", "return None", "return 3", "return config.to_dict()", "return get_config"),
    *("return {}", "return MappingProxyType(config)", "return dict(config)", "return Config()"),
    *("return type('C', (Config,), {})()", "return config, config", "yield config"),
    *("raise RuntimeError", "raise RuntimeError('two\\nlines')", "raise BadError", "raise 3"),
    *("raise SystemExit", "raise SystemExit(0)", "sys.exit('so\\nit is')", "exit(3)", "1 / 0"),
    *("raise BaseException('base')", "raise GeneratorExit", "raise StopIteration", "assert False"),
    *("raise FileNotFoundError(2, 'gone', 'x')", "open('missing')", "import nothing_like_it"),
    *("raise MemoryError", "raise RecursionError", "get_config()", "raise UnicodeError('\\udcff')"),
    *("raise ValueError('\\x1b[31m')", "raise ExceptionGroup('a', [ValueError('b')])", "del x"),
    *("sys.path.clear()", "sys.path.pop(0)", "sys.path = []", "sys.path.append('x')", "config = ("),
    *("print('printed')", "del config.model", "vars(config).clear()", "config.x = config", "break"),
    *("config.model = config", "config.model.model = config.model", "config['a.b'] = 1", "\tx"),
    *("config['optimizer.lr'] = 1", "config[''] = 1", "config = config.to_dict()", "config = None"),
    *(
        "config.update({'epochs': 3})",
        "config.epochs += 1",
        "config.epochs /= 2",
        "globals().clear()",
    ),
]
NO_RECIPES = [
    *("", "\n", "x = 1", "get_config = 3", "get_config = None", "def get_config(", "'", "\0"),
    *("def get_config(a, b): pass", "class get_config: pass", "async def get_config(): pass"),
    *("get_config = __import__('shiftnet.config').config.default_config", "return", "\x0c"),
    *("def __getattr__(name): raise RuntimeError(name)", "from x import *", "# coding: nothing"),
    *("\ufeff", "(" * 5000, f"x = {'-' * 50_000}1", "\udcff", "__import__('sys').exit('now')"),
]
PYTHON_VALUES = [
    *("None", "True", "0", "1", "-1", "2.0", "10**30", "10**400", "10**5000", "-(10**5000)"),
    *("float('nan')", "float('inf')", "1e308", "5e-324", "'x'", "''", "'x' * 100_000", "b'x'"),
    *("'\\ud800'", "'\\0'", "'\\n'", "()", "(1,)", "(1, 2)", "(2, 1)", "(1, 'a')", "(0.5,) * 3"),
    *("(10**5000,)", "(True,)", "((1, 2),)", "[1, 2]", "[]", "{}", "{'a': 1}", "{1: 2}", "set()"),
    *(
        "object()",
        "Bad()",
        "(Bad(),)",
        "[Bad()]",
        "lambda: 0",
        "int",
        "print",
        "3j",
        "ModelConfig()",
    ),
    *("SimpleNamespace(lr=1)", "np.float32(1)", "np.float64(1)", "np.int64(1)", "np.arange(3)"),
    *("np.array(1.0)", "np.str_('resnet8')", "np.bool_(True)", "config", "config.model"),
    *("list(range(100_000))", "type('S', (str,), {})('resnet8')", "type('I', (int,), {})(3)"),
]
JSON_VALUES = [
    *(None, True, False, 0, 1, -1, 2.5, 10**30, 10**400, float("nan"), float("inf"), "", "x"),
    *(
        "\ud800",
        "\0",
        "a\nb",
        "x" * 1000,
        [],
        [1],
        [1, 2],
        [2, 1],
        ["a"],
        [[1]],
        {},
        {"a": 1},
        {"": 1},
    ),
    *([None], [0.5, 0.5, 0.5], [True], "resnet8", 1e308, 5e-324, {"lr": 1}),
]


class Case(NamedTuple):
    """What a command is given."""

    command: str
    words: list[str]
    recipe: str
    note: str

    @property
    def of_recipe(self) -> bool:
        """Whether nothing but the recipe can be wrong."""
        return self.words in (["--config", "mutant.py"], ["--config", "mutant.py:expansion=2"])

    def __str__(self) -> str:
        shown = [word if len(word) < 80 else f"{word[:60]}… ({len(word)})" for word in self.words]
        text = f"{self.command} {' '.join(shlex.quote(word) for word in shown)}"
        text = text.encode("unicode_escape").decode()
        if any("mutant" in word for word in self.words):
            text += f"\n    mutant.py: {self.recipe!r}"
        return text + ("" if self.note == GOOD_NOTE else f"\n    checkpoint: {self.note[:2000]!r}")


TABLE = """
[[tables]]
name = "table"
title = "Networks"
source = "nothing"
epoch = "best"
note = ""
rows = [
  { name = "row", recipe = "recipe.py", parameters = 1, multiply_adds = 1, bytes = 4 },
  { name = "row3", recipe = "mutant.py", parameters = 2, multiply_adds = 2, bytes = 8 },
]
"""
GOOD_NOTE = config.to_json(config.default_config())


def case(number: int) -> Case:
    draw = random.Random(number)
    command = draw.choice(["train", "train", "train", *COMMANDS])
    words = draw.choice(LINES[command]).split()
    if draw.random() < 0.35 and command == "train":
        words = ["--config", draw.choice(["mutant.py", "mutant.py", "mutant.py:expansion=2"])]
    elif draw.random() < 0.4 and command == "train":
        words += _override(draw)
    elif command == "train" or draw.random() < 0.7:
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 8])):
            words = draw.choice(MUTATIONS)(draw, words, OPTIONS[command])
    recipe = mutated_recipe(draw) if any("mutant" in word for word in words) else RECIPE
    note = mutated_note(draw) if command != "train" and draw.random() < 0.4 else GOOD_NOTE
    # The system passes no zero bytes, and no more than these.
    words = [word.replace("\0", "")[:100_000] for word in words]
    return Case(command, words, recipe, note)


def _override(draw: random.Random) -> list[str]:
    name = draw.choice(list(config.FIELDS))
    if draw.random() < 0.2:
        name = _scratched(draw, name)
    value = draw.choice(VALUES)
    return [f"--config.{name}={value}"] if draw.random() < 0.5 else [f"--config.{name}", value]


def _scratched(draw: random.Random, text: str) -> str:
    """One character or piece added, taken away or changed."""
    at = draw.randrange(len(text) + 1)
    end = min(len(text), at + draw.choice([0, 1, 1, 2, 10]))
    junk = draw.choice([*"x.-=:,'\"()[]{}\\ \n\t#0_é%*", "\udcff", "", draw.choice(VALUES)])
    return text[:at] + junk + text[end:]


# Each takes a command line and gives it damaged.


def _drop(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    at = draw.randrange(len(words) + 1)
    return words[:at] + words[at + 1 :]


def _double(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    at = draw.randrange(len(words) + 1)
    return words[: at + 1] + words[at:]


def _shuffle(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    return draw.sample(words, len(words))


def _put(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    at = draw.randrange(len(words) + 1)
    new = draw.choice([*options, *VALUES, *PATHS])
    return [*words[:at], new, *words[at + draw.choice([0, 1]) :]]


def _value(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    """Another value for an option, or for a positional argument."""
    if not words:
        return words
    at = draw.randrange(len(words))
    name, equals, _ = words[at].partition("=")
    value = draw.choice([*VALUES, *PATHS])
    if words[at].startswith("-") and not equals and draw.random() < 0.7:
        return [*words[: at + 1], value, *words[at + 2 :]]
    return [*words[:at], f"{name}={value}" if equals else value, *words[at + 1 :]]


def _scratch(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    if not words:
        return words
    at = draw.randrange(len(words))
    return [*words[:at], _scratched(draw, words[at]), *words[at + 1 :]]


def _option(draw: random.Random, words: list[str], options: list[str]) -> list[str]:
    option, value = draw.choice(options), draw.choice([*VALUES, *PATHS])
    return [*words, f"{option}={value}"] if draw.random() < 0.5 else [*words, option, value]


MUTATIONS = [_drop, _double, _shuffle, _put, _value, _value, _scratch, _option]


def mutated_recipe(draw: random.Random) -> str:
    """Another `get_config`, or another file altogether."""
    kind = draw.random()
    if kind < 0.1:  # no recipe at all
        return draw.choice(NO_RECIPES)
    lines = (PRELUDE + RECIPE).splitlines()
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.random()
        at = draw.randrange(lines.index("    config = default_config()") + 1, len(lines) + 1)
        if kind < 0.35:
            name = draw.choice([*config.FIELDS, "model", "data", "other", "model.other"])
            name = _scratched(draw, name) if draw.random() < 0.1 else name
            value = draw.choice(PYTHON_VALUES)
            group, _, last = name.rpartition(".")
            holder = f"config[{group!r}]" if group else "config"
            line = draw.choice(
                [
                    f"config.{name} = {value}",
                    f"del config.{name}",
                    f"{holder}[{last!r}] = {value}",
                    f"{holder}.update({{{last!r}: {value}}})",
                ]
            )
            lines.insert(at, "    " + line)
        elif kind < 0.7:
            lines.insert(at, "    " + draw.choice(STATEMENTS))
        elif kind < 0.85:  # the rest shall still be Python, mostly
            at = draw.randrange(len(lines))
            lines[at : at + 1] = draw.choice([[], [lines[at]] * 2, [lines[at], draw.choice(lines)]])
            if "    config = default_config()" not in lines:
                break
        else:
            return _scratched(draw, "\n".join(lines))
    return "\n".join(lines)


def mutated_note(draw: random.Random) -> str:
    """A checkpoint's recipe: fields changed, or its text."""
    values = json.loads(GOOD_NOTE)
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([*config.FIELDS, "model", "data", "other", "model.other", ""])
        group, _, last = name.rpartition(".")
        holder = values.get(group) if group else values
        if isinstance(holder, dict):
            if draw.random() < 0.2:
                holder.pop(last, None)
            else:
                holder[draw.choice([last, last, name])] = draw.choice(JSON_VALUES)
    text = json.dumps(values)
    if draw.random() < 0.4:
        text = draw.choice(
            [
                *(
                    _scratched(draw, text),
                    _scratched(draw, text),
                    text[: draw.randrange(len(text))],
                ),
                *("", "null", "[]", "3", '"x"', "[" * 100_000, '{"a":' * 100_000, "{}", text * 2),
                *(
                    "\0",
                    "\ufeff" + text,
                    "[" + text + "]",
                    '{"epochs": 1' + "0" * 5000 + "}",
                    "NaN",
                ),
            ]
        )
    return text


# In place of the work


class Accepted(BaseException):
    """All checks are passed; not an Exception, so that nothing on the way may catch it."""


def _raise(kind: type[BaseException]) -> Callable:
    def stop(*_: object, **__: object) -> Any:
        raise kind

    return stop


class Tiny(nnx.Module):
    def __init__(self) -> None:
        self.linear = Linear(2, 2, rngs=nnx.Rngs(0))
        self.shift = LearnedShift(2, "sparse", rngs=nnx.Rngs(0))


ONE = np.zeros(1, np.int32)
PICTURE = image_files.encoded(image_files.pixels(np.random.default_rng(0), 9, 9), "PNG")
NUMBERS = Evaluation(1.0, 0.5, 0.9, ONE, ONE, np.ones(1, np.float32), ONE)


class Stubs:
    """In place of the commands' work: as little as their checks and last words need."""

    def __init__(self) -> None:
        self.note = GOOD_NOTE
        self.real = False
        self.trained = False
        self.count_really = count._count
        model = {**config.default_config().model, "arch": "resnet8", "weights": "s3"}
        self.counts = count._count(model, SimpleNamespace(num_classes=10, image_size=32))

    def patches(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for name, stub in {
            "shiftnet.cli.train.train": self.train,
            "shiftnet.cli.train.plan.plan": _raise(Accepted),
            "shiftnet.cli.train.set_up": lambda: None,
            "jax.distributed.initialize": _raise(Accepted),
            "shiftnet.load": self.load,
            "shiftnet.data.load_test": self.dataset,
            "shiftnet.cli.evaluate.make_evaluator": lambda *_, **__: lambda *_: NUMBERS,
            "shiftnet.cli.count._count": self.count,
            "shiftnet.interchange.convert.fill": lambda found: (Tiny(), [], []),
            "shiftnet.checkpoint.ocp.save_checkpointables": lambda path, *_, **__: path.mkdir(),
            "shiftnet.checkpoint._arrays": lambda part: 0,
            "shiftnet.cli.predict.set_up": lambda: None,
            "shiftnet.inference.Classifier.predict": self.predict,
            "shiftnet.cli.sweep.set_up": lambda: None,
            "shiftnet.training.sweep._trial": _raise(Accepted),
            "shiftnet.integers.calibration.images": lambda *_: np.zeros((2, 8, 8, 3), np.uint8),
            "shiftnet.integers.calibration.part": _raise(Accepted),
            "shiftnet.zoo.cards.card": lambda *_, **__: "card",
            "shiftnet.cli.reproduce.set_up": lambda: None,
            "shiftnet.results.reproduce._train": lambda *_: SimpleNamespace(
                finished=True, signal=0
            ),
            "shiftnet.results.report.page.render": lambda found: "page",
            "shiftnet.results.report.sources._count": lambda *_: None,
            "shiftnet.cli.export._require": self.converter,
            "shiftnet.cli.export.onnx": lambda *_: b"program",
            "shiftnet.cli.export.stablehlo": lambda *_: b"program",
            "shiftnet.cli.export.arrays": lambda *_, **__: {"x": np.zeros(2)},
        }.items():
            stack.enter_context(mock.patch(name, stub))
        return stack

    def train(self, settings: Any, workdir: Path, *, init: Any, profile: bool) -> Outcome:
        self.trained = True
        if config.from_json(config.to_json(settings)) != settings:
            raise AssertionError("the recipe does not come back from its JSON")
        models.parse_arch(settings.model.arch)
        if self.real and _is_small(settings.model.arch):
            models.check(settings.model)
        return Outcome(True, 7, [0.5], [None], "test")

    def load(self, path: str) -> Classifier:
        normalization = {"mean": (0.5,) * 3, "std": (1.0,) * 3}
        names = data.class_names("digits")
        metadata = {"config": self.note, "class_names": names, "step": 0, **normalization}
        return Classifier(checkpoint.find(path), metadata, Tiny())

    def predict(self, images: np.ndarray) -> Any:
        return SimpleNamespace(top=lambda k: [[("a", 1.0)] * k] * len(images))

    def dataset(self, name: str, *, source: str = "tfds", **_: object) -> data.TestSet:
        if source == "tfds":
            data.normalization(name)  # knows the names
        part = data.Split(np.zeros((1, 8, 8, 3), np.uint8), ONE)
        return data.TestSet(name, part, data.class_names("digits"))

    def converter(self, ending: str, integers: bool) -> None:
        del integers
        if ending in (".onnx", ".pth"):
            raise UserError("it is not installed")  # nor imported, which takes seconds

    def count(self, model: Any, arguments: Any) -> Any:
        if self.real and _is_small(model["arch"]):
            return self.count_really(model, arguments)
        return self.counts


def _is_small(arch: str) -> bool:
    depth = re.search(r"\d+", arch)
    return depth is not None and len(depth[0]) <= 2 and int(depth[0]) <= 20


# One case


def furnish(here: Path) -> None:
    """Makes the directory that the commands run in what it is before each case."""
    for entry in here.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            entry.chmod(0o700)  # "secret" can be removed then
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (here / "recipe.py").write_text(RECIPE)
    (here / "names.toml").write_text('named = "recipe.py:expansion=2"\n')
    (here / "a:b").mkdir()
    (here / "a:b" / "recipe.py").write_text(RECIPE)
    (here / "text.txt").write_text("some text\n")
    (here / "text.md").write_text("<!-- results -->\n<!-- /results -->\n")
    (here / "results").mkdir()
    (here / "results" / "table.toml").write_text(TABLE)
    (here / "pictures").mkdir()
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (here / "pictures" / split / name).mkdir(parents=True)
            (here / "pictures" / split / name / "1.png").write_bytes(PICTURE)
    (here / "cat.png").write_bytes(PICTURE)
    (here / "loop").symlink_to("loop")
    (here / "loop.py").symlink_to("loop.py")
    for folder in ("folder", "folder.npz", "folder.safetensors", "secret"):
        (here / folder).mkdir()
    for series in ("checkpoints", "best"):
        (here / "run" / series / "7").mkdir(parents=True)
        (here / "run" / series / "7" / "_CHECKPOINT_METADATA").touch()
        (here / "run" / series / "7" / checkpoint.DIGESTS).touch()
    arrays = {"conv0": (16, 3, 3, 3), "group0.block0.conv0": (16, 16, 3, 3), "conv_last": (10, 64)}
    shapes = {name: (*shape, 1, 1)[:4] for name, shape in arrays.items()}
    np.savez(here / "wrn8.npz", **{name: np.ones(shape, "f4") for name, shape in shapes.items()})
    (here / "secret.py").write_text(RECIPE)
    (here / "secret.py").chmod(0)
    (here / "secret").chmod(0)


def contents(here: Path) -> dict[str, int]:
    return {
        os.path.join(folder, name): os.lstat(os.path.join(folder, name)).st_mtime_ns
        for folder, folders, files in os.walk(here)
        for name in (*folders, *files)
    }


def attempt(one: Case) -> tuple[str, str, float]:
    """Runs a command: what came of it, what of that must not be, and the seconds it took."""
    failure = ""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    path = list(sys.path)
    begun = time.process_time()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch("sys.stdin", io.StringIO("cat.png\n\nno.png\n")),
            limit(2 * HANG),
        ):
            code = COMMANDS[one.command](one.words)
    except Accepted:
        code = 0
    except SystemExit as error:  # argparse
        code = error.code
    except BaseException as error:
        code, failure = -1, f"escaped: {type(error).__name__} {str(error)[:300]}"
    finally:
        took = time.process_time() - begun
        sys.path = path
    err.flush()
    said = err.buffer.getvalue().decode()
    if not failure:
        expected = {0: "", 2: r"error: [^\n]+\n"}
        if one.command == "predict":
            expected = {0: r"([^\n]+: \d+ images\n)*", 1: r"([^\n]+\n)+", 2: expected[2]}
        if code not in expected:
            failure = f"exit code {code}"
        elif not re.fullmatch(expected[code], said) or not said.replace("\n", "").isprintable():
            failure = f"exit code {code} with {said[:300]!r}"
    return f"{one.command} {'accepted' if code in (0, 1) else reason(said)}", failure, took


def reason(message: str) -> str:
    """The message without what differs from case to case."""
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", "'…'", message.strip().removeprefix("error: "))
    return re.sub(r"\d+", "N", text)[:90]


def run(
    cases: Iterable[tuple[int, Case]],
) -> tuple[collections.Counter, list[str], tuple[float, str]]:
    """Runs numbered cases: how often there was which outcome, failures, and the slowest case."""
    outcomes: collections.Counter = collections.Counter()
    failures = []
    slowest = (0.0, "")
    stubs = Stubs()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        stubs.patches(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=SyntaxWarning)  # a recipe's own
        warnings.filterwarnings("ignore", "coroutine", category=RuntimeWarning)  # likewise
        here = Path(folder)
        furnish(here)
        for number, one in cases:
            stubs.note, stubs.trained = one.note, False
            stubs.real = random.Random(~number).random() < REAL
            (here / "mutant.py").write_bytes(one.recipe.encode("utf-8", "surrogateescape"))
            (here / "run" / "config.json").write_bytes(one.note.encode("utf-8", "surrogateescape"))
            before = contents(here)
            outcome, failure, took = attempt(one)
            if one.of_recipe and not stubs.trained and "mutant.py" not in outcome:
                failure = failure or f"does not name the recipe: {outcome}"
            if took > HANG:
                failure = f"{took:.1f} s"
            if (after := contents(here)) != before:
                if not outcome.endswith(" accepted"):
                    failure = failure or f"left {set(after.items()) ^ set(before.items())}"
                furnish(here)
            if failure:
                failures.append(f"{number}: {failure}\n    {one}")
            outcomes[outcome] += 1
            slowest = max(slowest, (took, f"{number}: {one}"))
    return outcomes, failures, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="where to begin")
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    begun = time.perf_counter()
    numbers = range(options.first, options.first + options.cases)
    outcomes, failures, slowest = run((number, case(number)) for number in numbers)
    count_ = sum(outcomes.values())
    accepted = sum(n for outcome, n in outcomes.items() if outcome.endswith(" accepted"))
    for outcome, n in outcomes.most_common(60):
        print(f"{n:8d}  {outcome}")
    rest = outcomes.most_common()[60:]
    print(f"{sum(n for _, n in rest):8d}  {len(rest)} other outcomes")
    print(f"slowest          {slowest[0]:.3f} s: {slowest[1]}")
    for failure in failures[:20]:
        print(f"  {failure}")
    print(
        f"command lines    {count_} in {time.perf_counter() - begun:.0f} s, {accepted} accepted, "
        f"{count_ - accepted} refused, failures {len(failures)}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
