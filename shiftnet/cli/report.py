"""Draws runs and results as a self-contained HTML page, or as tables in Markdown."""

from collections.abc import Sequence

from shiftnet import config as config_lib
from shiftnet.errors import UserError, reported
from shiftnet.files import path_of, write_atomically
from shiftnet.results.report import markdown, page, sources


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Reports on what the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet report", description=__doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a run's working directory, even while it trains, or a folder of results",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the page to write (.html), the figure of accuracy against bytes alone (.svg), or "
        f"Markdown (.md); in an existing Markdown file only the part between the lines "
        f"{markdown.BEGIN} and {markdown.END} is replaced",
    )
    parser.add_argument(
        "--brief", action="store_true", help="write only the rows that were trained (Markdown)"
    )
    arguments = parser.parse_args(argv)
    out = path_of(arguments.out, "--out")
    if out.suffix not in (".html", ".svg", ".md"):
        raise UserError(f"--out {out} must end in .html, .svg or .md")
    if arguments.brief and out.suffix != ".md":
        raise UserError(f"--brief applies to Markdown only: --out must end in .md, found {out}")

    found = sources.find([path_of(path, "PATH") for path in arguments.paths])
    if out.suffix == ".html":
        text = page.render(found)
    elif out.suffix == ".svg":
        text = page.figure(found)
    else:
        text = markdown.into(out, markdown.render(found, brief=arguments.brief))
    write_atomically(out, text)
    print(f"{out}: {len(text.encode()):,} bytes")
    return 0
