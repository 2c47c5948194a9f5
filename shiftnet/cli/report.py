"""Draws runs and results: a self-contained HTML page, or the tables in Markdown."""

from collections.abc import Sequence
from pathlib import Path

from shiftnet import config as config_lib
from shiftnet.errors import UserError, reported
from shiftnet.results.report import markdown, page, sources


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Reports on what the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet report", description=__doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a run's working directory, also while it trains, or a folder of results",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="a page to write (.html), or Markdown (.md): of a file that exists only what is "
        f"between the lines {markdown.BEGIN} and {markdown.END}",
    )
    parser.add_argument(
        "--brief", action="store_true", help="Markdown of only the rows that were trained"
    )
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.suffix not in (".html", ".md"):
        raise UserError(f"--out {out} must end in .html or .md")
    if arguments.brief and out.suffix != ".md":
        raise UserError("--brief is for Markdown: give --out a name that ends in .md")

    found = sources.find([Path(path) for path in arguments.paths])
    if out.suffix == ".html":
        text = page.render(found)
    else:
        text = markdown.into(out, markdown.render(found, brief=arguments.brief))
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    print(f"{out}: {len(text.encode()):,} bytes")
    return 0
