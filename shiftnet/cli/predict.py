"""Classifies images: files, folders and those within them, or a list on standard input (-)."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import shiftnet
from shiftnet import config as config_lib
from shiftnet.cli import add_network, allow_network, finite
from shiftnet.data.folder import images_in
from shiftnet.data.images import CorruptImage
from shiftnet.errors import UserError, printable, reported, say
from shiftnet.files import check_place, path_of, write_atomically
from shiftnet.inference import Classifier, contact_sheet
from shiftnet.inference.contact_sheet import Thumbnail
from shiftnet.training.processes import set_up

BATCH = 64  # images per call of the network
MOST_ON_A_SHEET = 1000


class Line(NamedTuple):
    """The predictions for a file, the most probable first; why there are none, if it is corrupt."""

    file: str
    predictions: Sequence[tuple[str, float]]
    error: str = ""


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Classifies what the command line names; returns the exit code, 1 if a file was left out."""
    parser = config_lib.Parser(prog="shiftnet predict", description=__doc__)
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint or a trained network's name, as evaluate takes it",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, folders, or - for a list of them"
    )
    parser.add_argument(
        "--top", metavar="K", type=int, default=3, help="classes per image (default: 3)"
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print a JSON list")
    forms.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument("--html", metavar="FILE", help="write a page of images with predictions")
    parser.add_argument("--png", metavar="FILE", help="write an image of images with predictions")
    add_network(parser)
    arguments = parser.parse_args(argv)
    allow_network(arguments)
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, found {arguments.top}")
    sheets = {
        ending: path_of(name, f"--{ending}")
        for ending in ("html", "png")
        if (name := getattr(arguments, ending)) is not None
    }
    for ending, path in sheets.items():
        if path.suffix.lower() != f".{ending}":
            raise UserError(f"--{ending} {path} must end in .{ending}")
        check_place(path, f"--{ending}")
    files = list(_files(arguments.paths))
    read = {Path(file).resolve() for file in files}
    for ending, path in sheets.items():
        if path.resolve() in read:
            raise UserError(
                f"--{ending} {path} is one of the images to classify; take another name"
            )

    set_up()
    model = shiftnet.load(arguments.ckpt)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    shown = min(arguments.top, len(model.class_names))
    if arguments.csv:
        columns = [f"{kind}_{k}" for k in range(1, shown + 1) for kind in ("class", "probability")]
        writer.writerow(["file", *columns])
    lines = []
    for line in _classified(model, files, shown):
        lines.append(line)
        if line.error:
            say(line.error, 1)
        elif arguments.csv:
            cells = [cell for name, share in line.predictions for cell in (name, f"{share:.6g}")]
            writer.writerow([line.file, *cells])
        elif not arguments.json:
            print(_text(line), flush=True)
    if arguments.json:
        print(json.dumps([_object(line) for line in lines], indent=2))
    if sheets and not all(line.error for line in lines):
        _write_sheets(sheets, model, arguments.ckpt, lines)
    return 1 if any(line.error for line in lines) else 0


def _files(typed: Sequence[str]) -> Iterator[str]:
    """Yields the files that paths stand for.

    Raises:
      UserError: if a path does not exist, or a folder has no images.
    """
    for text in typed:
        if text == "-":
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # names of files are any bytes
            lines = [line for line in re.split(r"\r?\n", sys.stdin.read()) if line.strip()]
            if not lines:
                raise UserError("- was given for the files, and standard input names none")
            yield from _files(["./-" if line == "-" else line for line in lines])
            continue
        path = path_of(text, "PATH")
        if path.is_dir():
            found = list(map(str, images_in(path)))
            if not found:
                raise UserError(f"{path} has no images")
            yield from (f"./{name}" if name.startswith("~") else name for name in found)
        elif path.exists():
            yield str(path)
        else:
            raise UserError(f"{path} does not exist")


def _classified(model: Classifier, files: Sequence[str], top: int) -> Iterator[Line]:
    def read(file: str) -> np.ndarray | CorruptImage:
        try:
            return model.preprocess.pixels(file)
        except CorruptImage as error:
            return error

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            images = list(threads.map(read, some))
            good = [image for image in images if isinstance(image, np.ndarray)]
            rows = iter(model.predict(np.stack(good)).top(top) if good else [])
            for file, image in zip(some, images, strict=True):
                corrupt = isinstance(image, CorruptImage)
                yield Line(file, [], str(image)) if corrupt else Line(file, next(rows))


def _text(line: Line) -> str:
    predictions = "  ".join(f"{name} {share:.1%}" for name, share in line.predictions)
    return printable(f"{line.file}: {predictions}")


def _object(line: Line) -> dict[str, object]:
    if line.error:
        return {"file": line.file, "error": line.error}
    predictions = [{"class": name, "probability": finite(p)} for name, p in line.predictions]
    return {"file": line.file, "predictions": predictions}


def _write_sheets(
    sheets: dict[str, Path], model: Classifier, name: str, lines: Sequence[Line]
) -> None:
    good = [line for line in lines if not line.error]
    preprocess = contact_sheet.thumbnails_of(model.preprocess)
    thumbnails = [
        Thumbnail(Path(line.file).name, preprocess.pixels(line.file), line.predictions)
        for line in good[:MOST_ON_A_SHEET]
    ]
    for ending, path in sheets.items():
        if ending == "html":
            write_atomically(path, contact_sheet.page(f"Predictions of {name}", thumbnails))
        else:
            write_atomically(path, contact_sheet.png(thumbnails))
        part = f", the first of {len(good):,}" if len(good) > len(thumbnails) else ""
        print(f"{path}: {len(thumbnails):,} images{part}", file=sys.stderr)
