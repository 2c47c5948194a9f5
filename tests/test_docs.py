"""The documentation's commands and examples run as they stand there.

On every page each block of code is run, or has a comment above it: `<!-- not run: REASON -->`. The
commands in those are still parsed. The tutorial, the notebook and the commands of the how-to pages
take minutes, and are marked slow.
"""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from shiftnet import config
from shiftnet import data as datasets
from shiftnet.__main__ import main
from shiftnet.cli import COMMANDS

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "docs/results.md": "written by make results",
    "docs/microcontroller.md": "tests/integers builds and runs its programs",
}
PAGES = sorted(
    page
    for page in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    if page not in ELSEWHERE
)
# README.md has no room for comments: its first block sets up the machine. Of the second all but
# these lines are run: the environment is another, and the training takes hours.
README = ("CI makes the test, and trains the quickstart for an epoch",)
README_LINES = r"(?m)^(\. \.venv/bin/activate|python train\.py .*expansion=3.*)\n"


class Block(NamedTuple):
    """A block of code: `reason` says why it is not run, if it is not."""

    language: str
    text: str
    reason: str


def blocks(page):
    """All code on a page, in order."""
    fence = r"^(?:<!-- not run: ([^>]+) -->\n)?```([\w{}-]*)\n(.*?)^```$"
    text = (ROOT / page).read_text()
    found = [
        Block(language or "sh", code, reason)
        for reason, language, code in re.findall(fence, text, re.DOTALL | re.MULTILINE)
        if not language.startswith("{")  # Sphinx's directives
    ]
    if page == "README.md":
        shell = iter(README)
        found = [b._replace(reason=next(shell, "")) if b.language == "sh" else b for b in found]
    return found


def commands(block):
    """The commands of this package in a shell block, as lists of words."""
    lines = block.text.replace("\\\n", " ").splitlines() if block.language == "sh" else ()
    for line in lines:
        line = line.removeprefix("$ ")
        if not re.search(r"(^|\| |&& )(shiftnet|python) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&>")
        lexer.whitespace_split = True
        for joined, words in itertools.groupby(lexer, lambda word: set(word) <= set("|&>")):
            command = None if joined else list(words)
            if command and command[0] == "python":
                del command[: 3 if command[1:3] == ["-m", "shiftnet"] else 1]
                scripts = {"train.py": "train", "evaluate.py": "evaluate"}
                if command[:2] == ["-m", "shiftnet.convert_torch"]:
                    yield ["convert", *command[2:]]
                elif command[0] in scripts:
                    yield [scripts[command[0]], *command[1:]]
                elif command[0] in COMMANDS:
                    yield command
            elif command and command[0] == "shiftnet" and command[1:]:
                yield command[1:]


def slugs(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


WRITTEN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_on_a_page_is_broken(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in slugs(place.read_text()), f"{target}#{anchor}"


DOCUMENTED = [
    pytest.param(words, id=f"{page}: {' '.join(words)}")
    for page in PAGES
    for block in blocks(page)
    for words in commands(block)
    if "…" not in words and "$(cat" not in words
]


class Parsed(Exception):
    """A command line was understood."""


@pytest.mark.parametrize("words", DOCUMENTED)
def test_every_command_in_the_documentation_has_the_options_and_recipes_that_it_names(
    words, monkeypatch
):
    monkeypatch.chdir(ROOT)
    parse = config.Parser.parse_args

    def stop(self, *arguments):
        found = parse(self, *arguments)
        if isinstance(getattr(found, "config", None), str):
            found.config = found.config.replace("RECIPE", "configs/shiftresnet20_c100.py")
            config.from_arguments(found)
        raise Parsed

    monkeypatch.setattr(config.Parser, "parse_args", stop)
    with pytest.raises(Parsed):
        print("exit code", main(words))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(code, page, names):
    with jax.numpy_dtype_promotion("standard"):  # the tests are strict, users are not
        exec(compile(code, page, "exec"), names)


def test_an_own_network_is_trained_by_the_loop_on_its_page(place, capsys):
    page = "docs/own_networks.md"
    network, loop, quantize = (b.text for b in blocks(page) if b.language == "python")
    (place / "my_net.py").write_text(network)
    run(loop, page, {"__name__": "example"})
    *_, last = capsys.readouterr().out.splitlines()
    loss, accuracy = last.split()
    assert float(loss) < 2.1  # ln 10 is 2.30
    assert float(accuracy.rstrip("%")) > 20
    run(quantize, page, {"__name__": "example"})
    assert capsys.readouterr().out == "['head']\n"


def given():
    """The names that examples use without making them."""
    images = np.zeros((2, 32, 32, 3), np.uint8)
    return {
        "__name__": "example",
        "images": images,
        "image": Image.new("RGB", (40, 30)),
        "array": images[0],
        "x": images.astype(np.float32),
        "jax": jax,
        "step": lambda params, images: (jnp.float32(images) @ params).sum(),
        "loss": lambda params, images: (jnp.float32(images) @ params).sum(),
        "params": jnp.ones((3, 4)),
    }


OF_THEIR_OWN = ("docs/own_networks.md", "docs/tutorial.md")


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page not in OF_THEIR_OWN and any(block.language == "python" for block in blocks(page))
    ],
)
def test_the_python_on_a_page_runs(page, place):
    Image.new("RGB", (40, 30)).save("cat.jpg")
    names = given()
    for block in blocks(page):
        if block.language == "python" and not block.reason:
            run(block.text, page, names)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The environment of a user who has installed this package."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "shiftnet"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom shiftnet.__main__ import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


def shell(text, place, programs):
    """Runs a script by bash; returns what it printed, standard error included."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=programs,
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}"
    return result.stdout


def transcript(text):
    """The commands of a block that shows what they print: pairs of a command and its output."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        if document := re.search(r"<<'(\w+)'", command):
            body, end, printed = printed.partition(f"\n{document[1]}\n")
            command += f"\n{body}{end}"
        yield command, printed


def pattern(line):
    """A line as documented, whatever its numbers are, and whatever stands for `…`."""
    number = r"\d[\d,.]*"
    parts = re.split(rf"(…|{number}|\s+)", line)
    kinds = {"…": ".*"}
    return "".join(
        kinds.get(part)
        or (number if re.fullmatch(number, part) else r"\s+" if part.isspace() else re.escape(part))
        for part in parts
        if part
    )


def check(printed, expected, command):
    """Every line that a page shows is printed, in that order, with other numbers perhaps."""
    actual = iter(printed.splitlines())
    for line in expected.splitlines():
        if line.strip() and line.strip() != "…":
            assert any(re.fullmatch(pattern(line), other) for other in actual), (
                f"$ {command}\n{printed}\nlacks: {line}"
            )


@pytest.mark.slow
def test_the_tutorial_is_what_happens(place, programs):
    for block in blocks("docs/tutorial.md"):
        if block.language == "python":
            name = re.match(r"# (\S+)\n", block.text)[1]
            (place / name).write_text(block.text)
        elif not block.reason:
            for command, expected in transcript(block.text):
                check(shell(command, place, programs), expected, command)


@pytest.mark.slow
def test_the_notebook_goes_from_data_to_a_c_program_that_agrees(place, programs, capsys):
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            run("".join(cell["source"]), "notebook.ipynb", names)
    capsys.readouterr()
    assert names["accuracy"] > 0.6
    assert names["agree"] == 1
    of_c = [line.split()[2] for line in names["answers"].splitlines()]
    of_floats = names["predicted"].names[: len(of_c)]
    assert len(of_c) == 8
    assert sum(ours == theirs for ours, theirs in zip(of_c, of_floats, strict=True)) >= 7


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with everything that the how-to pages name: a run, and images of its classes."""
    place = tmp_path_factory.mktemp("workshop")
    digits = datasets.load("digits")
    photos = place / "photos"
    lines = []
    for number, label in itertools.islice(enumerate(digits.test.labels), 20):
        folder = photos / "val" / digits.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(digits.test.images[number])
        image.save(folder / f"{number}.jpg")
        (place / "FLAT_FOLDER").mkdir(exist_ok=True)
        image.save(place / "FLAT_FOLDER" / f"{number}.jpg")
        lines.append(f"{number}.jpg,{digits.class_names[label]}\n")
    (place / "labels.csv").write_text("".join(lines))
    image.save(place / "cat.jpg")
    for name in ("train.py", "evaluate.py", "configs"):
        (place / name).symlink_to(ROOT / name)
    run_of = ["--config", "quickstart", "--config.epochs=1", "--config.model.arch=shiftresnet8"]
    run_of += ["--config.model.weights=s3"]
    assert main(["train", *run_of, "--workdir", str(place / "runs/quickstart")]) == 0
    runs = ("photos", "wrn", "mine", "shiftresnet20_c100-expansion=3")
    for name in (*(f"runs/{name}" for name in runs), "RUN", "CKPT"):
        (place / name).symlink_to(place / "runs/quickstart")
    for name in ("PHOTOS", "OTHER_PHOTOS"):
        (place / name).symlink_to(photos)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page != "docs/tutorial.md"
        and any(block.language == "sh" and not block.reason for block in blocks(page))
    ],
)
def test_the_commands_on_a_page_run(page, workshop, programs):
    for block in blocks(page):
        if block.language == "sh" and not block.reason:
            text = re.sub(README_LINES, "", block.text) if page == "README.md" else block.text
            steps = list(transcript(text)) or [(text, "")]
            for command, expected in steps:
                check(shell(command, workshop, programs), expected, command)
