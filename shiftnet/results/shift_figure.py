"""A figure of learned shifts: the offset of every channel, a panel per layer."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from shiftnet.layers.learned_shift import REACH

CELL = 16  # pixels of the figure for one of the image
GAP = 24  # between panels, for their names
ACROSS = 6  # panels in a row


class Offsets(NamedTuple):
    """Where the channels of a layer read from, in pixels, `[channels]` each."""

    rows: np.ndarray
    columns: np.ndarray


def svg(layers: Mapping[str, Offsets]) -> str:
    """Returns the figure as SVG: dots at the offsets, their areas by the share of channels."""
    side = CELL * (2 * REACH + 1)
    across = min(ACROSS, len(layers))
    width = across * (side + GAP) + GAP
    height = -(-len(layers) // across) * (side + GAP) + GAP
    panels = [
        _panel(name, offsets, GAP + i % across * (side + GAP), i // across * (side + GAP) + GAP)
        for i, (name, offsets) in enumerate(layers.items())
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="9">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{"".join(panels)}</svg>\n'
    )


def _panel(name: str, offsets: Offsets, x: int, y: int) -> str:
    side, middle = CELL * (2 * REACH + 1), CELL * (2 * REACH + 1) / 2
    lines = "".join(f"M{CELL * i},0V{side}M0,{CELL * i}H{side}" for i in range(2 * REACH + 2))
    places = np.clip(np.stack(offsets), -REACH, REACH)
    counts = Counter(zip(*places.round(2).tolist(), strict=True))
    dots = "".join(
        f'<circle cx="{middle + CELL * column:.1f}" cy="{middle + CELL * row:.1f}" '
        f'r="{max(1.2, CELL * (count / len(offsets.rows)) ** 0.5):.1f}"/>'
        for (row, column), count in sorted(counts.items())
    )
    return (
        f'<g transform="translate({x},{y})"><title>{escape(name)}</title>'
        f'<text y="-5">{escape(name)}</text><path d="{lines}" stroke="#ddd" fill="none"/>'
        f'<path d="M{middle},0V{side}M0,{middle}H{side}" stroke="#999" fill="none"/>'
        f'<g fill="#1f77b4" fill-opacity="0.6">{dots}</g></g>\n'
    )
