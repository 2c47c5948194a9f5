"""The recipes in configs/: each loads, and every cell of the original's tables can be named."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from shiftnet import config, models

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FAMILIES = ("shiftresnet", "resnet", "depthwiseresnet")
TABLE_RECIPES = [
    f"{family}{depth}_{data}"
    for family in FAMILIES
    for depth in (20, 56, 110)
    for data in ("c10", "c100")
]
LOW_BIT_RECIPES = [
    *(f"wrn20_10{bits}_{data}" for bits in ("", "_1bit") for data in ("c10", "c100")),
    *(f"s3_resnet20_{data}" for data in ("c10", "c100")),
]
IMAGENET_RECIPES = [
    *(f"{weights}resnet{depth}_imagenet" for weights in ("", "s3_") for depth in (18, 50)),
    "denseshift_resnet18_imagenet",
    "shiftnet_a_imagenet",
    "shiftnet_b_imagenet",
]
RECIPES = ["quickstart", *TABLE_RECIPES, *LOW_BIT_RECIPES, *IMAGENET_RECIPES]
BUILDERS = {"shift_family", "wrn_family", "s3_family", "shiftnet_family"}

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

    recipe: str
    row: str  # "3c", "original", …
    accuracy: str
    expansion: float
    reduction: float
    mode: str
    millions: float  # parameters, as the page rounds them for the shift net


def cells() -> list[Cell]:
    found = []
    for data, rows in (("c100", CIFAR100), ("c10", CIFAR10)):
        for line in rows.splitlines():
            model, row, *rest = re.sub(r"[%()]", "", line).split()
            depth = model.removeprefix("ResNet")
            columns = 3 if data == "c100" else 2
            accuracies, millions, rest = rest[:columns], float(rest[columns]), rest[columns + 1 :]
            if row in ("--", "original"):
                name = f"resnet{depth}_{data}"
                found.append(Cell(name, row, accuracies[1], 1.0, 1.0, "net", millions))
                continue
            expansion = float(row.removesuffix("c") or 1)
            depthwise = float(rest[-2]) if data == "c100" else None  # r**, before the shuffle net's
            reduction = float((rest[:-2] if data == "c100" else rest)[-1])  # in parentheses or not
            found += [
                Cell(
                    f"shiftresnet{depth}_{data}",
                    row,
                    accuracies[0],
                    expansion,
                    1.0,
                    "net",
                    millions,
                ),
                Cell(
                    f"resnet{depth}_{data}", row, accuracies[1], 1.0, reduction, "block", millions
                ),
            ]
            if depthwise is not None:
                name = f"depthwiseresnet{depth}_{data}"
                found.append(Cell(name, row, accuracies[2], 1.0, depthwise, "block", millions))
    return found


def docstring(recipe: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "configs" / f"{recipe}.py").read_text())) or ""


def table(recipe: str) -> dict[str, tuple[str, str, int]]:
    """The docstring's table: row -> argument, reported accuracy, parameters."""
    lines = re.findall(r"^    (\S+) +(\S+) +(-|[\d.]+ %) +([\d,]+)$", docstring(recipe), re.M)
    return {
        row: (
            argument.replace("(none)", ""),
            accuracy.removesuffix(" %"),
            int(count.replace(",", "")),
        )
        for row, argument, accuracy, count in lines
    }


def load(recipe: str, argument: str = ""):
    return config.load(f"{ROOT / 'configs' / recipe}.py:{argument}")


@pytest.mark.core
def test_every_recipe_is_tested_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {*RECIPES, *BUILDERS}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_from_any_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(recipe)
    config.validate(settings)
    models.check(settings.model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_in_every_docstring_works(recipe):
    command = re.search(
        r"^    python train\.py --config (\S+) [\\\s]*--workdir \S+$", docstring(recipe), re.M
    )
    assert command is not None
    path, _, argument = command[1].partition(":")
    assert path == f"configs/{recipe}.py"
    config.validate(load(recipe, argument))


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
    assert len(cells()) == len({cell[:2] for cell in cells()}) == 39 + 27


@pytest.mark.core
@pytest.mark.parametrize("cell", cells(), ids=lambda cell: f"{cell.recipe}-{cell.row}")
def test_every_cell_of_the_tables_can_be_trained_from_its_docstring(cell):
    argument, accuracy, _ = table(cell.recipe)[cell.row]
    model = load(cell.recipe, argument).model
    assert (model.expansion, model.reduction, model.reduction_mode) == (
        cell.expansion,
        cell.reduction,
        cell.mode,
    )
    assert accuracy == cell.accuracy


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_the_depthwise_recipes_of_cifar10_claim_no_accuracy(depth):
    ours, page = table(f"depthwiseresnet{depth}_c10"), table(f"depthwiseresnet{depth}_c100")
    assert [row[1] for row in ours.values()] == ["-"] * 4
    assert [row[0] for row in ours.values()] == [row[0] for row in page.values()]


def test_no_docstring_has_a_row_that_the_page_has_not():
    rows = {(recipe, row) for recipe in TABLE_RECIPES for row in table(recipe)}
    depthwise = {
        (f"depthwiseresnet{depth}_c10", row)
        for depth in (20, 56, 110)
        for row in ("c", "3c", "6c", "9c")
    }
    assert rows == {cell[:2] for cell in cells()} | depthwise


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
        224,
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
@pytest.mark.parametrize("recipe", TABLE_RECIPES)
def test_the_parameters_in_the_docstrings_are_the_originals(recipe):
    known = json.loads((SHARED / "oracle" / "counts.json").read_text())["rows"]
    more = 90 * (64 + 1) if recipe.endswith("_c100") else 0
    for argument, _, count in table(recipe).values():
        model = load(recipe, argument).model
        (expected,) = (
            row["params"]
            for row in known
            if row["arch"] == model.arch
            and row.get("expansion", 1) == model.expansion
            and row.get("reduction", 1) == model.reduction
            and row.get("reduction_mode", model.reduction_mode) == model.reduction_mode
        )
        assert count == expected + more
