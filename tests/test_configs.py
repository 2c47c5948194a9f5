"""The recipes in configs/: each loads, and the results' table has every cell of the original's."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from shiftnet import config, models, results, zoo
from shiftnet.configs import shift_family
from shiftnet.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FAMILIES = ("shiftresnet", "resnet", "depthwiseresnet", "mobileresnet", "shuffleresnet")
TABLE_RECIPES = [
    f"{family}{depth}_{data}"
    for family in FAMILIES
    for depth in (20, 56, 110)
    for data in ("c10", "c100")
] + [f"shiftresnet{depth}_{data}" for depth in (32, 44) for data in ("c10", "c100")]
LOW_BIT_RECIPES = [
    *(f"wrn20_10{bits}_{data}" for bits in ("", "_1bit") for data in ("c10", "c100")),
    *(f"s3_resnet20_{data}" for data in ("c10", "c100")),
]
IMAGENET_RECIPES = [
    *(f"{weights}resnet{depth}_imagenet" for weights in ("", "s3_") for depth in (18, 50)),
    "denseshift_resnet18_imagenet",
    "shiftnet_a_imagenet",
    "shiftnet_b_imagenet",
    "shiftnet_c_imagenet",
]
RECIPES = ["quickstart", *TABLE_RECIPES, *LOW_BIT_RECIPES, *IMAGENET_RECIPES]
FAMILY_FILES = [f"{family}_family" for family in ("shift", "wrn", "s3", "shiftnet")]
# The results' table, by name of its rows.
ROWS = {row.name: row for table in results.tables(ROOT / "results") for row in table.rows}

# Columns that stood on earlier versions of the page, CIFAR-100: depth, column, and per cent for 1c,
# 3c, 6c and 9c.
EARLIER = {
    (20, "net"): (49.58, 58.16, 63.22, 65.31),
    (56, "net"): (56.62, 64.49, 67.45, 68.63),
    (110, "net"): (60.44, 66.61, 68.87, 70.14),
    (20, "mobile"): (57.25, 66.31, 68.91, 65.77),
    (56, "mobile"): (67.71, 70.23, 66.86, None),
    (110, "mobile"): (68.33, 66.83, None, None),
    (20, "shuffle"): (58.18, 67.05, None, None),
    **{(depth, "shuffle"): (None,) * 4 for depth in (56, 110)},
    **{(depth, "noskip"): (None,) * 4 for depth in (20, 56, 110)},
}
# The rows of the page, as they stand there. CIFAR-100: model, e, accuracy of the shift, conv and
# depthwise net, parameters in millions, reduction (in parentheses the one used for the conv net
# where it differs), r of the depthwise net, r of the shuffle net.
CIFAR100 = """\
ResNet20 1c 55.05% 50.23% 61.32% 0.03 7.8 (7.2) 1.12 0.38
ResNet20 3c 65.83% 60.72% 64.51% 0.10 2.9 (2.8) 0.38 0.13
ResNet20 6c 69.73% 65.59% 65.38% 0.19 1.5 0.19 0.065
ResNet20 9c 70.77% 68.30% 65.59% 0.28 .98 0.125 0.04
ResNet20 -- -- 66.25% -- 0.27 1.0 -- --
ResNet56 1c 63.20% 58.70% 65.30% 0.10 8.4 (7.6) 1.12 0.38
ResNet56 3c 69.77% 66.89% 66.49% 0.29 2.9 0.37 0.128
ResNet56 6c 72.33% 70.49% 67.46% 0.58 1.5 0.19 0.065
ResNet56 9c 73.43% 71.57% 67.75% 0.87 0.98 0.124 0.04
ResNet56 -- -- 69.27% -- 0.86 1.0 -- --
ResNet110 1c 68.01% 65.79% 65.80% 0.20 8.5 (7.8) 1.1 0.37
ResNet110 3c 72.10% 70.22% 67.22% 0.59 2.9 0.37 0.125
ResNet110 6c 73.17% 72.21% 68.11% 1.18 1.5 0.19 0.065
ResNet110 9c 73.71% 72.67% 68.39% 1.76 0.98 0.123 0.04
ResNet110 -- -- 72.11% -- 1.73 1.0 -- --
"""
# CIFAR-10: model, e, accuracy of the shift and the conv net, parameters, reduction.
CIFAR10 = """\
ResNet20 c 85.78% 84.77% 0.03 7.8 (7.2)
ResNet20 3c 89.56% 88.81% 0.10 2.9 (2.8)
ResNet20 6c 91.07% 91.30% 0.19 1.5
ResNet20 9c 91.79 91.96% 0.28 .98
ResNet20 original - 91.35% 0.27 1.0
ResNet56 c 89.69% 88.32% 0.10 8.4 (7.6)
ResNet56 3c 92.48% 91.20% 0.29 2.9
ResNet56 6c 93.49% 93.01% 0.58 1.5
ResNet56 9c 93.17% 93.74% 0.87 0.98
ResNet56 original - 92.01% 0.86 1.0
ResNet110 c 90.67% 89.79% 0.20 8.5 (7.8)
ResNet110 3c 92.42% 93.18% 0.59 2.9
ResNet110 6c 93.03% 93.40% 1.18 1.5
ResNet110 9c 93.36% 94.09% 1.76 0.98 (0.95)
ResNet110 original - 92.46% 1.73 1.0
"""


class Cell(NamedTuple):
    """One accuracy of the page and the network it belongs to."""

    arch: str
    data: str  # "c10" or "c100"
    row: str  # "3c", "original", …
    accuracy: float
    expansion: float
    reduction: float
    mode: str

    @property
    def name(self) -> str:
        """Its row in the results' table."""
        size = {"c": "1c_", "--": "", "original": ""}.get(self.row, f"{self.row}_")
        return f"{self.arch}_{size}{self.data}"


def cells() -> list[Cell]:
    found = []
    for data, rows in (("c100", CIFAR100), ("c10", CIFAR10)):
        for line in rows.splitlines():
            model, row, *rest = re.sub(r"[%()]", "", line).split()
            depth = model.removeprefix("ResNet")
            columns = 3 if data == "c100" else 2
            accuracies, rest = rest[:columns], rest[columns + 1 :]  # after the parameters
            if row in ("--", "original"):
                plain = float(accuracies[1])
                found.append(Cell(f"resnet{depth}", data, row, plain, 1.0, 1.0, "net"))
                continue
            shift, conv, *depthwise = map(float, accuracies)
            expansion = float(row.removesuffix("c") or 1)
            # In parentheses or not; before r of the depthwise and of the shuffle net.
            reduction = float((rest[:-2] if data == "c100" else rest)[-1])
            found.append(Cell(f"shiftresnet{depth}", data, row, shift, expansion, 1.0, "net"))
            found.append(Cell(f"resnet{depth}", data, row, conv, 1.0, reduction, "block"))
            for accuracy in depthwise:
                cell = (accuracy, 1.0, float(rest[-2]), "block")
                found.append(Cell(f"depthwiseresnet{depth}", data, row, *cell))
    return found


def load(recipe: str, argument: str = ""):
    return config.load(f"{ROOT / 'configs' / recipe}.py:{argument}")


@pytest.mark.core
def test_every_recipe_is_tested_here():
    folder = ROOT / "configs"
    names = set(tomllib.loads((folder / config.NAMES).read_text()))
    files = {path.stem for path in folder.glob("*.py")}
    assert files == {"quickstart", *FAMILY_FILES}
    assert names == {*RECIPES} - {"quickstart"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_from_any_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(recipe)
    config.validate(settings)
    models.check(settings.model)


@pytest.mark.parametrize("file", ["quickstart", *FAMILY_FILES])
def test_every_command_in_a_docstring_works(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    docstring = runpy.run_path(f"configs/{file}.py")["__doc__"]
    commands = re.findall(r"^    python train\.py --config (\S+)", docstring, re.M)
    assert commands
    for recipe in commands:
        config.load(recipe)


@pytest.mark.parametrize("recipe", TABLE_RECIPES)
def test_a_recipe_of_the_tables_is_the_originals_but_for_network_and_data(recipe):
    default = config.default_config()
    assert config.differences(default, load(recipe), ignore=("model.*", "data.name")) == []
    assert load(recipe).model.weights == "float"
    arch, data = recipe.split("_")
    assert load(recipe).model.arch == arch
    assert load(recipe).data.name == {"c10": "cifar10", "c100": "cifar100"}[data]


def test_the_defaults_are_the_originals_recipe():
    settings = config.default_config()
    assert (settings.epochs, settings.batch_size) == (164, 128)
    optimizer = settings.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert (settings.schedule.boundaries, settings.schedule.factor) == ((82, 123), 0.1)
    assert (settings.data.pad, settings.data.pad_mode, settings.data.flip) == (4, "zero", True)


def test_the_page_has_66_cells_here():
    assert len(cells()) == len({cell.name for cell in cells()}) == 39 + 27


@pytest.mark.core
@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_every_cell_of_the_page_is_a_row_that_can_be_trained(cell, monkeypatch):
    monkeypatch.chdir(ROOT)
    row = ROWS[cell.name]
    assert row.reported == cell.accuracy
    recipe = config.load(row.recipe)
    assert (recipe.model.arch, recipe.model.expansion) == (cell.arch, cell.expansion)
    assert (recipe.model.reduction, recipe.model.reduction_mode) == (cell.reduction, cell.mode)
    assert recipe.data.name == {"c10": "cifar10", "c100": "cifar100"}[cell.data]


def earlier() -> dict[str, tuple]:
    """Name, accuracy, architecture, reduction, its mode and skip of each row of `EARLIER`.

    The reductions are in the last two columns of today's page, for shuffle and for the others.
    """
    found = {}
    for line in CIFAR100.splitlines():
        depth, row, *_, others, shuffle = re.sub(r"ResNet|[%()]", "", line).split()
        if row == "--":
            continue
        for (column_depth, column), accuracies in EARLIER.items():
            if column_depth == int(depth):
                kind = {"net": "", "noskip": "depthwise"}.get(column, column)
                suffix = f"_{column}" if column in ("net", "noskip") else ""
                reduction = {"net": None, "shuffle": float(shuffle)}.get(column, float(others))
                found[f"{kind}resnet{depth}_{row}{suffix}_c100"] = (
                    accuracies["1369".index(row[0])],
                    f"{kind}resnet{depth}",
                    reduction,
                    "net" if column == "net" else "block",
                    column != "noskip",
                )
    return found


@pytest.mark.parametrize("name", earlier())
def test_every_cell_of_an_earlier_page_is_a_row_that_can_be_trained(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    accuracy, arch, reduction, mode, skip = earlier()[name]
    assert ROWS[name].reported == accuracy
    model = config.load(ROWS[name].recipe).model
    assert (model.arch, model.reduction_mode, model.depthwise_skip) == (arch, mode, skip)
    assert reduction in (None, model.reduction)


def test_reductions_that_no_page_gives_bring_the_parameters_closest_to_the_shift_networks():
    def parameters(**fields) -> int:
        model = {**config.default_config().model, **fields}
        network = nnx.eval_shape(lambda: models.build(model, 10, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))

    for row, expansion in (("1c", 1.0), ("9c", 9.0)):
        goal = parameters(arch="shiftresnet20", expansion=expansion)
        chosen = float(re.search("reduction=([0-9.]+)", ROWS[f"resnet20_{row}_net_c100"].recipe)[1])
        tried = [chosen, *((1.1, 1.0, 0.9, 0.85) if row == "9c" else (6.5, 7.0, 7.8, 8.5))]
        gaps = {r: abs(parameters(arch="resnet20", reduction=r) - goal) for r in tried}
        assert min(gaps, key=gaps.get) == chosen


def test_the_table_has_no_row_that_the_page_has_not():
    known = {cell.name for cell in cells()}
    shift = [table for table in results.tables(ROOT / "results") if table.name.startswith("shift-")]
    assert {row.name for table in shift for row in table.rows} == known
    (before,) = [table for table in results.tables(ROOT / "results") if "earlier" in table.name]
    assert {row.name for row in before.rows} == set(earlier())


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_names_a_recipe_that_names_toml_has(row):
    assert row.recipe.startswith("configs/")
    assert Path(row.recipe.partition(":")[0]).stem in RECIPES


@pytest.mark.parametrize(
    ("row", "reported"),
    [
        # arXiv:1802.08530, and for two rows the page of its PyTorch code.
        ("wrn20_10_c100", 80.5),
        ("wrn20_10_1bit_c100", 80.0),
        ("wrn20_10_1bit_cutout_c100", 81.49),
        ("wrn26_10_1bit_c100", 81.06),
        ("wrn20_10_1bit_c10", 95.28),
        ("wrn20_10_1bit_cutout_c10", 96.08),
        ("wrn26_10_1bit_c10", 95.54),
    ],
)
def test_the_wide_networks_are_held_to_what_was_reported(row, reported):
    assert ROWS[row].reported == reported


@pytest.mark.core
@pytest.mark.parametrize("data", ["c10", "c100"])
@pytest.mark.parametrize("form", ["sign", "float"])
def test_the_wide_recipes_are_the_originals(data, form):
    settings = load(f"wrn20_10{'_1bit' if form == 'sign' else ''}_{data}")
    assert (settings.epochs, settings.batch_size) == (256, 128)
    assert (settings.model.arch, settings.model.width) == ("wrn20", 10)
    assert settings.model.weights == form
    assert settings.optimizer.weight_decay == 5e-4
    assert (settings.data.pad, settings.data.pad_mode, settings.data.flip) == (4, "reflect", True)
    np.testing.assert_allclose(np.array(settings.data.mean) * 255, [125.3, 123.0, 113.9])
    np.testing.assert_allclose(np.array(settings.data.std) * 255, [63.0, 62.1, 66.7])


def test_the_wide_recipes_take_depth_width_and_cutout():
    settings = load("wrn20_10_1bit_c100", "depth=26,width=4,cutout=18")
    assert (settings.model.arch, settings.model.width) == ("wrn26", 4)
    assert settings.data.cutout == 18


@pytest.mark.core
@pytest.mark.parametrize("recipe", [r for r in IMAGENET_RECIPES if "resnet" in r])
def test_the_imagenet_recipes_are_s3s(recipe):
    settings = load(recipe)
    form, _, arch = recipe.removesuffix("_imagenet").rpartition("_")
    assert settings.model.arch == f"imagenet_{arch}"
    assert settings.model.weights == (form or "float")
    assert (settings.epochs, settings.batch_size) == (200, 256)
    assert settings.optimizer.weight_decay == 1e-4
    assert settings.optimizer.regularizer == 1e-5
    assert (settings.schedule.name, settings.schedule.lr_min) == ("cosine", 0)
    assert (settings.data.name, settings.data.size, settings.data.flip) == (
        "imagenet2012",
        0,  # the network's 224
        True,
    )


@pytest.mark.parametrize(
    ("recipe", "argument", "form", "bits"),
    [
        ("s3_resnet18_imagenet", "weight_bits=2", "s3", 2),
        ("s3_resnet20_c10", "weights=denseshift,weight_bits=4", "denseshift", 4),
        ("shiftresnet20_c100", "expansion=9,weights=sign", "sign", 0),
        ("shiftnet_a_imagenet", "weights=s3", "s3", 0),
    ],
)
def test_recipes_take_weight_forms(recipe, argument, form, bits):
    model = load(recipe, argument).model
    assert (model.weights, model.weight_bits) == (form, bits)
    models.check(model)


@pytest.mark.parametrize(
    ("argument", "decay"),
    [
        ("recipe=short", 0),
        ("expansion=3,recipe=short", shift_family.SHORT_DECAY),
        ("expansion=3,recipe=distilled", shift_family.SHORT_DECAY),
        ("expansion=3,recipe=finetune", 0),
        ("expansion=3", 0),
    ],
)
def test_wide_networks_decay_more_in_the_short_recipes(argument, decay):
    assert load("shiftresnet20_c100", argument).optimizer.muon_weight_decay == decay


@pytest.mark.parametrize("recipe", [*TABLE_RECIPES, *LOW_BIT_RECIPES])
def test_every_cifar_recipe_has_a_short_one_that_trains_the_same_network(recipe):
    own, short = load(recipe), load(recipe, "recipe=short")
    assert (short.epochs, short.optimizer.name, short.schedule.by) == (30, "muon", "step")
    kept = config.differences(own, short, ignore=("epochs", "batch_size", "optimizer.*"))
    assert all(change.startswith(("schedule.", "data.pad: ")) for change in kept)
    default = load("shiftresnet20_c100", "recipe=short")
    training = ("model.*", "data.name", "data.pad_mode", "data.mean", "data.std")
    assert config.differences(default, short, ignore=training) == []


@pytest.mark.parametrize("recipe", ["shiftresnet20_c10", "resnet20_c100", "wrn20_10_1bit_c100"])
def test_the_distilled_recipe_is_the_short_one_with_a_teacher_of_the_same_data(recipe):
    short, distilled = load(recipe, "recipe=short"), load(recipe, "recipe=distilled")
    assert config.differences(short, distilled, ignore=("distill.teacher",)) == []
    teacher = zoo.get(distilled.distill.teacher)
    assert teacher is not None
    assert teacher.dataset == distilled.data.name
    assert (teacher.stand_in, teacher.epoch) == ("short", "final")  # no epoch chosen on test images


@pytest.mark.parametrize(
    ("recipe", "argument", "sentence"),
    [
        ("shiftresnet20_c100", "recipe=shirt", "unknown recipe 'shirt'; did you mean 'short'?"),
        ("s3_resnet18_imagenet", "recipe=short", "found data.name=imagenet2012"),
        ("quickstart", "recipe=short", "unknown argument 'recipe'"),
    ],
)
def test_a_recipe_that_a_family_does_not_have_is_refused(recipe, argument, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(recipe, argument)


def test_the_quickstart_turns_no_digit_into_its_mirror_image():
    settings = load("quickstart")
    assert (settings.data.name, settings.data.flip) == ("digits", False)
    assert settings.schedule.boundaries[-1] < settings.epochs


@pytest.mark.skipif(not (SHARED / "seeds").is_dir(), reason="needs the original's page, ../shared")
def test_the_rows_above_are_the_pages():
    (page,) = (SHARED / "seeds").glob("000*.txt")
    lines = [line.strip() for line in page.read_text().splitlines()]
    rows = [line for line in lines if re.match(r"ResNet\d+ (\d?c|--|original) ", line)]
    assert rows == (CIFAR100 + CIFAR10).splitlines()


@pytest.mark.skipif(not (SHARED / "oracle").is_dir(), reason="needs ../shared/oracle/counts.json")
@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_the_parameters_in_the_table_are_the_originals(cell):
    known = json.loads((SHARED / "oracle" / "counts.json").read_text())["rows"]
    more = 90 * (64 + 1) if cell.data == "c100" else 0  # its counts are for 10 classes
    (expected,) = (
        row["params"]
        for row in known
        if row["arch"] == cell.arch
        and row.get("expansion", 1) == cell.expansion
        and row.get("reduction", 1) == cell.reduction
        and row.get("reduction_mode", cell.mode) == cell.mode
    )
    assert ROWS[cell.name].parameters == expected + more


@pytest.mark.parametrize("written", ["{}", "configs/{}.py"])
@pytest.mark.parametrize("name", ["shiftresnet20_c100:expansion=3", "quickstart"])
def test_a_recipe_is_found_by_its_name_from_anywhere(written, name, tmp_path, monkeypatch):
    file, _, argument = name.partition(":")
    expected = config.load(f"{ROOT / 'configs' / file}.py{':' if argument else ''}{argument}")
    monkeypatch.chdir(tmp_path)
    typed = written.format(file) + (f":{argument}" if argument else "")
    assert config.load(typed) == expected
    with pytest.raises(UserError, match=r"did you mean '(configs/)?shiftresnet20_c10"):
        config.load(written.format("shiftresnet20_c10x"))


@pytest.mark.parametrize("mode", ["net", "block"])
def test_the_mode_of_a_reduction_is_taken_wherever_it_is_given(mode):
    name = "configs/depthwiseresnet20_c100.py:reduction=0.38"
    for recipe, given in (
        (f"{name},reduction_mode={mode}", {}),
        (name, {"model.reduction_mode": mode}),
    ):
        assert config.load(recipe, given).model.reduction_mode == mode
    assert config.load(name).model.reduction_mode == "block"
