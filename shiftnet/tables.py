"""Tables and times in plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as lines of columns: the first column to the left, the others to the right.

    Args:
      rows: all of one length; the first holds the titles. Whole numbers get commas.
    """
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(
            [first.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        )
        for first, *rest in texts
    )


def duration(seconds: float) -> str:
    """A time in words, such as `"2 h 5 min"`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
