"""Contact sheets: images with their predictions, as one HTML page or one PNG."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shiftnet.inference.preprocessing import Preprocessing

SIDE = 160  # of a thumbnail, in pixels
COLUMNS = 6  # of a PNG
LINES = 3  # predictions below an image in a PNG
_GAP, _LINE = 12, 16  # pixels


class Thumbnail(NamedTuple):
    """An image and its predictions.

    Attributes:
      name: shown above the predictions.
      pixels: uint8 [SIDE, SIDE, 3].
      predictions: class names and probabilities, the most probable first.
    """

    name: str
    pixels: np.ndarray
    predictions: Sequence[tuple[str, float]]


def thumbnails_of(preprocess: Preprocessing) -> Preprocessing:
    """Returns what cuts the same part of an image as `preprocess`, in the size of a thumbnail."""
    return preprocess._replace(size=SIDE, resize=round(SIDE * preprocess.resize / preprocess.size))


def page(title: str, thumbnails: Sequence[Thumbnail]) -> str:
    """Returns a self-contained HTML page."""
    figures = "\n".join(map(_figure, thumbnails))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }}
main {{ display: grid; gap: 1.5em; }}
main {{ grid-template-columns: repeat(auto-fill, minmax({SIDE}px, 1fr)); }}
figure {{ margin: 0; max-width: {SIDE}px; }}
img {{ width: 100%; border-radius: 4px; }}
figcaption b {{ display: block; font-weight: 600; overflow-wrap: anywhere; }}
meter {{ width: 100%; height: 6px; }}
p {{ margin: 4px 0 0; display: flex; justify-content: space-between; gap: 1em; }}
</style>
<h1>{html.escape(title)}</h1>
<main>
{figures}
</main>
</html>
"""


def png(thumbnails: Sequence[Thumbnail]) -> bytes:
    """Returns a PNG: the images in rows of at most `COLUMNS`, with their first predictions."""
    columns = max(min(COLUMNS, len(thumbnails)), 1)
    width, height = SIDE + _GAP, SIDE + _GAP + (1 + LINES) * _LINE
    rows = -(-len(thumbnails) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, thumbnail in enumerate(thumbnails):
        row, column = divmod(place, columns)
        left, top = _GAP + column * width, _GAP + row * height
        sheet.paste(Image.fromarray(thumbnail.pixels), (left, top))
        texts = [(thumbnail.name, "#666666")]
        texts += [(f"{share:5.1%}  {name}", "#000000") for name, share in thumbnail.predictions]
        for line, (text, color) in enumerate(texts[: 1 + LINES]):
            at = (left, top + SIDE + 2 + line * _LINE)
            draw.text(at, _fitted(draw, text), fill=color, font=_font())
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _figure(thumbnail: Thumbnail) -> str:
    file = io.BytesIO()
    Image.fromarray(thumbnail.pixels).save(file, "JPEG", quality=85)
    source = base64.b64encode(file.getvalue()).decode()
    name = html.escape(thumbnail.name)
    lines = "".join(
        f"<p><span>{html.escape(label)}</span><span>{share:.1%}</span></p>"
        f'<meter value="{share:.4f}">{share:.1%}</meter>'
        for label, share in thumbnail.predictions
    )
    return (
        f'<figure><img src="data:image/jpeg;base64,{source}" alt="{name}">'
        f"<figcaption><b>{name}</b>{lines}</figcaption></figure>"
    )


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _fitted(draw: ImageDraw.ImageDraw, text: str) -> str:
    """Shortens a text to the width of a thumbnail."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if draw.textlength(text, font=_font()) <= SIDE:
        return text
    while text and draw.textlength(f"{text}...", font=_font()) > SIDE:
        text = text[:-1]
    return f"{text}..."
