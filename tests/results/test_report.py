"""The report: its numbers, what it leaves alone, and the page in a real browser."""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from shiftnet import config, results
from shiftnet.cli.report import main
from shiftnet.errors import UserError
from shiftnet.results.report import charts, grids, markdown, page, sections, sources
from tests import browser

ROOT = Path(__file__).parents[2]
SHORT = sorted(path for path in (ROOT / "results" / "smoke").glob("*_*epochs*") if path.is_dir())
# A PNG of one pixel.
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVQI12NgYGAAAAAEAAEnNCcK"
    "AAAAAElFTkSuQmCC"
)
HOSTILE = "<script>alert('1')</script>"

TABLE = """
[[tables]]
name = "table"
title = "Networks <b>of</b> a page"
source = "a page | a paper"
epoch = "best"
note = "A note on *all* of them."

[[tables.rows]]
name = "shiftresnet20_3c_c100"
recipe = "configs/shiftresnet20_c100.py:expansion=3"
parameters = 101492
multiply_adds = 16439552
bytes = 405968
reported = 65.83
spread = 0.21
note = "The text of the page says otherwise."

[[tables.rows]]
name = "resnet20_3c_c100"
recipe = "configs/resnet20_c100.py:reduction=2.8"
parameters = 102056
multiply_adds = 14055680
bytes = 408224
reported = 60.72
older = 61.0

[[tables.rows]]
name = "wrn20_1_1bit_c100"
recipe = "configs/wrn20_10_1bit_c100.py:width=1"
parameters = 274296
multiply_adds = 40960000
bytes = 61536
"""


def lines(accuracies: list[float], *, low_bit: bool = False) -> list[dict[str, Any]]:
    """What a run writes: a line an epoch, with these test accuracies."""
    found = []
    for epoch, accuracy in enumerate(accuracies, 1):
        line: dict[str, Any] = {
            "step": 10 * epoch,
            "epoch": epoch,
            "lr": 0.1 / epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": accuracy / 2,
            "images_per_second": 100.0 * epoch,
            "test_loss": 1.5 / epoch,
            "test_accuracy": accuracy,
        }
        if low_bit:
            layer = {
                "zeros": 0.5,
                "sign_changed": 0.01 / epoch,
                "levels": {"-2": 0.1, "-1": 0.15, "0": 0.5, "1": 0.15, "2": 0.1},
            }
            line["weights"] = {"all": layer, "block.conv1": layer, "block.conv2": layer}
        found.append(line)
    return found


def confusion(names: list[str]) -> list[list[int]]:
    """Of 100 images a class; 20 of each are taken for the next class, and one for every other."""
    classes = len(names)
    return [
        [label, other, {0: 80 - (classes - 2), 1: 20}.get((other - label) % classes, 1)]
        for label in range(classes)
        for other in range(classes)
    ]


def make_workdir(
    folder: Path, accuracies: list[float], *, seed: int = 0, classes: int = 10, low_bit: bool = True
) -> Path:
    """The working directory of a run that is being trained: the last line is not whole yet."""
    folder.mkdir(parents=True)
    recipe = config.default_config()
    recipe.seed = seed
    recipe.model.arch = "shiftresnet8"
    recipe.model.weights = "s3" if low_bit else "float"
    recipe.data.name = "digits"
    (folder / "config.json").write_text(config.to_json(recipe))
    text = "".join(json.dumps(line) + "\n" for line in lines(accuracies, low_bit=low_bit))
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "ep')
    names = [HOSTILE, *(f"class {i}" for i in range(1, classes))]
    found = {"step": 30, "epoch": 3, "class_names": names, "confusion": confusion(names)}
    (folder / "confusion.json").write_text(json.dumps(found))
    one = {"image": HOSTILE, "class": HOSTILE, "prediction": "class 1", "confidence": 0.9}
    images = {"step": 30, "epoch": 3, "wrong": [{**one, "data": PIXEL}], "sample": []}
    (folder / "images.json").write_text(json.dumps(images))
    return folder


def make_result(
    folder: Path, row: str, runs: list[list[float]], full_epochs: int, recipe: str = ""
) -> None:
    """A row's result: of each seed the accuracies after every epoch."""
    result = {
        "row": row,
        "recipe": recipe,
        "config": {},
        "class_names": ["cat", "dog"],
        "epochs": len(runs[0]),
        "full_epochs": full_epochs,
        "parameters": 101492,
        "multiply_adds": 16439552,
        "bytes": 405968,
        "runs": [
            {
                "seed": seed,
                "epochs": lines(accuracies),
                "final_accuracy": accuracies[-1],
                "best_accuracy": max(accuracies),
                "best_epoch": accuracies.index(max(accuracies)) + 1,
                "together": len(runs),
                "seconds": 90.0,
                "images_per_second": 12345.0,
                "fraction_of_peak": 0.031,
                "device": "a device",
                "versions": {},
                "commit": None,
                "finished": "2026-11-21T12:00:00Z",
            }
            for seed, accuracies in enumerate(runs)
        ],
        "checkpoint": {
            "file": f"{row}.safetensors",
            "bytes": 1,
            "seed": 0,
            "epoch": len(runs[0]),
            "test_accuracy": runs[0][-1],
            "confusion": [[0, 0, 9], [0, 1, 1], [1, 1, 10]],
        },
    }
    results.write(folder, result)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of three rows: one finished with two seeds, one missing, one on a short schedule."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "table.toml").write_text(TABLE)
    seeds = [[0.5, 0.68, 0.67], [0.4, 0.69, 0.66]]
    make_result(folder, "shiftresnet20_3c_c100", seeds, full_epochs=3)
    make_result(folder, "wrn20_1_1bit_c100", [[0.2, 0.3]], full_epochs=256)
    return folder


def cells(text: str, row: str) -> list[str]:
    """The cells of the only row of that name in Markdown tables."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in found.split("|")[1:-1]]


@pytest.mark.core
def test_numbers_of_the_table(folder, tmp_path):
    out = tmp_path / "table.md"
    assert main([str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    final = f"66.50 ± {statistics.stdev([67, 66]):.2f}"
    best = f"68.50 ± {statistics.stdev([68, 69]):.2f}"
    full, short = text.split("## Shortened schedules")
    assert cells(full, "shiftresnet20_3c_c100") == [
        *("shiftresnet20_3c_c100", "101,492", "65.83 ± 0.21", "–", final, best),  # noqa: RUF001
        *("**+2.67**", "2", "67.00", "12,345 (3.1%)", "2 min", "a device"),
        "configs/shiftresnet20_c100.py:expansion=3",
    ]
    waiting = full.split("<summary>")[1].partition("</details>")[0]
    assert waiting.startswith("2 of 3 rows have not been trained yet</summary>")
    assert cells(waiting, "resnet20_3c_c100")[2:4] == ["60.72", "61.00"]
    assert cells(waiting, "wrn20_1_1bit_c100")[2] == "–"  # noqa: RUF001
    assert "shiftresnet20_3c_c100 |" not in waiting
    assert cells(short, "wrn20_1_1bit_c100")[1:5] == [
        "2 of 256 epochs",
        "274,296",
        "30.00",
        "30.00",
    ]
    assert "shiftresnet20_3c_c100" not in short
    assert "- shiftresnet20_3c_c100: The text of the page says otherwise." in full


def test_a_difference_of_a_point_is_not_marked(folder):
    table = (folder / "table.toml").read_text()
    for reported, shown in (("69.50", "−1.00"), ("69.51", "**−1.01**")):  # noqa: RUF001
        (folder / "table.toml").write_text(table.replace("65.83", reported))
        text = markdown.render(sources.find([folder]))
        assert shown in cells(text.split("## Shortened")[0], "shiftresnet20_3c_c100")


def test_networks_of_a_size_are_compared_from_three_seeds_on(folder):
    assert grids.rivals(sources.find([folder]).tables[0]) is None  # one of the two alone
    three = [[0.5, 0.68], [0.5, 0.69], [0.5, 0.70]]
    make_result(folder, "resnet20_3c_c100", [[0.5, 0.6], [0.5, 0.61], [0.5, 0.62]], 2)
    text = markdown.render(sources.find([folder]))
    (line,) = (line for line in text.splitlines() if "| resnet20_3c_c100 | 101,492 / " in line)
    found = [cell.strip() for cell in line.split("|")[1:-1]]
    assert found[0] == "shiftresnet20_3c_c100"
    assert found[3:] == ["68.50 ± 0.71", "61.00 ± 1.00", "2 / 3", "–", "+5.11"]  # noqa: RUF001
    make_result(folder, "shiftresnet20_3c_c100", three, 2)
    text = markdown.render(sources.find([folder]))
    error = math.sqrt(2 * 1.0**2 / 3)
    assert f"| **+8.00 ± {error:.2f}** | +5.11 |" in text


def test_the_brief_table_lists_what_was_trained(folder, tmp_path):
    out = tmp_path / "README.md"
    out.write_text("Ours.\n\n<!-- results -->\nformer\n<!-- /results -->\nAfter.\n")
    assert main([str(folder), "--out", str(out), "--brief"]) == 0
    text = out.read_text()
    assert cells(text, "shiftresnet20_3c_c100")[2:] == [
        "65.83 ± 0.21",
        "68.50 ± 0.71",
        "**+2.67**",
        "2",
    ]
    assert "| resnet20" not in text
    assert "| wrn20" not in text
    assert "2 of 3 rows have not been trained" in text
    assert text.startswith("Ours.\n\n<!-- results -->\n### ")
    assert text.endswith("\n<!-- /results -->\nAfter.\n")
    assert "former" not in text


def test_markdown_is_written_again_in_place(folder, tmp_path):
    out = tmp_path / "results.md"
    assert main([str(folder), "--out", str(out)]) == 0
    first = out.read_text()
    out.write_text(first.replace("# Results", "# My words"))
    assert main([str(folder), "--out", str(out)]) == 0
    assert out.read_text() == first.replace("# Results", "# My words")


def test_a_file_without_the_lines_is_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "notes.md"
    for words in ("My notes.\n", "<!-- results -->\n", "<!-- /results -->\n<!-- results -->\n"):
        out.write_text(words)
        assert main([str(folder), "--out", str(out)]) == 2
        assert "must have the lines" in capsys.readouterr().err
        assert out.read_text() == words


def test_words_from_files_are_not_markup(folder, tmp_path):
    text = markdown.render(sources.find([folder]))
    assert r"Networks \<b\>of\</b\> a page" in text
    assert r"a page \| a paper" in text
    workdir = make_workdir(tmp_path / "run", [0.1, 0.2, 0.3])
    html = page.render(sources.find([folder, workdir]))
    assert "<b>of</b>" not in html
    assert HOSTILE not in html
    assert "&lt;script&gt;alert(" in html  # in the table of what is confused
    assert r"\u003cscript>alert(" in html  # in the matrix


def test_a_folder_without_a_table_takes_its_parents(folder, tmp_path):
    inner = folder / "smoke"
    inner.mkdir()
    (folder / "wrn20_1_1bit_c100.json").rename(inner / "wrn20_1_1bit_c100.json")
    (alone,) = sources.find([inner]).tables
    assert not alone.whole
    assert list(alone.shortened) == ["wrn20_1_1bit_c100"]
    text = markdown.render(sources.find([inner]))
    assert "<details>" not in text
    (both,) = sources.find([folder, inner]).tables
    assert list(both.full) == ["shiftresnet20_3c_c100"]
    assert list(both.shortened) == ["wrn20_1_1bit_c100"]


def test_rows_of_another_recipe_are_in_a_table_of_their_own(folder):
    inner = folder / "short"
    make_result(inner, "shiftresnet20_3c_c100", [[0.6, 0.64] * 15], full_epochs=164, recipe="short")
    make_result(inner, "wrn20_1_1bit_c100", [[0.6, 0.64]], full_epochs=164, recipe="short")
    own, other = sources.find([folder, inner]).tables
    assert own.full["shiftresnet20_3c_c100"].final == [67, 66]
    assert other.full["shiftresnet20_3c_c100"].final == [64]
    assert other.shortened.keys() == {"wrn20_1_1bit_c100"}
    assert other.table.title.endswith(", by the short recipe")
    text = markdown.render(sources.find([folder, inner]), brief=True)
    (line,) = [line for line in text.splitlines() if "64.00" in line]
    assert line.split("|")[4:6] == [" 64.00 ", " **\N{MINUS SIGN}1.83** "]
    assert text.endswith("2 of 3 rows have not been trained on their full schedule yet.")


def test_short_schedules_are_in_no_figure_with_full_ones(folder):
    (filled,) = sources.find([folder]).tables
    drawn = charts.costs(filled, ["shiftresnet", "resnet", "wrn_1bit"])
    assert len(drawn) == 3
    for chart in drawn:
        assert [r["row"] for r in chart.spec["datasets"]["ours"]] == ["shiftresnet20_3c_c100"]
        assert len(chart.spec["datasets"]["reported"]) == 2


def test_seeds_of_one_recipe_are_put_together(tmp_path):
    workdirs = [make_workdir(tmp_path / f"run{i}", [0.1, 0.2 + i / 10], seed=i) for i in range(2)]
    (training,) = sources.find(workdirs).trainings
    assert training.name == "run0 and 1 more"
    (row,) = grids.of_trainings([training]).rows
    assert [cell.text for cell in row][1] == "epoch 2 of 164"
    assert [cell.text for cell in row][6:9] == ["25.00 ± 7.07", "25.00 ± 7.07", "2"]
    loss = charts.curves([training], ["run"])[0].spec["datasets"]["records"]
    assert {record["seed"] for record in loss} == {0, 1}


def test_seeds_that_are_not_equally_far_are_said_to_be(tmp_path):
    make_workdir(tmp_path / "seed0", [0.1, 0.2])
    make_workdir(tmp_path / "seed1", [0.1, 0.2, 0.4], seed=1)
    (training,) = sources.find([tmp_path / "seed0", tmp_path / "seed1"]).trainings
    assert grids.schedule(training) == "epochs 2 to 3 of 164, by seed"
    assert ("Epochs", "2 to 3") in [tile[:2] for tile in grids.tiles(training)]


def test_a_row_in_training_is_drawn_by_its_own_name(tmp_path):
    rows = []
    for row in ("a/row_seeds0-1", "b/row_seeds0-1"):
        place = tmp_path / row
        for seed in range(2):
            make_workdir(place / f"seed{seed}", [0.1, 0.2], seed=seed)
        (place / "config.json").write_text((place / "seed0/config.json").read_text())
        rows.append(place)
    (training,) = sources.find(rows[:1]).trainings
    assert training.name == "row_seeds0-1"
    assert [run.seed for run in training.runs] == [0, 1]
    # Once more the same seeds: runs of their own, by a name of their own.
    both = sources.find(rows).trainings
    assert [training.name for training in both] == ["a/row_seeds0-1", "b/row_seeds0-1"]
    assert [len(training.runs) for training in both] == [2, 2]


def test_the_loss_of_a_first_epoch_does_not_flatten_the_others(tmp_path):
    workdir = make_workdir(tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    (training,) = sources.find([workdir]).trainings
    loss = charts.curves([training], ["run"])[0]
    assert loss.note == ""
    text = (
        (workdir / "metrics.jsonl").read_text().replace('"test_loss": 1.5,', '"test_loss": 51.0,')
    )
    (workdir / "metrics.jsonl").write_text(text)
    (training,) = sources.find([workdir]).trainings
    loss = charts.curves([training], ["run"])[0]
    assert loss.note == "Losses above 2 are beyond the top."
    assert loss.spec["layer"][0]["encoding"]["y"]["scale"]["domain"] == [0.25, 2.0]
    assert all(layer["mark"]["clip"] for layer in loss.spec["layer"])


def test_a_run_has_one_color_in_all_figures(folder, tmp_path):
    workdirs = [make_workdir(tmp_path / name, [0.1, 0.2]) for name in ("one", "two")]
    found = sources.find([folder, *workdirs])
    names = sections.names(found)
    assert names == ["shiftresnet20_3c_c100", "wrn20_1_1bit_c100", "one", "two"]
    drawn = [*charts.curves(found.trainings[1:], names), *charts.sign_flips(found.trainings, names)]
    drawn.append(charts.per_class(found.trainings[1].confusion, "two", names))
    for chart in drawn:
        layer = chart.spec["layer"][0] if "layer" in chart.spec else chart.spec
        assert layer["encoding"]["color"]["scale"]["domain"] == names


def test_what_was_trained_comes_before_what_was_not(folder):
    untrained = TABLE.partition("[[tables.rows]]")[0].replace("Networks", "Untrained")
    row = TABLE.split("[[tables.rows]]")[2].replace("resnet20_3c_c100", "resnet56_c100")
    (folder / "table.toml").write_text(f"{untrained}[[tables.rows]]{row}{TABLE}")
    parts = sections.sections(sources.find([folder]))
    titles = [part.title for part in parts]
    assert titles[-2:] == ["Shortened schedules", "Not trained yet"]
    (folded,) = parts[-1].details
    assert folded.title == "Untrained <b>of</b> a page"
    assert [row[0].text for row in folded.grids[0][1].rows] == ["resnet56_c100"]


def test_a_row_by_two_recipes_is_in_one_figure(folder, tmp_path):
    inner = folder / "short"
    make_result(inner, "shiftresnet20_3c_c100", [[0.5, 0.64]], full_epochs=3, recipe="short")
    training = make_workdir(tmp_path / "shiftresnet20_3c_c100_seeds0", [0.4, 0.5])
    parts = sections.sections(sources.find([folder, inner, training]))
    (part,) = (part for part in parts if part.title == "The same rows by several recipes")
    ((_, grid),) = part.grids
    assert [[cell.text for cell in row[1:4]] for row in grid.rows] == [
        ["full recipe, 3 epochs", "66.50 ± 0.71", "68.50 ± 0.71"],
        ["short recipe, 2 epochs", "64.00", "64.00"],
        ["run, epoch 2 of 164", "50.00", "50.00"],
    ]
    (chart,) = part.charts
    drawn = {(r["recipe"], r["epoch"]): r["accuracy"] for r in chart.spec["datasets"]["records"]}
    assert drawn["full recipe, 3 epochs", 1] == 45
    assert drawn["short recipe, 2 epochs", 2] == 64
    assert len(drawn) == 7
    alone = sections.sections(sources.find([folder]))
    assert "The same rows by several recipes" not in [part.title for part in alone]


def test_facts_of_a_run(tmp_path):
    workdir = make_workdir(tmp_path / "run", [0.1, 0.3, 0.2])
    sessions = [
        {"from_step": 0, "device": "a GPU", "versions": {"jax": "1.0"}, "commit": "a" * 40},
        {
            "from_step": 9,
            "device": "a CPU",
            "versions": {"jax": "1.1"},
            "commit": "b" * 40 + "-dirty",
        },
    ]
    (workdir / "environment.json").write_text(json.dumps(sessions))
    found = sources.find([workdir])
    assert sections.title(found) == "run"
    (part,) = sections.sections(found)
    facts = dict(part.facts)
    assert facts["Network"] == "shiftresnet8, weights s3"
    assert facts["Data"] == "digits"
    assert facts["Machine"] == "a GPU, then a CPU"
    assert facts["Code"] == "aaaaaaaaaa, then bbbbbbbbbb with changes"
    assert facts["Packages"] == "jax 1.1"
    tiles = {tile.title: (tile.value, tile.note) for tile in part.tiles}
    assert tiles["Test accuracy"] == ("20.00 %", "best 30.00 % after epoch 2")
    assert tiles["Epochs"] == ("3", "of 164")
    (workdir / "environment.json").write_text("[{")  # a run may be writing it
    assert "Machine" not in dict(sections.sections(sources.find([workdir]))[0].facts)


def test_the_best_epoch_is_chosen_on_held_out_images():
    run = sources.Run(
        0,
        [
            {"epoch": 1, "test_accuracy": 0.5, "validation_accuracy": 0.8},
            {"epoch": 2, "test_accuracy": 0.6, "validation_accuracy": 0.7},
        ],
    )
    assert sources.best(run)["epoch"] == 1


@pytest.mark.core
@pytest.mark.parametrize(
    ("row", "family"),
    [
        ("shiftresnet20_3c_c100", "shiftresnet"),
        ("depthwiseresnet110_c10", "depthwiseresnet"),
        ("depthwiseresnet20_1c_noskip_c100", "depthwiseresnet_noskip"),
        ("wrn20_10_c100", "wrn"),
        ("wrn20_10_1bit_c100", "wrn_1bit"),
        ("s3_resnet20_c100", "s3_resnet"),
        ("shiftresnet20_9c_s3_c100", "shiftresnet_s3"),
        ("my-run", "my-run"),
    ],
)
def test_family(row, family):
    assert sources.family(row) == family


def test_per_class_accuracy_and_confused_pairs(tmp_path):
    (training,) = sources.find([make_workdir(tmp_path / "run", [0.1])]).trainings
    by_class = charts.per_class(training.confusion, "run", ["run"]).spec["datasets"]["records"]
    assert {record["accuracy"] for record in by_class} == {0.72}
    section = sections.of_training(training, ["run"])
    ((caption, pairs),) = section.grids
    assert caption == "Most confused classes (seed 0, epoch 3)"
    assert [cell.text for cell in pairs.rows[0]] == [HOSTILE, "class 1", "20", "20.0%"]
    assert len(charts.matrix(training.confusion).spec["datasets"]["records"]) == 100


def test_many_classes_have_no_matrix():
    names = [f"class {i}" for i in range(1000)]
    found = sources.Confusion(names, [(i, i, 50) for i in range(1000)], "seed 0")
    assert charts.matrix(found) is None
    assert len(charts.per_class(found, "run", ["run"]).spec["datasets"]["records"]) == 1000


def test_what_is_not_there_is_said(tmp_path):
    empty = make_workdir(tmp_path / "empty", [])
    first = make_workdir(tmp_path / "first", [0.1], low_bit=False)
    for name in ("confusion.json", "images.json"):
        (first / name).unlink()
    made = [
        sections.sections(sources.Found([], [training]))[0]
        for training in sources.find([empty, first]).trainings
    ]
    assert made[0].sentences == ["There is nothing to draw: no epoch has finished yet."]
    assert made[1].sentences == [
        "Curves need two epochs; so far there are fewer.",
        "This run has no confusion matrix.",
        sections.NO_IMAGES,
    ]
    assert not made[0].charts
    assert not made[1].charts


def test_a_run_of_ones_own_network_is_shown_without_running_its_code(tmp_path):
    run = make_workdir(tmp_path / "run", [0.5, 0.6])
    path = run / "config.json"
    recipe = json.loads(path.read_text())
    recipe["model"]["arch"] = str(tmp_path / "nowhere.py:Net")
    path.write_text(json.dumps(recipe))
    for brief in (False, True):
        shown = markdown.render(sources.find([run]), brief=brief)
        assert "60.00" in shown
        assert "of 0 rows" not in shown


def test_a_run_that_patience_ended_is_not_on_its_way(tmp_path):
    run = make_workdir(tmp_path / "run", [0.5, 0.6, 0.6])
    path = run / "config.json"
    recipe = json.loads(path.read_text()) | {"patience": 1, "epochs": 9}
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({**line, "validation_accuracy": line["test_accuracy"]}) + "\n"
            for line in lines([0.5, 0.6, 0.6])
        )
    )
    for patience, words in ((1, "3 of 9 epochs, ended early"), (2, "epoch 3 of 9")):
        path.write_text(json.dumps({**recipe, "patience": patience}))
        assert words in markdown.render(sources.find([run]))


def test_a_loss_that_is_not_a_number_is_left_out(tmp_path):
    workdir = make_workdir(tmp_path / "run", [0.1, 0.2, 0.3])
    text = (workdir / "metrics.jsonl").read_text().replace('"train_loss": 1.0', '"train_loss": NaN')
    assert "NaN" in text
    (workdir / "metrics.jsonl").write_text(text)
    (training,) = sources.find([workdir]).trainings
    loss = sections.of_training(training, ["run"]).charts[0]
    assert len(loss.spec["datasets"]["records"]) == 5
    assert "NaN" not in page._drawn(loss)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("run/config.json", "{", "config.json is damaged"),
        ("run/config.json", '{"epochs": "many"}', "config.json is damaged"),
        ("run/metrics.jsonl", "{\n", "metrics.jsonl is damaged"),
        ("run/metrics.jsonl", '{"step": 1}\n', "metrics.jsonl is damaged: it has no 'epoch'"),
        ("run/metrics.jsonl", "[1]\n", "metrics.jsonl is damaged"),
        (
            "run/metrics.jsonl",
            '{"step": 1, "epoch": 1, "test_accuracy": 12}\n',
            "metrics.jsonl is damaged: test_accuracy is 12, expected from 0 to 1",
        ),
        (
            "run/metrics.jsonl",
            '{"step": 1, "epoch": 1, "test_accuracy": true}\n',
            "metrics.jsonl is damaged: test_accuracy is True, expected from 0 to 1",
        ),
        (
            "run/metrics.jsonl",
            '{"step": 1, "epoch": 1, "weights": {"all": {"levels": {"0": "x"}}}}\n',
            "metrics.jsonl is damaged: could not convert string to float",
        ),
        (
            "run/metrics.jsonl",
            '{"step": 1, "epoch": 1, "weights": {"all": {"levels": [1, 2]}}}\n',
            "metrics.jsonl is damaged",
        ),
        ("run/confusion.json", "{}", "confusion.json is damaged: it has no 'epoch'"),
        (
            "run/confusion.json",
            '{"epoch": 1, "class_names": ["a"], "confusion": [[0, 1, 5]]}',
            "[0, 1, 5] is not of 1 classes",
        ),
        ("run/images.json", "{}", "images.json is damaged: it has no 'epoch'"),
        (
            "run/images.json",
            '{"epoch": 1, "wrong": [], "sample": [{"image": "0", "data": "https://a/b.png"}]}',
            "images.json is damaged: the data of image 0 are not of a PNG or JPEG",
        ),
        ("results/table.toml", "[[tables]]", "table.toml is damaged"),
        (
            "results/shiftresnet20_3c_c100.json",
            '{"row": "shiftresnet20_3c_c100", "runs": [1]}',
            "shiftresnet20_3c_c100.json is damaged",
        ),
    ],
)
def test_damaged_files_are_a_sentence(folder, tmp_path, capsys, name, text, sentence):
    workdir = make_workdir(tmp_path / "run", [0.1, 0.2])
    (tmp_path / name).write_text(text)
    out = tmp_path / "report.html"
    assert main([str(folder), str(workdir), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--out", "report.html"], "nowhere is neither a run's working directory"),
        (["results", "--out", "report.pdf"], "must end in .html, .svg or .md"),
        (["results", "--out", "report.html", "--brief"], "--brief applies to Markdown"),
        (["results", "--out", "no/folder/report.html"], "cannot write no/folder/report.html"),
        (["results"], "--out"),
    ],
)
def test_bad_arguments_are_a_sentence(folder, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(folder.parent)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert {path.name for path in folder.parent.iterdir()} == {"results"}


def test_a_run_that_is_named_by_two_paths_is_one(tmp_path, monkeypatch):
    run = shutil.copytree(SHORT[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert len(sources.find([run, Path("run"), Path("run/../run")]).trainings) == 1


def test_a_missing_library_is_a_sentence(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main([str(folder), "--out", str(tmp_path / "report.html")]) == 2
    assert "pip install altair jinja2 vl-convert-python" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert main([str(folder), "--out", str(tmp_path / "report.md")]) == 0  # which needs none


def test_real_runs(tmp_path):
    assert len(SHORT) == 4
    html, text = tmp_path / "report.html", tmp_path / "report.md"
    assert main([*map(str, SHORT), "--out", str(text)]) == 0
    assert cells(text.read_text(), "shiftresnet20_e3_c100_7epochs")[1:] == [
        *("7 epochs", "101,492", "16,439,552", "405,968"),
        *("43.07", "42.00", "42.00", "1", "322"),
    ]
    assert main([*map(str, SHORT), "--out", str(html)]) == 0
    assert html.read_text().count('<div class="chart">') > 20


# Of every chart: its size, and how many marks it has, or pixels that are not empty.
DRAWN = """charts.map((chart) => {
  const {width, height} = chart.getBoundingClientRect();
  const svg = chart.querySelector("svg"), canvas = chart.querySelector("canvas");
  const marks = svg
    ? [...svg.querySelectorAll(".role-mark path")].filter((path) => path.getAttribute("d")).length
    : canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
        .filter((value, i) => i % 4 === 3 && value).length;
  return {width, height, marks, kind: svg ? "svg" : "canvas", label: chart.ariaLabel};
})"""


CUT = "tables.map((box) => box.scrollWidth > box.clientWidth)"
SAYS_SO = """tables.map((box) => {
  const hint = box.parentElement.querySelector(".hint");
  return getComputedStyle(hint).display !== "none";
})"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A page of a real browser."""
    if browser.PROGRAM is None:
        pytest.skip("no Chromium here")
    with browser.browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def test_the_page_in_a_browser(tab, folder, tmp_path):
    workdirs = [
        make_workdir(tmp_path / "few", [0.1, 0.2, 0.3]),
        make_workdir(tmp_path / "many", [0.1, 0.2, 0.4], classes=60, low_bit=False),
    ]
    out = tmp_path / "report.html"
    assert main([*map(str, (folder, *workdirs, *SHORT[:1])), "--out", str(out)]) == 0
    tab.requests.clear()
    tab.complaints.clear()
    backgrounds = set()
    for width in (390, 1280):
        for dark in (False, True):
            tab.show(out, width=width, dark=dark)
            tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            tab.wait_for("charts.every((chart) => 'drawn' in chart.dataset)")
            drawn = tab.evaluate(DRAWN)
            assert len(drawn) > 20
            assert {chart["kind"] for chart in drawn} == {"svg", "canvas"}
            for chart in drawn:
                assert chart["width"] > 250, chart
                assert chart["height"] > 100, chart
                assert chart["marks"] > 0, chart
                assert chart["label"], chart
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            # Every table that goes on beyond the edge says so, and no other.
            assert tab.evaluate(CUT) == tab.evaluate(SAYS_SO)
            assert (tab.evaluate(CUT).count(True) > 1) == (width == 390)
            assert tab.evaluate("[...document.images].every((image) => image.naturalWidth)")
            backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    assert tab.complaints == []
    assert {url for url in tab.requests if not url.startswith("data:image/")} == {out.as_uri()}


def test_pointing_at_a_result_tells_its_name(tab, folder, tmp_path):
    out = tmp_path / "report.html"
    assert main([str(folder), "--out", str(out)]) == 0
    tab.show(out, width=1280, dark=False)
    tab.wait_for("'drawn' in charts[1].dataset")
    point = tab.evaluate(
        """(() => {
          const marks = charts[1].querySelectorAll(".mark-symbol.role-mark path");
          marks[marks.length - 1].scrollIntoView({block: "center"});
          const {x, y, width, height} = marks[marks.length - 1].getBoundingClientRect();
          return {x: x + width / 2, y: y + height / 2};
        })()"""
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", **point)
    tab.wait_for("document.querySelector('#vg-tooltip-element.visible')")
    words = tab.evaluate("document.querySelector('#vg-tooltip-element').textContent")
    assert "shiftresnet20_3c_c100" in words
    assert "68.50" in words


def test_on_paper_everything_is_open_and_light(tab, folder, tmp_path):
    out = tmp_path / "report.html"
    assert main([str(folder), "--out", str(out)]) == 0
    tab.show(out, width=1280, dark=True)
    opened = "document.querySelectorAll('details[open]').length"
    assert tab.evaluate(opened) == 0
    tab.evaluate(
        """addEventListener("beforeprint", () => {
          window.seen = document.querySelectorAll("details:not([open])").length;
        })"""
    )
    assert tab.call("Page.printToPDF")["data"]
    assert tab.evaluate("window.seen") == 0
    assert tab.evaluate(opened) == 0  # again
    tab.call("Emulation.setEmulatedMedia", media="print")
    page_color = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(page_color) == "rgb(255, 255, 255)"
    tab.call("Emulation.setEmulatedMedia", media="")


def test_the_browser_would_notice(tab, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<script>console.warn('x')</script><img src='http://127.0.0.1:9/x.png'>")
    tab.show(path, width=390, dark=False)
    assert tab.complaints
    assert "http://127.0.0.1:9/x.png" in tab.requests


def test_outside_a_command_errors_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="neither"):
        sources.find([tmp_path])


# As in the Makefile.
RESULTS = ["results", "results/short", "results/distilled"]


@pytest.mark.parametrize(
    ("file", "folders", "brief"),
    [
        ("docs/results.md", [*RESULTS, "results/smoke"], False),
        ("README.md", RESULTS, True),
    ],
)
def test_the_tables_in_the_docs_are_those_of_the_results(file, folders, brief):
    root = Path(__file__).parents[2]
    found = sources.find([root / folder for folder in folders])
    words = (root / file).read_text(encoding="utf-8")
    assert markdown.into(root / file, markdown.render(found, brief=brief)) == words, "make results"


def test_the_figure_has_ours_at_the_size_of_its_file_and_others_with_their_sources(
    folder, tmp_path, capsys
):
    out = tmp_path / "figure.svg"
    (folder / "others.toml").write_text(
        '[[networks]]\nname = "theirs"\naccuracy = 80.5\nbytes = 5000\nsource = "a paper"\n'
    )
    figure = charts.sizes(sources.find([folder]))
    points = {(p["kind"], p["name"]): p for p in figure.spec["datasets"]["records"]}
    ours = points["trained here", "shiftresnet20_3c_c100"]
    assert (ours["accuracy"], ours["bytes"]) == (67.0, 1)
    reported = points["reported for networks here", "resnet20_3c_c100"]
    assert (reported["accuracy"], reported["bytes"]) == (60.72, 408224)
    theirs = points["others", "theirs"]
    assert (theirs["accuracy"], theirs["bytes"], theirs["source"]) == (80.5, 5000, "a paper")
    assert ("trained here", "wrn20_1_1bit_c100") not in points  # on a short schedule
    assert main([str(folder), "--out", str(out)]) == 0
    assert ">theirs</text>" in out.read_text()
    (folder / "others.toml").write_text('[[networks]]\nname = "theirs"\naccuracy = "80"\n')
    assert main([str(folder), "--out", str(out)]) == 2
    assert "others.toml is damaged" in capsys.readouterr().err


def test_the_others_of_the_figure_are_sound_and_have_a_source():
    found = results.others(Path(__file__).parents[2] / "results")
    assert len(found) >= 10
    assert all("github.com/" in other.source for other in found)
    (winner,) = (other for other in found if other.name == "RIAIR")
    assert (winner.accuracy, round(winner.bytes / 1000)) == (80.17, 199)


def test_a_folder_beside_the_table_without_results_is_refused(tmp_path):
    table = Path(__file__).parents[2] / "results" / "table.toml"
    (tmp_path / "table.toml").write_bytes(table.read_bytes())
    (tmp_path / "smoke").mkdir()
    with pytest.raises(UserError, match=r"smoke has no result of a row of .*table.toml"):
        sources.find([tmp_path / "smoke"])


def test_what_is_kept_in_the_repository_is_small():
    results = Path(__file__).parents[2] / "results"
    kept = [path for path in results.glob("**/*.safetensors") if "large" not in path.parts]
    sizes = {path: path.stat().st_size for path in kept}
    trainable = sum(size for path, size in sizes.items() if path.parent.name == "trainable")
    assert trainable <= 30_000_000
    assert sum(sizes.values()) - trainable <= 10_000_000
