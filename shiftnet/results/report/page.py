"""Renders the report as one self-contained HTML page, including the drawing library."""

import datetime
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shiftnet.errors import UserError
from shiftnet.results.report import grids
from shiftnet.results.report.sources import Found

if TYPE_CHECKING:
    from shiftnet.results.report.charts import Chart

FIGURE_WIDTH = 760  # pixels


def render(found: Found) -> str:
    """Returns the page as HTML.

    Raises:
      UserError: if the libraries that draw are not installed.
    """
    try:
        import altair
        import jinja2
        import markupsafe
        import vl_convert

        from shiftnet.results.report import charts
        from shiftnet.results.report import sections as parts
    except ImportError as error:
        raise UserError(
            f"the page needs {error.name}, which is not installed: "
            "pip install altair jinja2 vl-convert-python"
        ) from error
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    template = (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["breakable"] = lambda name: markupsafe.Markup("_<wbr>").join(
        name.split("_")
    )
    environment.filters["drawn"] = lambda chart: markupsafe.Markup(_drawn(chart))
    names = parts.names(found)
    return environment.from_string(template).render(
        title=parts.title(found),
        sections=parts.sections(found),
        colors={name: i for i, name in enumerate(names)} if len(names) <= charts.FEW_RUNS else {},
        empty=(grids.NONE,),
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def figure(found: Found) -> str:
    """Returns the figure of accuracy against bytes on CIFAR-100 as SVG, for a light page.

    Raises:
      UserError: if there is nothing to draw, or the libraries that draw are not installed.
    """
    try:
        import vl_convert

        from shiftnet.results.report import charts
    except ImportError as error:
        raise UserError(
            f"the figure needs {error.name}, which is not installed: "
            "pip install altair vl-convert-python"
        ) from error
    chart = charts.sizes(found)
    if chart is None:
        raise UserError("there is no trained network of CIFAR-100 to draw")
    spec = {**chart.spec, "width": FIGURE_WIDTH, "background": "white"}
    spec["config"] = {"font": "sans-serif", "view": {"stroke": None}}
    return vl_convert.vegalite_to_svg(spec)


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns records by column: one value if all are equal, a list, or texts with indices."""
    columns: dict[str, Any] = {}
    for key in records[0]:
        values = [record[key] for record in records]
        distinct = list(dict.fromkeys(values))
        if len(distinct) == 1:
            columns[key] = distinct[0]
        elif all(isinstance(value, str) for value in distinct):
            numbers = {value: i for i, value in enumerate(distinct)}
            columns[key] = {"texts": distinct, "at": [numbers[value] for value in values]}
        else:
            columns[key] = values
    return {"length": len(records), "columns": columns}


def _drawn(chart: "Chart") -> str:
    """Returns a chart as JSON that is safe inside a script element, whatever its texts."""
    datasets = {name: _columns(records) for name, records in chart.spec["datasets"].items()}
    drawn = {"spec": {**chart.spec, "datasets": datasets}, "square": chart.square}
    return json.dumps(drawn, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
