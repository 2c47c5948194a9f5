"""The settings: their checks, their command line, and their JSON."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftnet import config
from shiftnet.errors import UserError

RECIPE = """
from shiftnet.config import apply_argument, default_config

def get_config(argument=""):
    config = default_config()
    config.epochs = 7
    apply_argument(config, argument, {"expansion": "model.expansion", "dtype": "model.dtype"})
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipes") / "small.py"
    path.write_text(RECIPE)
    return str(path)


def parse(*arguments: str) -> config.Config:
    """As the train command does it."""
    parser = config.Parser(prog="train.py")
    parser.add_argument("--workdir")
    config.add_arguments(parser)
    return config.from_arguments(parser.parse_args(arguments))


def field(settings: config.Config, name: str) -> Any:
    for part in name.split("."):
        settings = settings[part]
    return settings


def changed(**values: Any) -> config.Config:
    """The defaults with some fields changed; `__` stands for the dot."""
    result = config.default_config()
    for name, value in values.items():
        group, _, last = name.rpartition("__")
        setattr(result[group] if group else result, last, value)
    return result


# Fields


def test_the_defaults_are_a_configuration_without_ignored_settings():
    config.validate(config.default_config())
    config.check_effects(config.default_config())


@pytest.mark.core
def test_help_shows_every_field_with_its_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for name, entry in config.FIELDS.items():
        assert f"--config.{name} " in shown
        assert entry.doc in shown
    assert "(default: 0.0005)" in shown
    assert "(default: (82, 123))" in shown
    assert "(default: true)" in shown
    assert '(default: "")' in shown
    assert "(default: 0)" in shown


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"epochs": 2.0}, "epochs must be a whole number below 2**63, found 2.0"),
        ({"epochs": True}, "epochs must be a whole number below 2**63, found True"),
        ({"seed": 2**32}, "seed must be at least 0 and below 2**32, found 4294967296"),
        ({"batch_size": -1}, "batch_size must be at least 1, found -1"),
        ({"optimizer__lr": 0.0}, "optimizer.lr must be above 0, found 0.0"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr must be a finite number, found nan"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr must be a finite number, found inf"),
        ({"optimizer__momentum": 1.0}, "optimizer.momentum must be at least 0 and below 1"),
        ({"optimizer__weight_decay": -1e-4}, "optimizer.weight_decay must be at least 0"),
        ({"model__expansion": 0}, "model.expansion must be above 0, from 1e-6 to 1e6, found 0"),
        (
            {"model__width": 1.7e308},
            "model.width must be above 0, from 1e-6 to 1e6, found 1.7e+308",
        ),
        ({"data__cutout": 2**15}, "data.cutout must be at least 0 and below 2**15, found 32768"),
        ({"epochs": 2**63}, "epochs must be a whole number below 2**63, found 9223372036854775808"),
        # Python has no text for as many digits.
        ({"epochs": 10**5000}, "epochs must be a whole number below 2**63, found a value of type"),
        ({"schedule__boundaries": (10**5000,)}, "schedule.boundaries must be a tuple of whole num"),
        ({"model__arch": "resnet" + "8" * 5000}, "model.arch must be a family and at most 4 dig"),
        ({"model__arch": None}, "model.arch must be a text, found None"),
        (
            {"model__weights_of": "layer1"},
            "model.weights_of must be PATTERN:FORM or PATTERN:FORM/B",
        ),
        (
            {"model__weights_first_last": "int:8"},
            "model.weights_first_last must be a form of weigh",
        ),
        ({"model__reduction_mode": "blok"}, "unknown model.reduction_mode 'blok'; did you mean"),
        ({"model__dtype": "bfloat"}, "unknown model.dtype 'bfloat'; did you mean 'bfloat16'?"),
        ({"schedule__boundaries": (8, 5)}, "schedule.boundaries must be increasing numbers"),
        ({"schedule__boundaries": (0, 5)}, "schedule.boundaries must be increasing numbers"),
        ({"schedule__boundaries": (1.5,)}, "schedule.boundaries must be a tuple of whole numbers"),
        ({"schedule__name": "steps"}, "unknown schedule.name 'steps'; did you mean 'step'?"),
        ({"data__flip": 1}, "data.flip must be true or false, found 1"),
        ({"data__pad_mode": "reflekt"}, "unknown data.pad_mode 'reflekt'; did you mean 'reflect'?"),
        ({"data__mean": (0.5, 0.5), "data__std": (1.0, 1.0)}, "data.mean must be () or three"),
        ({"data__mean": (0.5, 0.5, 0.5)}, "data.mean and data.std must be given together"),
        (
            {"data__mean": (0.5, 0.5, 0.5), "data__std": (0.2, 0.2, 0.0)},
            "data.std must be () or three numbers above 0",
        ),
        ({"data__sha256": "abc"}, 'data.sha256 must be empty ("") or 64 hexadecimal digits'),
        ({"optimiser": {"lr": 0.1}}, "unknown field 'optimiser'; did you mean 'optimizer."),
        ({"optimizer__lrr": 0.1}, "unknown field 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"lr": 0.1}, "unknown field 'lr'; did you mean 'optimizer.lr'?"),
        ({"model": "resnet20"}, "model must hold model.arch, model.expansion"),
        (
            {"log": {}},
            "log must hold log.every_seconds, log.tensorboard, log.every_steps, log.tracker, "
            "log.project, found {}",
        ),
        ({"epochs": {}}, "epochs must be a whole number below 2**63, found {}"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_what_was_expected(values, sentence):
    with pytest.raises(UserError) as error:
        config.validate(changed(**values))
    assert str(error.value).startswith(sentence)


def test_reading_an_unknown_field_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown field 'model\.arc'; did you mean 'model\.arch'"):
        _ = config.default_config().model.arc
    assert not hasattr(config.default_config(), "lr")


def test_settings_read_and_change_as_mappings_too():
    model = config.default_config().model
    assert {**model, "arch": "resnet8"}["arch"] == "resnet8"
    assert dict(model) == {name: model[name] for name in model}
    model.update({"arch": "wrn8"}, width=2)
    assert (model.arch, model["width"], "depth" in model) == ("wrn8", 2.0, False)


# Settings without an effect


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("data.size=32", "data.size=32 would be ignored: it applies to image files"),
        ("data.resize=32", "data.resize=32 would be ignored: it applies to image files"),
        ("data.workers=2", "data.workers=2 would be ignored: it applies to image files"),
        (
            "data.on_corrupt=skip",
            "data.on_corrupt=skip would be ignored: it applies to image files",
        ),
        (
            "data.name=imagenet2012 data.exif=false",
            "data.exif=false would be ignored: it applies to data.source=folder or hf; leave it at "
            "true",
        ),
        (
            "data.source=folder data.size=65 data.pad=2",
            "data.pad=2 would be ignored: it applies to images held in memory",
        ),
        (
            "data.name=imagenet2012 data.pad_mode=reflect",
            "data.pad_mode=reflect would be ignored: it applies to images held in memory",
        ),
        (
            "data.name=digits data.url=x",
            "data.url=x would be ignored: it applies to data.name=cifar",
        ),
        (
            f"data.source=folder data.sha256={'0' * 64}",
            f"data.sha256={'0' * 64} would be ignored: it applies to data.name=cifar10 and",
        ),
        (
            "model.quantize_first_last=true",
            "model.quantize_first_last=true would be ignored: it applies to low-bit weights of "
            "this package's networks; leave it at false",
        ),
        (
            "optimizer.regularizer=1e-4",
            "optimizer.regularizer=0.0001 would be ignored: it applies to model.weights=s3; leave "
            "it at 1e-05",
        ),
        (
            "model.weights=sign optimizer.regularizer=0",
            "optimizer.regularizer=0.0 would be ignored: it applies to model.weights=s3",
        ),
        (
            "schedule.lr_min=1e-3",
            "schedule.lr_min=0.001 would be ignored: it applies to schedule.name=cosine, sgdr, "
            "linear and wsd; leave it at 0.0",
        ),
        (
            "schedule.name=cosine schedule.boundaries=(5,8)",
            "schedule.boundaries=(5, 8) would be ignored: it applies to schedule.name=step and",
        ),
        (
            "schedule.name=sgdr schedule.factor=0.5",
            "schedule.factor=0.5 would be ignored: it applies to schedule.name=step; leave it",
        ),
        (
            "data.source=folder data.size=64 data.resize=63",
            "data.resize must be at least data.size, 64, or 0; found 63",
        ),
        (
            "schedule.name=cosine schedule.lr_min=0.5 optimizer.lr=0.1",
            "schedule.lr_min must be at most optimizer.lr, 0.1; found 0.5",
        ),
        ("data.name=digits data.dir=x", "data.dir=x would be ignored: it applies to data that is"),
        ("schedule.warmup=1", "schedule.warmup=1 would be ignored: the rate changes by epoch"),
        (
            "parallel.batch_norm=per_device loss.class_weights=balanced",
            "loss.class_weights=balanced takes the mean over the whole batch",
        ),
        (
            "data.balance=true loss.class_weights=balanced",
            "loss.class_weights=balanced and data.balance=true each let classes count the same",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_with_what_it_applies_to(
    recipe, given, sentence
):
    with pytest.raises(UserError) as error:
        parse("--config", recipe, *(f"--config.{word}" for word in given.split()))
    assert str(error.value).startswith(f"{recipe}: {sentence}")


@pytest.mark.parametrize(
    "given",
    [
        "data.source=folder data.size=64 data.resize=64 data.workers=0 data.on_corrupt=skip",
        "data.name=imagenet2012 data.size=128",
        "model.weights=s3 optimizer.regularizer=0 model.quantize_first_last=true",
        "model.weights_of=layer1.*:s3/2 optimizer.regularizer=0 model.weights_first_last=int/8",
        "model.weights_first_last=s3/2 optimizer.regularizer=0",
        "schedule.warmup=1 schedule.by=step",
        "schedule.warmup=1.5 parallel.batch_norm=per_device",
        "schedule.warmup=0.3 schedule.name=onecycle",
        "schedule.name=sgdr schedule.boundaries=(5,8) schedule.lr_min=0.001",
        "schedule.name=cosine schedule.lr_min=0.001",
        "schedule.factor=0.5 data.pad=2 data.url=x",
        "data.source=folder data.workers=-1",
        "data.name=digits data.source=folder data.dir=x",
    ],
)
def test_a_setting_where_it_applies_is_taken(recipe, given):
    parse("--config", recipe, *(f"--config.{word}" for word in given.split()))


def test_a_recipes_own_settings_may_lose_their_effect_by_an_override(tmp_path):
    path = tmp_path / "padded.py"
    path.write_text(RECIPE.replace("config.epochs = 7", "config.data.pad = 2"))
    files = ["--config", str(path), "--config.data.source=folder", "--config.data.size=128"]
    assert parse(*files).data.pad == 2
    with pytest.raises(UserError, match=r"data\.pad=3 would be ignored"):
        parse(*files, "--config.data.pad=3")


def test_a_recipe_is_refused_for_what_it_sets_without_effect_unless_an_override_gives_it_one(
    tmp_path,
):
    path = tmp_path / "large.py"
    path.write_text(RECIPE.replace("config.epochs = 7", "config.data.size = 64"))
    with pytest.raises(UserError, match=r"large\.py: data\.size=64 would be ignored"):
        parse("--config", str(path))
    assert parse("--config", str(path), "--config.data.source=folder").data.size == 64


def test_a_saved_configuration_with_ignored_settings_still_loads_and_resumes():
    saved = changed(data__size=32, optimizer__regularizer=1e-3, schedule__lr_min=0.1)
    assert config.from_json(config.to_json(saved)) == saved
    assert config.differences(saved, config.default_config()) == []


def test_a_setting_counts_as_a_difference_where_it_applies_to_one_of_two():
    before = changed(schedule__name="cosine", schedule__lr_min=0.1)
    assert config.differences(before, config.default_config()) == [
        "schedule.lr_min: 0.1 -> 0.0",
        "schedule.name: 'cosine' -> 'step'",
    ]


# Command line


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("optimizer.lr", "0.05", 0.05),
        ("optimizer.lr", "5e-2", 0.05),
        ("optimizer.lr", "1", 1.0),
        ("model.arch", "resnet20", "resnet20"),
        ("model.reduction_mode", "block", "block"),
        ("data.dir", "", ""),
        ("data.dir", "a = b, c", "a = b, c"),
        ("data.flip", "false", False),
        ("data.flip", "True", True),
        ("schedule.boundaries", "(5,8)", (5, 8)),
        ("schedule.boundaries", "5, 8", (5, 8)),
        ("schedule.boundaries", "5", (5,)),
        ("schedule.boundaries", "(5,)", (5,)),
        ("schedule.boundaries", "()", ()),
        ("schedule.boundaries", "", ()),
    ],
)
@pytest.mark.parametrize("one_word", [True, False])
def test_an_override_arrives_with_the_type_of_its_field(recipe, name, text, value, one_word):
    words = [f"--config.{name}={text}"] if one_word else [f"--config.{name}", text]
    found = field(parse("--config", recipe, *words), name)
    assert found == value
    assert type(found) is type(value)


def test_a_whole_number_is_accepted_for_each_member_of_a_tuple_of_numbers(recipe):
    settings_ = parse(f"--config={recipe}", "--config.data.mean=0,0.5,1", "--config.data.std=1,1,1")
    assert settings_.data.mean == (0.0, 0.5, 1.0)
    assert [type(member) for member in settings_.data.std] == [float] * 3


def test_the_command_line_wins_over_the_recipe_and_its_last_word_over_the_others(recipe):
    assert parse("--config", recipe).epochs == 7
    assert parse("--config.epochs=9", "--config", recipe, "--config.epochs", "8").epochs == 8


def test_the_text_after_the_colon_reaches_the_recipe(recipe):
    model = parse(f"--config={recipe}:expansion=3,dtype=bfloat16").model
    assert (model.expansion, model.dtype) == (3.0, "bfloat16")


def test_a_value_after_the_colon_may_have_commas():
    made = config.default_config()
    fields = {name: f"model.{name}" for name in ("expansion", "weights_of")}
    text = "weights_of=layer1.*:float,layer3.*:s3/2,expansion=3"
    config.apply_argument(made, text, fields)
    assert made.model.weights_of == "layer1.*:float,layer3.*:s3/2"
    assert made.model.expansion == 3


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("expantion=3", "unknown argument 'expantion'; did you mean 'expansion'?"),
        ("expansion", "expected name=value after the colon, found 'expansion'"),
        ("expansion=3,", "expected name=value after the colon, found ''"),
        ("expansion=wide", "model.expansion must be a finite number, found 'wide'"),
        ("expansion=-1", "model.expansion must be above 0, from 1e-6 to 1e6, found -1.0"),
        ("dtype=float23", "unknown model.dtype 'float23'; did you mean 'float32'?"),
    ],
)
def test_a_wrong_argument_after_the_colon_is_told_with_the_recipe(recipe, argument, sentence):
    with pytest.raises(UserError) as error:
        parse(f"--config={recipe}:{argument}")
    assert str(error.value) == f"{recipe}:{argument}: {sentence}"


@pytest.mark.core
@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--config.optimizer.lrr", "--config.optimizer.lr"),
        ("--config.optimiser.lr", "--config.optimizer.lr"),
        ("--config.lr", "--config.optimizer.lr"),
        ("--config.lrr", "--config.optimizer.lr"),
        ("--lr", "--config.optimizer.lr"),
        ("--epochs", "--config.epochs"),
        ("--config.epoch", "--config.epochs"),
        ("--config.model", "--config.model.arch"),
        ("--config.optimizer.lr.x", "--config.optimizer.lr"),
        ("--confg", "--config"),
        ("-config", "--config"),
        ("--workdirr", "--workdir"),
        ("--work", "--workdir"),
    ],
)
@pytest.mark.parametrize("words", ["{}=3", "{} 3"])
def test_an_unknown_option_is_answered_with_the_nearest_one(recipe, option, nearest, words):
    with pytest.raises(UserError) as error:
        parse("--config", recipe, *words.format(option).split())
    assert str(error.value) == f"unknown option {option!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config is missing: name a recipe, such as configs/quickstart.py"),
        (["--config"], "argument --config: expected one argument"),
        (["configs/quickstart.py"], "unexpected argument 'configs/quickstart.py'"),
        (["--qqqq"], "unknown option '--qqqq'; --help lists them all"),
        (["--config.epochs"], "argument --config.epochs: expected one argument"),
        (["--config=--"], "argument --config: expected a value, found --"),
        (["--config.epochs=--"], "argument --config.epochs: expected a value, found --"),
    ],
)
def test_an_incomplete_command_line_is_told_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("epochs", "many", "epochs must be a whole number below 2**63, found 'many'"),
        ("epochs", "2.5", "epochs must be a whole number below 2**63, found '2.5'"),
        ("epochs", "0", "epochs must be at least 1, found 0"),
        ("optimizer.lr", "fast", "optimizer.lr must be a finite number, found 'fast'"),
        ("optimizer.lr", "1e999", "optimizer.lr must be a finite number, found inf"),
        ("data.flip", "maybe", "data.flip must be true or false, found 'maybe'"),
        ("data.flip", "1", "data.flip must be true or false, found '1'"),
        (
            "schedule.boundaries",
            "(5,x)",
            "schedule.boundaries must be a tuple of whole numbers, such as (5, 8), found '(5,x)'",
        ),
        (
            "schedule.boundaries",
            "(5",
            "schedule.boundaries must be a tuple of whole numbers, such as (5, 8), found '(5'",
        ),
        ("data.mean", "a", "data.mean must be a tuple of numbers, such as (5, 8), found 'a'"),
        ("data.pad_mode", "refelct", "unknown data.pad_mode 'refelct'; did you mean 'reflect'?"),
    ],
)
def test_a_wrong_override_is_told_with_its_field_and_what_was_expected(
    recipe, name, text, sentence
):
    with pytest.raises(UserError) as error:
        parse("--config", recipe, f"--config.{name}={text}")
    assert str(error.value) == sentence


def test_a_loaded_recipe_takes_no_new_field_by_accident(recipe):
    with pytest.raises(AttributeError):
        parse("--config", recipe).learning_rate = 0.1


def test_a_name_that_no_recipe_argument_may_set_is_refused_by_the_library_too():
    with pytest.raises(UserError, match=r"unknown field 'model.archh'; did you mean 'model.arch'"):
        config.override(config.default_config(), "model.archh", "resnet20")


# Recipe files


@pytest.mark.core
def test_a_mistyped_path_is_answered_with_the_nearest_file(tmp_path):
    for name in ("resnet20_c10.py", "shiftresnet20_c10.py", "notes.txt"):
        (tmp_path / name).write_text("")
    wrong = str(tmp_path / "shiftresnt20_c10")
    with pytest.raises(UserError) as error:
        parse("--config", wrong)
    right = str(tmp_path / "shiftresnet20_c10.py")
    assert str(error.value) == f"unknown recipe {wrong!r}; did you mean {right!r}?"


def test_a_path_in_the_wrong_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="its folder cannot be read"):
        config.load(str(tmp_path / "nowhere" / "small.py"))
    with pytest.raises(UserError, match=r"its folder holds no \.py file"):
        config.load(str(tmp_path / "small.py"))


@pytest.mark.core
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise RuntimeError('two\\nlines')", "line 5: RuntimeError: two lines"),
        ("config.epochs = 'x'", "epochs must be a whole number below 2**63, found 'x'"),
        ("config.optimizer.lrr = 1", "unknown field 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("config.optimizer.lr = 0", "optimizer.lr must be above 0, found 0"),
        ("del config.model", "unknown field 'model'; did you mean"),
        ("return None", "get_config must return a Config, found NoneType"),
        ("import nothing_of_that_name", "line 5: ModuleNotFoundError: No module named"),
        ("config = (", "SyntaxError: "),
        ("raise SystemExit('as it\\nlikes')", "line 5: SystemExit: as it likes"),
        ("import sys; sys.exit(0)", "line 5: SystemExit: 0"),
        ("raise type('E', (Exception,), {'__str__': id})", "line 5: E: a value of type E"),
        ("config.optimizer.lr = 10**5000", "optimizer.lr must be a finite number, found a"),
        ("import sys; sys.path.clear(); return 3", "get_config must return a Config, found int"),
        ("config.model = config", "model must hold model.arch, model.expansion"),
        ("return {'epochs': '3'}", "epochs must be a whole number below 2**63, found '3'"),
        ("return {'model': {'arc': 'x'}}", "unknown field 'model.arc'; did you mean 'model.arch'"),
        ("config.model.arch = [type('B', (), {'__repr__': id})]", "model.arch must be a"),
    ],
)
def test_a_broken_recipe_is_named_with_its_line_and_its_error(tmp_path, body, sentence):
    path = tmp_path / "broken.py"
    path.write_text(
        "from shiftnet.config import default_config\n\n"
        f"def get_config():\n    config = default_config()\n    {body}\n    return config\n"
    )
    with pytest.raises(UserError) as error:
        config.load(str(path))
    assert str(error.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(error.value)


def test_a_recipe_that_was_changed_within_a_second_is_read_anew(tmp_path):
    path = tmp_path / "sweep.py"
    for rate in ("0.1", "0.2"):
        path.write_text(RECIPE.replace("config.epochs = 7", f"config.optimizer.lr = {rate}"))
        os.utime(path, (1e9, 1e9))
        assert config.load(str(path)).optimizer.lr == float(rate)
    assert os.listdir(tmp_path) == ["sweep.py"]


def test_a_file_that_is_no_recipe_is_told(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"other\.py: the file defines no function get_config"):
        config.load(str(path))


def test_a_recipe_imports_its_neighbours_wherever_it_is_called_from(tmp_path, monkeypatch):
    (tmp_path / "my_neighbour_recipe.py").write_text("EPOCHS = 11\n")
    (tmp_path / "recipe.py").write_text(
        "from my_neighbour_recipe import EPOCHS\n"
        "from shiftnet.config import default_config\n\n"
        "def get_config():\n    config = default_config()\n"
        "    config.epochs = EPOCHS\n    return config\n"
    )
    before = list(sys.path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.load(str(tmp_path / "recipe.py")).epochs == 11
    assert config.load(str(Path("..") / "recipe.py")).epochs == 11
    assert sys.path == before
    # One of the same name is that of the other recipe.
    (tmp_path / "elsewhere" / "my_neighbour_recipe.py").write_text("EPOCHS = 12\n")
    shutil.copy(tmp_path / "recipe.py", tmp_path / "elsewhere")
    assert config.load("recipe.py").epochs == 12


@pytest.mark.parametrize("kind", ["dict", "Items"])
def test_a_recipe_may_return_a_mapping_and_gets_the_types_of_the_fields(tmp_path, kind):
    """`Items` is as ml_collections.ConfigDict, which recipes returned before."""
    path = tmp_path / "own.py"
    path.write_text(
        "from shiftnet.config import default_config\n\n"
        "class Items:\n"
        "    def __init__(self, values):\n        self.values = values\n"
        "    def items(self):\n"
        "        return [(k, Items(v) if isinstance(v, dict) else v)\n"
        "                for k, v in self.values.items()]\n\n"
        "def get_config():\n"
        "    values = default_config().to_dict()\n"
        "    values['optimizer']['lr'] = 1\n"
        f"    return {kind}(values)\n"
    )
    settings_ = config.load(str(path))
    assert type(settings_.optimizer.lr) is float
    assert config.differences(changed(optimizer__lr=1.0), settings_) == []


def test_a_recipe_may_hold_a_dataclass_with_postponed_annotations(tmp_path):
    path = tmp_path / "modern.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from shiftnet.config import Config, default_config\n\n"
        "@dataclasses.dataclass\nclass Mine:\n    epochs: int = 5\n\n"
        "def get_config() -> Config:\n"
        "    config = default_config()\n"
        "    config.epochs = Mine().epochs\n"
        "    return config\n"
    )
    before = set(sys.modules)
    assert config.load(str(path)).epochs == 5
    assert set(sys.modules) == before


@pytest.mark.parametrize("argument", ["", ":expansion=3"])
def test_the_path_of_a_recipe_may_have_colons(tmp_path, monkeypatch, argument):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "dig.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    expected = 3.0 if argument else 1.0
    assert config.load(f"a:b/dig.py{argument}").model.expansion == expected
    with pytest.raises(UserError, match=r"unknown recipe 'a:b/dog.py'; did you mean 'a:b/dig.py'"):
        config.load(f"a:b/dog.py{argument}")


def test_a_recipe_in_the_home_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(RECIPE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.load("~/small.py:expansion=3").model.expansion == 3


def test_a_url_is_no_recipe():
    with pytest.raises(UserError, match="--config must be a local path, found the URL"):
        config.load("https://example.org/recipe.py")


@pytest.fixture
def named(tmp_path) -> Path:
    """A folder whose names.toml gives small.py two more names."""
    (tmp_path / "small.py").write_text(RECIPE)
    (tmp_path / "names.toml").write_text(
        'wide = "small.py:expansion=9"\nplain = "small.py"\ngone = "gone_family.py:x=1"\n'
    )
    return tmp_path


def test_a_name_stands_for_a_file_with_arguments_and_takes_more(named):
    assert config.load(f"{named}/wide.py").model.expansion == 9
    assert config.load(f"{named}/plain.py").model.expansion == 1
    model = config.load(f"{named}/wide.py:dtype=bfloat16").model
    assert (model.expansion, model.dtype) == (9, "bfloat16")
    assert config.load(f"{named}/wide.py:expansion=2").model.expansion == 2


def test_a_file_comes_before_a_name(named):
    (named / "wide.py").write_text(RECIPE)
    assert config.load(f"{named}/wide.py").model.expansion == 1


def test_a_mistyped_name_is_answered_with_the_nearest(named):
    with pytest.raises(UserError) as error:
        config.load(f"{named}/wibe.py:expansion=3")
    wrong, right = str(named / "wibe.py"), str(named / "wide.py")
    assert str(error.value) == f"unknown recipe {wrong!r}; did you mean {right!r}?"
    with pytest.raises(UserError, match=r"gone_family\.py"):
        config.load(f"{named}/gone.py")


@pytest.mark.parametrize("text", ["wide = ", "\xff"])
def test_damaged_names_are_told(named, text):
    (named / "names.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"names\.toml"):
        config.load(f"{named}/wide.py")


# JSON and differences


@pytest.mark.core
def test_a_checkpoint_gives_back_the_configuration_it_was_given(recipe):
    settings_ = parse(
        "--config", recipe, "--config.data.mean=0.1,0.2,1", "--config.data.std=0.1,0.2,1"
    )
    again = config.from_json(config.to_json(settings_))
    assert again == settings_
    assert type(again.schedule.boundaries) is tuple
    assert type(again.data.mean) is tuple
    assert repr(again) == repr(settings_)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "null", "[" * 100_000, '{"epochs": 1' + "0" * 5000 + "}"),
        '{"a":' * 500 + "1" + "}" * 500,
    ],
)
def test_a_damaged_configuration_in_a_checkpoint_is_refused_in_a_sentence(text):
    with pytest.raises(UserError):
        config.from_json(text)


@pytest.mark.parametrize("name", list(config.FIELDS))
def test_what_was_saved_before_a_field_existed_has_its_default(name):
    saved = changed(epochs=3, model__arch="resnet20")
    older = saved.to_dict()
    group, _, last = name.rpartition(".")
    del (older[group] if group else older)[last]
    again = config.from_json(json.dumps(older))
    changes = config.differences(saved, again)
    assert field(again, name) == config.FIELDS[name].default
    assert all(change.startswith(f"{name}: ") for change in changes)


def test_a_wrong_value_in_a_checkpoint_is_named():
    values = json.loads(config.to_json(config.default_config()))
    values["optimizer"]["lr"] = 10**4000
    with pytest.raises(UserError, match=r"optimizer\.lr must be a finite number"):
        config.from_json(json.dumps(values))


def test_changed_fields_are_listed_with_both_values():
    old = config.default_config()
    new = changed(optimizer__lr=0.05, schedule__boundaries=(5, 8))
    assert config.differences(old, old) == []
    assert config.differences(old, new) == [
        "optimizer.lr: 0.1 -> 0.05",
        "schedule.boundaries: (82, 123) -> (5, 8)",
    ]
    assert config.differences(old, new, ignore=("schedule.*",)) == ["optimizer.lr: 0.1 -> 0.05"]


def test_a_longer_run_that_is_watched_otherwise_may_resume():
    old = config.default_config()
    new = changed(
        epochs=200,
        log__every_seconds=1.0,
        log__tensorboard=False,
        eval__batch_size=10,
        eval__every_epochs=2,
        checkpoint__every_epochs=5,
        data__dir="elsewhere",
    )
    assert config.differences(old, new, ignore=config.RESUMABLE) == []


def test_no_other_field_may_change_when_a_run_resumes():
    others = {int: 77, float: 0.77, str: "other", tuple: (1, 2, 77)}
    free = {"epochs", "parallel.fsdp", "data.dir", "data.workers", "data.on_corrupt"}
    free |= {"distill.teacher"}  # it may have moved; that it is the same one, its arrays tell
    low_bit = {"model__weights": "s3"}
    files, sgdr = {"data__source": "folder"}, {"schedule__name": "sgdr"}
    wsd, muon, adamw = (
        {"schedule__name": "wsd"},
        {"optimizer__name": "muon"},
        {"optimizer__name": "adamw"},
    )
    averaged, held_out = {"ema__decay": 0.9}, {"data__validation": 5}
    distilled = {"distill__teacher": "net"}
    sparse = {"model__shift": "sparse"}
    kinds = ({}, low_bit, files, sgdr, wsd, muon, adamw, averaged, held_out, distilled, sparse)
    for name, entry in config.FIELDS.items():
        if name in free or name.split(".")[0] in ("log", "eval", "checkpoint"):
            continue
        other = others.get(entry.kind, entry.default is False)
        if entry.choices:
            other = next(choice for choice in entry.choices if choice != entry.default)
        other = {
            "data.sha256": "0" * 64,
            "model.weights_of": "linear:int/8",
            "data.crop_scale": (0.5, 0.77),
            "data.crop_ratio": (1.0, 77.0),
        }.get(name, other)
        where = next(old for old in kinds if entry.applies(changed(**old)))
        new = changed(**where, **{name.replace(".", "__"): other})
        before = changed(**where)
        assert field(new, name) != field(before, name)
        expected = f"{name}: {field(before, name)!r} -> {field(new, name)!r}"
        assert expected in config.differences(before, new, ignore=config.RESUMABLE)


# Anything at all

WORDS = st.one_of(
    st.text(),
    st.sampled_from(["--config", "--workdir", "--help", "--", "-", "=", "(1,2)", "true", "-1e-3"]),
    st.builds("--config.{}".format, st.sampled_from(sorted(config.FIELDS))),
    st.builds("--config.{}={}".format, st.sampled_from(sorted(config.FIELDS)), st.text()),
    st.builds("--{}".format, st.text()),
)


@pytest.mark.core
@settings(max_examples=100, deadline=None)  # `make fuzz` tries 20,000
@given(st.booleans(), st.lists(WORDS, max_size=5))
def test_no_command_line_ends_in_a_traceback(recipe, with_recipe, arguments):
    with (
        contextlib.suppress(UserError, SystemExit),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        config.validate(parse(*(["--config", recipe] if with_recipe else []), *arguments))


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_no_argument_after_the_colon_ends_in_a_traceback(recipe, argument):
    with contextlib.suppress(UserError):
        config.validate(config.load(f"{recipe}:{argument}"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)  # `make fuzz` tries 20,000
@given(st.sampled_from([*config.FIELDS, "model", "data", "other", "model.other", ""]), VALUES)
def test_no_value_in_a_checkpoint_ends_in_a_traceback(name, value):
    values = json.loads(config.to_json(config.default_config()))
    group, _, last = name.rpartition(".")
    (values[group] if group else values)[last] = value
    with contextlib.suppress(UserError):
        config.validate(config.from_json(json.dumps(values)))
