"""Makes the figures of the report, as Vega-Lite specifications.

Colors and fonts are the page's, which has a light and a dark theme: a scale here names what it
distinguishes (`category`, `heatmap`), and the page defines how that looks.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from shiftnet.results.report import sources
from shiftnet.results.report.sources import Confusion, Filled, Found, Run, Training

Records = list[dict[str, Any]]

HEIGHT = 260  # default height in pixels
FEW_RUNS = 8  # more colors than these cannot be told apart
# Ours, what was reported for the same networks, and others'; readable on both themes.
KINDS = ("#d9480f", "#8b949e", "#1a7f8e")
FEW_EPOCHS = 40  # with more, a line's points hide it
NAMED_CLASSES = 20  # most classes whose names fit beside a confusion matrix
MATRIX_CLASSES = 200  # most classes with which a confusion matrix is readable
LISTED_CLASSES = 40  # most bars that have a name beside them


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
      title: its caption, and its description for screen readers.
      spec: Vega-Lite's specification, with the data under `datasets`.
      note: a sentence below it, or `""`.
      wide: whether it takes a row of its own.
      square: whether its height equals its width.
    """

    title: str
    spec: Mapping[str, Any]
    note: str = ""
    wide: bool = False
    square: bool = False


def costs(filled: Filled, families: Sequence[str]) -> list[Chart]:
    """Draws accuracy against parameters, multiply-adds and bytes, as reported and ours.

    Args:
      filled: a table; its rows on a shortened schedule are left out.
      families: all families that have a color.
    """
    reported, ours = [], []
    for row in filled.table.rows:
        outcome = filled.full.get(row.name)
        about = {
            "row": row.name,
            "family": sources.family(row.name),
            "parameters": row.parameters,
            "multiply-adds": row.multiply_adds,
            "bytes": row.bytes,
            "reported": row.reported,
        }
        if row.reported is not None:
            reported.append(about)
        if outcome:
            values = getattr(outcome, filled.table.epoch)
            mean = statistics.mean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            ours.append(
                {
                    **about,
                    "ours": mean,
                    "spread": spread if len(values) > 1 else None,
                    "low": mean - spread,
                    "high": mean + spread,
                    "n": len(values),
                }
            )
    if not reported and not ours:
        return []
    note = "Hollow: reported."
    if ours:
        note += " Filled: ours, ± one standard deviation. A line connects the two."
    return [
        Chart(f"Accuracy against {title}", _cost(reported, ours, cost, families), note, wide=wide)
        for cost, title, wide in (
            ("parameters", "parameters", True),
            ("multiply-adds", "multiply-adds per image", False),
            ("bytes", "bytes, low-bit weights packed", False),
        )
    ]


def _cost(reported: Records, ours: Records, cost: str, families: Sequence[str]) -> dict[str, Any]:
    joined = [record for record in ours if record["reported"] is not None]
    present = {record["family"] for record in [*reported, *ours]}
    legend = alt.Legend(title=None, values=[name for name in families if name in present])
    color = alt.Color("family:N", scale=alt.Scale(domain=families), legend=legend)
    shape = alt.Shape("family:N", scale=alt.Scale(domain=families), legend=legend)
    x = alt.X(
        f"{cost}:Q",
        title=cost,
        scale=alt.Scale(type="log", nice=False, padding=16),
        axis=alt.Axis(format="~s", tickCount=5, grid=False, labelSeparation=12),
    )
    tooltip = [
        alt.Tooltip("row:N"),
        alt.Tooltip("reported:Q", format=".2f", title="reported, %"),
        alt.Tooltip("parameters:Q", format=","),
        alt.Tooltip("multiply-adds:Q", format=","),
        alt.Tooltip("bytes:Q", format=","),
    ]
    measured = [
        *tooltip,
        alt.Tooltip("ours:Q", format=".2f", title="ours, %"),
        alt.Tooltip("spread:Q", format=".2f", title="± standard deviation"),
        alt.Tooltip("n:Q", title="seeds"),
    ]

    def layer(data: str, y: str) -> alt.Chart:
        percent = alt.Y(f"{y}:Q", scale=alt.Scale(zero=False, padding=12), title="top-1, %")
        return alt.Chart(_named(data)).encode(x=x, y=percent, color=color)

    layers = [
        (
            joined,
            layer("joined", "reported")
            .mark_rule(strokeDash=[2, 2], opacity=0.7)
            .encode(y2="ours:Q"),
        ),
        (
            reported,
            layer("reported", "reported")
            .mark_point(filled=False, size=70, strokeWidth=2, opacity=1)
            .encode(shape=shape, tooltip=tooltip),
        ),
        (ours, layer("ours", "low").mark_rule(strokeWidth=2).encode(y2="high:Q")),
        (
            ours,
            layer("ours", "ours")
            .mark_point(filled=True, size=90, opacity=1)
            .encode(shape=shape, tooltip=measured),
        ),
    ]
    drawn = [chart for records, chart in layers if records]
    datasets = {"joined": joined, "reported": reported, "ours": ours}
    return _spec(alt.LayerChart(layer=drawn), datasets)


def sizes(found: Found) -> Chart | None:
    """Draws accuracy against bytes on CIFAR-100: ours, what was reported, and others' networks.

    Returns:
      The figure; None if none of ours is in it.
    """
    kinds = ("trained here", "reported for networks here", "others")
    records: Records = []
    for filled in found.tables:
        for row in filled.table.rows:
            if "_c100" not in row.name:
                continue
            outcome = filled.full.get(row.name)
            if outcome and outcome.kept is not None:
                records.append(_size(row.name, kinds[0], outcome.kept, outcome.kept_bytes))
            if row.reported is not None:
                source = filled.table.source
                records.append(_size(row.name, kinds[1], row.reported, row.bytes, source))
    if not any(record["kind"] == kinds[0] for record in records):
        return None
    labels: set[str] = set()
    for record in sorted(records, key=lambda record: -record["accuracy"]):
        if record["label"] in labels:  # the same row by another recipe, most often beside it
            record["label"] = ""
        labels.add(record["label"])
    for other in found.others:
        records.append(_size(other.name, kinds[2], other.accuracy, other.bytes, other.source))
    records.sort(key=lambda record: -kinds.index(record["kind"]))  # ours above the others
    for record in records:
        record["area"] = (130, 30, 60)[kinds.index(record["kind"])]
    x = alt.X(
        "bytes:Q",
        title="bytes",
        scale=alt.Scale(type="log", nice=False, padding=16),
        axis=alt.Axis(format="~s", tickCount=5, grid=False, labelSeparation=12),
    )
    y = alt.Y("accuracy:Q", title="top-1, %", scale=alt.Scale(zero=False, padding=16))
    scale = alt.Scale(domain=list(kinds), range=list(KINDS))
    legend = alt.Legend(title=None, orient="top", columnPadding=24)
    tooltip = [
        alt.Tooltip("name:N"),
        alt.Tooltip("accuracy:Q", format=".2f", title="top-1, %"),
        alt.Tooltip("bytes:Q", format=","),
        alt.Tooltip("source:N"),
    ]
    color = alt.Color("kind:N", scale=scale, legend=legend)
    shapes = alt.Scale(domain=list(kinds), range=["circle", "square", "triangle-up"])
    base = alt.Chart(_named("records")).encode(x=x, y=y)
    is_ours = f"datum.kind === '{kinds[0]}'"
    points = base.mark_point(filled=True, opacity=1).encode(
        color=color,
        shape=alt.Shape("kind:N", scale=shapes, legend=legend),
        size=alt.Size("area:Q", scale=None, legend=None),
        tooltip=tooltip,
    )
    others = base.transform_filter(f"!({is_ours})").mark_text(
        align="left", dx=7, dy=-6, fontSize=10, opacity=alt.expr("width < 500 ? 0 : 1")
    )
    ours = base.transform_filter(is_ours).mark_text(
        align="left", dx=9, dy=-9, fontSize=12, fontWeight="bold"
    )
    names = [text.encode(text="label:N", color=color) for text in (others, ours)]
    note = (
        "Trained here: the accuracy and the size of the file that is kept, metadata included. "
        "Reported: parameters in float32, low-bit weights packed. Others: as their sources count; "
        "those at 80 % are of the MicroNet challenge of 2019, which RIAIR won."
    )
    spec = _spec(alt.LayerChart(layer=[points, *names]), records, height=420)
    return Chart("Accuracy against bytes on CIFAR-100", spec, note, wide=True)


def _size(
    name: str, kind: str, accuracy: float, size: int, source: str = "results/"
) -> dict[str, Any]:
    """Returns a point of `sizes`; networks that only the originals have are not labelled."""
    label = "" if kind.startswith("reported") else name.removesuffix("_c100")
    return {
        "name": name,
        "kind": kind,
        "accuracy": _short(accuracy),
        "bytes": size,
        "source": source,
        "label": label,
    }


def curves(
    trainings: Sequence[Training], names: Sequence[str], *, means: bool = False
) -> list[Chart]:
    """Draws loss, accuracy and learning rate over the epochs.

    Args:
      trainings: the trainings to compare; those with fewer than two epochs are left out.
      names: of all trainings of the page, each of which has one color on all of it.
      means: draw only the test accuracy, as the mean over each training's seeds.
    """
    trainings = [training for training in trainings if training.epochs_done > 1]
    if not trainings:
        return []
    if means:
        records = [record for training in trainings for record in _mean_accuracies(training)]
        spec = _lines(records, "accuracy", "top-1, %", names)
        title = "Test accuracy over the epochs, mean of the seeds"
        return [Chart(title, spec, wide=True)] if records else []
    losses, accuracies, rates = [], [], []
    for training in trainings:
        for run in training.runs:
            for line in run.lines:
                at = {"run": training.name, "seed": run.seed, "epoch": line["epoch"]}
                for part in ("train", "test"):
                    loss = sources.number(line, f"{part}_loss")
                    accuracy = sources.number(line, f"{part}_accuracy")
                    if loss is not None:
                        losses.append({**at, "part": part, "loss": _short(loss)})
                    if accuracy is not None:
                        accuracies.append({**at, "part": part, "accuracy": _short(100 * accuracy)})
                rate = sources.number(line, "lr")
                if rate is not None and run is training.runs[0]:  # the same for all seeds
                    rates.append({**at, "lr": _short(rate)})
    if len({record["lr"] for record in rates}) == 1:
        rates = []
    drawn = [
        ("Loss", losses, "loss", "cross-entropy"),
        ("Accuracy", accuracies, "accuracy", "top-1, %"),
        ("Learning rate", rates, "lr", "learning rate"),
    ]
    made = []
    for title, records, field, axis in drawn:
        if not records:
            continue
        # A first epoch's loss, or that of one that went wrong, must not flatten all others.
        top = _without_outliers([record["loss"] for record in records]) if field == "loss" else None
        note = "" if top is None else f"Losses above {top:.3g} are beyond the top."
        made.append(
            Chart(f"{title} over the epochs", _lines(records, field, axis, names, top=top), note)
        )
    return made


def _without_outliers(values: Sequence[float]) -> float | None:
    """Returns the largest value that is no outlier; None if there is no outlier above.

    An outlier is farther from the upper quartile than three times the distance between the
    quartiles (Tukey, Exploratory Data Analysis, 1977: "far out").
    """
    if len(values) < 4:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    inside = [value for value in values if value <= upper + 3 * (upper - lower)]
    return max(inside) if len(inside) < len(values) else None


def _mean_accuracies(training: Training) -> Records:
    values: dict[int, list[float]] = {}
    for run in training.runs:
        for line in sources.evaluated(run):
            values.setdefault(line["epoch"], []).append(100 * line["test_accuracy"])
    return [
        {
            "run": training.name,
            "epoch": epoch,
            "accuracy": _short(statistics.mean(found)),
            "seeds": len(found),
        }
        for epoch, found in values.items()
    ]


def recipes(compared: Mapping[str, Sequence[tuple[str, Training]]], names: Sequence[str]) -> Chart:
    """Draws the test accuracy of rows by several recipes, the mean of the seeds.

    Args:
      compared: for each row its trainings, with the words that tell them apart.
      names: as for `curves`.
    """
    records = [
        {**record, "recipe": words}
        for trainings in compared.values()
        for words, training in trainings
        for record in _mean_accuracies(training)
    ]
    words = list(dict.fromkeys(record["recipe"] for record in records))
    dashes = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]]
    dash = alt.StrokeDash(
        "recipe:N",
        scale=alt.Scale(domain=words, range=[dashes[i % len(dashes)] for i in range(len(words))]),
        legend=alt.Legend(title=None),
    )
    spec = _lines(records, "accuracy", "top-1, %", names, strokeDash=dash)
    return Chart("Test accuracy over the epochs, by recipe", spec, wide=True)


def sign_flips(trainings: Sequence[Training], names: Sequence[str]) -> list[Chart]:
    """Draws the fraction of low-bit weights whose sign changed in each epoch, one line per seed.

    Args:
      trainings: those of the figure.
      names: as for `curves`.
    """
    records = [
        {"run": training.name, "seed": run.seed, "epoch": line["epoch"], "share": _short(share)}
        for training in trainings
        for run in training.runs
        for line in run.lines
        if (share := sources.number(_layers(line).get("all", {}), "sign_changed")) is not None
    ]
    if len({record["epoch"] for record in records}) < 2:
        return []
    spec = _lines(records, "share", "fraction of weights", names, percent=True)
    return [Chart("Low-bit weights that changed their sign in an epoch", spec)]


def levels(run: Run) -> list[Chart]:
    """Draws a run's levels of low-bit weights over the epochs and by layer, and sign flips."""
    lines = [line for line in run.lines if _layers(line)]
    if not lines:
        return []
    of = f"seed {run.seed}"
    epochs = [
        {"epoch": line["epoch"], **record}
        for line in lines
        for record in _shares(_layers(line).get("all", {}))
    ]
    last = {name: layer for name, layer in _layers(lines[-1]).items() if name != "all"}
    layers = [
        {"layer": name, **record} for name, layer in last.items() for record in _shares(layer)
    ]
    flips = [
        {"layer": name, "place": place, "epoch": line["epoch"], "share": _short(share)}
        for line in lines
        for place, name in enumerate(last, 1)
        if (share := sources.number(_layers(line).get(name, {}), "sign_changed")) is not None
    ]
    drawn = []
    if len(lines) > 1 and epochs:
        drawn.append(Chart("Levels of all low-bit weights over the epochs", _areas(epochs), of))
    if len(lines) > 1 and flips:
        title = "Weights that changed their sign in an epoch, by layer"
        drawn.append(Chart(title, _layer_lines(flips), of))
    if layers:
        title = "Levels of each layer's weights"
        note = f"{of}, epoch {lines[-1]['epoch']}"
        drawn.append(Chart(title, _layer_bars(layers, len(last)), note, wide=True))
    return drawn


def _layers(line: sources.Line) -> Mapping[str, Mapping[str, Any]]:
    return line.get("weights") or {}


def _shares(layer: Mapping[str, Any]) -> Records:
    shares = layer.get("levels", {})
    return [
        {"level": level, "order": int(level), "share": _short(share)}
        for level, share in shares.items()
    ]


# From the most negative level over zero to the most positive; both themes have room for them.
_NEGATIVE = ("#7f3b08", "#b35806", "#e08214", "#fdb863")
_ZERO = "#969696"
_POSITIVE = ("#92c5de", "#4393c3", "#2166ac", "#053f7c")


def _level_color(records: Records) -> alt.Color:
    found = sorted({record["order"] for record in records})
    negative = [level for level in found if level < 0]
    positive = [level for level in found if level > 0]
    # With few levels, take the middle of each ramp, which stands out most.
    start = 2 if max(len(negative), len(positive)) == 1 else 1
    colors = [
        *(_NEGATIVE[::-1][start - 1 :][: len(negative)][::-1]),
        *([_ZERO] if 0 in found else []),
        *(_POSITIVE[start - 1 :][: len(positive)]),
    ]
    scale = alt.Scale(domain=[str(level) for level in found], range=colors)
    return alt.Color("level:N", scale=scale, sort=None, legend=alt.Legend(title="level"))


def _areas(records: Records) -> dict[str, Any]:
    chart = (
        alt.Chart(_named("records"))
        .mark_area()
        .encode(
            x=_epochs(records),
            y=alt.Y("share:Q", stack="normalize", title="fraction of weights", axis=_PERCENT),
            color=_level_color(records),
            order=alt.Order("order:Q"),
            tooltip=["level:N"],
        )
    )
    return _spec(chart, records)


def _layer_bars(records: Records, layers: int) -> dict[str, Any]:
    chart = (
        alt.Chart(_named("records"))
        .mark_bar()
        .encode(
            x=alt.X("share:Q", stack="normalize", title="fraction of weights", axis=_PERCENT),
            y=alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(labelLimit=130)),
            color=_level_color(records),
            order=alt.Order("order:Q"),
            tooltip=["layer:N", "level:N", alt.Tooltip("share:Q", format=".2%")],
        )
    )
    return _spec(chart, records, height=layers * (18 if layers <= 40 else 12))


def _layer_lines(records: Records) -> dict[str, Any]:
    layers = max(record["place"] for record in records)
    shown = sorted({1, (1 + layers) // 2, layers})
    legend = alt.Legend(title="layer, from the first", values=shown, format="d")
    place = alt.Color("place:Q", scale=alt.Scale(range="ramp"), legend=legend)
    tooltip = ["layer:N", "epoch:Q", alt.Tooltip("share:Q", format=".2%")]
    y = alt.Y("share:Q", title="fraction of weights", axis=_PERCENT)
    lines = _hovered(records, y, tooltip, color=place, detail="layer:N", width=1.5)
    return _spec(lines, records)


def per_class(confusion: Confusion, run: str, names: Sequence[str]) -> Chart:
    """Draws the accuracy of every class that has images, from the worst to the best.

    Args:
      confusion: of the run.
      run: its name.
      names: as for `curves`.
    """
    images, right = _totals(confusion)
    ranked = sorted(images, key=lambda label: right.get(label, 0) / images[label])
    records = [
        {
            "class": confusion.class_names[label],
            "rank": rank,
            "run": run,
            "accuracy": _short(right.get(label, 0) / images[label]),
            "images": images[label],
        }
        for rank, label in enumerate(ranked, 1)
    ]
    tooltip = ["class:N", alt.Tooltip("accuracy:Q", format=".1%"), "images:Q"]
    scale = alt.Scale(domain=[0, 1])
    one = names if len(names) <= FEW_RUNS else [run]
    color = alt.Color("run:N", scale=alt.Scale(domain=list(one)), legend=None)
    if len(records) <= LISTED_CLASSES:
        bars = (
            alt.Chart(_named("records"))
            .mark_bar()
            .encode(
                x=alt.X("accuracy:Q", title="accuracy", axis=_PERCENT, scale=scale),
                y=alt.Y("class:N", sort=None, title=None, axis=alt.Axis(labelLimit=130)),
                color=color,
                tooltip=tooltip,
            )
        )
        spec = _spec(bars, records, height=len(records) * 18)
    else:
        bars = (
            alt.Chart(_named("records"))
            .mark_bar()
            .encode(
                x=alt.X(
                    "rank:O",
                    title="classes, worst first",
                    axis=alt.Axis(labels=False, ticks=False),
                    scale=alt.Scale(paddingInner=0.1 if len(records) <= MATRIX_CLASSES else 0),
                ),
                y=alt.Y("accuracy:Q", title="accuracy", axis=_PERCENT, scale=scale),
                color=color,
                tooltip=tooltip,
            )
        )
        spec = _spec(bars, records)
    return Chart("Accuracy by class", spec, confusion.of, wide=True)


def matrix(confusion: Confusion) -> Chart | None:
    """Draws the confusion matrix; returns None if it has too many classes to be readable."""
    names = confusion.class_names
    if len(names) > MATRIX_CLASSES:
        return None
    images, _ = _totals(confusion)
    records = [
        {
            "label": names[label],
            "prediction": names[prediction],
            "images": count,
            "share": _short(count / images[label]),
        }
        for label, prediction, count in confusion.counts
    ]
    shown = len(names) <= NAMED_CLASSES
    axis = alt.Axis(labels=shown, ticks=shown, labelLimit=90, labelOverlap=False, grid=False)
    scale = alt.Scale(domain=list(names))
    chart = (
        alt.Chart(_named("records"))
        .mark_rect()
        .encode(
            x=alt.X("prediction:N", title="predicted", scale=scale, axis=axis),
            y=alt.Y("label:N", title="class", scale=scale, axis=axis),
            color=alt.Color(
                # A square-root scale, because nearly everything is on the diagonal.
                "share:Q",
                scale=alt.Scale(type="sqrt", domain=[0, 1], range="heatmap"),
                legend=alt.Legend(
                    title="fraction of the class", format=".0%", values=[0, 0.1, 0.5, 1]
                ),
            ),
            tooltip=[
                alt.Tooltip("label:N", title="class"),
                alt.Tooltip("prediction:N", title="predicted"),
                "images:Q",
                alt.Tooltip("share:Q", title="fraction of the class", format=".1%"),
            ],
        )
    )
    note = f"{confusion.of}; colors on a square-root scale"
    return Chart("Confusion matrix", _spec(chart, records), note, wide=True, square=True)


def _totals(confusion: Confusion) -> tuple[dict[int, int], dict[int, int]]:
    """Returns the images of each class that has any, and how many were predicted correctly."""
    images: dict[int, int] = {}
    right: dict[int, int] = {}
    for label, prediction, count in confusion.counts:
        images[label] = images.get(label, 0) + count
        if label == prediction:
            right[label] = right.get(label, 0) + count
    return images, right


_PERCENT = alt.Axis(format="~%", tickCount=5)


def _lines(
    records: Records,
    field: str,
    axis: str,
    names: Sequence[str],
    *,
    percent: bool = False,
    top: float | None = None,
    **encoding: Any,
) -> dict[str, Any]:
    """Draws a field over the epochs: one line per seed, one color per run, or family if many.

    Args:
      records: the points.
      field: the one to draw.
      axis: its title.
      names: of all runs that have a color on the page.
      percent: whether the field is a fraction.
      top: of the axis; None: the largest value.
      encoding: of the lines, besides.
    """
    by, colored = "run", list(names)
    if len(names) > FEW_RUNS:
        records = [{**record, "family": sources.family(record["run"])} for record in records]
        by, colored = "family", list(dict.fromkeys(map(sources.family, names)))
    present = {record[by] for record in records}
    shown = [name for name in colored if name in present]
    color = alt.Color(
        f"{by}:N",
        scale=alt.Scale(domain=colored),
        legend=alt.Legend(title=None, values=shown) if len(shown) > 1 else None,
    )
    keys = [key for key in ("run", "recipe", "seed", "part", "epoch", "seeds") if key in records[0]]
    tooltip = [alt.Tooltip(f"{key}:{'Q' if key == 'epoch' else 'N'}") for key in keys]
    tooltip.append(alt.Tooltip(f"{field}:Q", format=".2%" if percent else ".4~r"))
    detail = [f"{key}:N" for key in ("run", "recipe", "seed") if key in keys]
    more: dict[str, Any] = {"detail": detail, **encoding}
    if "part" in keys:
        more["strokeDash"] = alt.StrokeDash(
            "part:N",
            scale=alt.Scale(domain=["test", "train"], range=[[1, 0], [4, 3]]),
            legend=alt.Legend(title=None),
        )
    look: dict[str, Any]
    if percent:
        look = {"scale": alt.Scale(zero=True), "axis": _PERCENT}
    elif field == "lr" and (powers := _powers([record["lr"] for record in records])):
        look = {"scale": alt.Scale(type="log"), "axis": alt.Axis(values=powers)}
    else:
        lowest = min(record[field] for record in records)
        scale = alt.Scale(zero=False) if top is None else alt.Scale(domain=[lowest, top], nice=True)
        look = {"scale": scale, "axis": alt.Axis(tickCount=5)}
    y = alt.Y(f"{field}:Q", title=axis, **look)
    lines = _hovered(
        records, y, tooltip, step=field == "lr", clip=top is not None, color=color, **more
    )
    return _spec(lines, records)


def _powers(values: Sequence[float]) -> list[float]:
    """Returns the powers of ten to mark on a logarithmic axis; none if a linear axis will do."""
    low, high = min(values), max(values)
    if low <= 0 or high < 30 * low:
        return []
    return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _hovered(
    records: Records,
    y: alt.Y,
    tooltip: Sequence[Any],
    *,
    width: float = 2,
    step: bool = False,
    clip: bool = False,
    **encoding: Any,
) -> alt.LayerChart:
    """Draws lines over the epochs; the point nearest to the pointer shows its values."""
    x = _epochs(records)
    few = len({record["epoch"] for record in records}) <= FEW_EPOCHS
    base = alt.Chart(_named("records")).encode(x=x, y=y, **encoding)
    nearest = alt.selection_point(nearest=True, on="pointerover", clear="pointerout", empty=False)
    points = alt.Chart(_named("records")).encode(x=x, y=y, color=encoding["color"])
    layers = [
        base.mark_line(strokeWidth=width, interpolate="step" if step else "linear", clip=clip),
        points.mark_point(filled=True, opacity=1, clip=clip)
        .encode(
            size=alt.condition(nearest, alt.value(110), alt.value(24 if few else 0)),
            tooltip=list(tooltip),
        )
        .add_params(nearest),
    ]
    return alt.LayerChart(layer=layers)


def _epochs(records: Iterable[Mapping[str, Any]]) -> alt.X:
    epochs = [record["epoch"] for record in records]
    first, last = min(epochs), max(epochs)
    ticks = {"values": list(range(first, last + 1))} if last - first < 10 else {"tickCount": 8}
    return alt.X(
        "epoch:Q",
        scale=alt.Scale(domain=[first, last], nice=False),
        axis=alt.Axis(format="d", grid=False, **ticks),
        title="epoch",
    )


def _named(name: str) -> alt.NamedData:
    """Names data that `_spec` adds later, since Altair would copy and check every record."""
    return alt.NamedData(name=name)


def _short(value: float) -> float:
    """Rounds to the digits that a figure can show."""
    return float(f"{value:.5g}")


def _spec(
    chart: alt.Chart | alt.LayerChart, data: Records | Mapping[str, Records], height: int = HEIGHT
) -> dict[str, Any]:
    """Returns the specification with its data: records, or several sets by the chart's names."""
    datasets = data if isinstance(data, Mapping) else {"records": data}
    spec = chart.properties(width="container", height=height).to_dict()
    return {**spec, "datasets": {name: found for name, found in datasets.items() if found}}
