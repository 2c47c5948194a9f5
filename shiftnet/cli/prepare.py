"""Resizes the images of a folder once, into a few large files that are read faster."""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftnet import config as config_lib
from shiftnet.data import IN_MEMORY
from shiftnet.data.classes import listed
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Prepares the images that the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet prepare", description=__doc__)
    parser.add_argument("dir", metavar="DIR", help="a folder of images, as for data.source=folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must not exist yet")
    parser.add_argument(
        "--side",
        metavar="PIXELS",
        type=int,
        default=256,
        help="what shorter sides are resized to where they are longer (default: 256)",
    )
    parser.add_argument(
        "--format",
        choices=("raw", "jpeg"),
        default="raw",
        help="raw: pixels, about 260 KB an image at 256; jpeg: quality 90 (default: raw)",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="DIR holds the TFDS data set of this name, such as imagenet2012, instead",
    )
    parser.add_argument(
        "--no-exif",
        dest="exif",
        action="store_false",
        help="do not turn images as their EXIF orientation says",
    )
    parser.add_argument(
        "--on-corrupt",
        choices=("error", "skip"),
        default="error",
        help="whether to stop at a file that cannot be decoded, or leave it out (default: error)",
    )
    arguments = parser.parse_args(argv)
    root, out = path_of(arguments.dir, "DIR"), path_of(arguments.out, "OUT")
    if arguments.side < 1:
        raise UserError(f"--side must be at least 1 pixel, found {arguments.side}")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"OUT is {out}, within DIR, whose images would then include its own")
    sources = _sources(root, arguments.dataset, arguments.exif)

    from shiftnet.data import prepared

    start = time.monotonic()
    # A scheduler's SIGTERM ends it as Ctrl-C does, after clearing up.
    former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        written = prepared.write(
            out,
            sources,
            next(iter(sources.values())).class_names,
            side=arguments.side,
            form=arguments.format,
            # TFDS data sets are never turned, and prepared images are as they were prepared.
            exif=any(getattr(source, "exif", False) for source in sources.values()),
            root=root,
            on_corrupt=arguments.on_corrupt,
            report=lambda text: print(text, file=sys.stderr, flush=True),
        )
    finally:
        signal.signal(signal.SIGTERM, former)
    seconds = time.monotonic() - start
    counts = " and ".join(f"{count:,} ({part})" for part, count in written.images.items())
    total = sum(written.images.values())
    print(f"{out}: {counts} images, {written.size / 1e6:,.1f} MB, {total / seconds:.0f} images/s")
    if written.skipped:
        print(f"left out {len(written.skipped)} corrupt files: {listed(written.skipped)}")
    print(f"train on it: --config.data.source=folder --config.data.dir={out}")
    return 0


def _sources(root: Path, dataset: str | None, exif: bool) -> Mapping[str, Any]:
    if dataset is None:
        from shiftnet.data import folder

        return folder.parts(str(root), exif=exif)
    if dataset in IN_MEMORY:
        raise UserError(f"{dataset} is held in memory as it is; expected a data set of image files")
    from shiftnet.data.tfds_source import TfdsSource  # TFDS takes seconds to import

    return {part: TfdsSource(root, dataset, part) for part in ("train", "test")}
