"""Draws charts as SVG. The widths of texts are estimates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from reftune.results.metrics import Unit
from reftune.results.page.charts import Chart, Number, Series

LETTER, BOLD_LETTER = 6.6, 8.0
"""Width in pixels of a letter in an axis label, and of a letter in the name of a line."""
SMALLEST_RANGE = 1e-300
"""If the two ends of an axis are closer than this, they count as equal, because fractions of the
distance between them would round to 0."""
MANY_POINTS = 40
"""A noisy line with more points than this is drawn pale, under its running mean."""
NAME_HEIGHT = 15
LOG_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A drawn chart."""

    svg: Markup
    keys: tuple[tuple[str, str], ...]
    """Colours and names for a legend; empty if the chart needs no legend."""


def draw(chart: Chart, width: int, height: int, *, is_hero: bool = False) -> Drawing:
    """Draw `chart` as SVG in a box of `width` × `height` pixels, which the page may scale. Colours
    are CSS variables. `is_hero` marks the page's main chart."""
    is_area = chart.kind == "area"
    plot = _lay_out(chart, width, height, is_hero)
    marks = _areas(chart, plot) if is_area else _lines(chart, plot)
    svg = tag(
        "svg",
        *_axes(chart, plot),
        *marks,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        style=None if is_hero else f"max-width: {1.3 * width:g}px",
        role="img",
        tabindex=0,
        aria_label=_described(chart),
        data_x=" ".join(f"{v:g}" for v in (plot.left, plot.right, plot.first_x, plot.last_x)),
        data_y=f"{plot.top:g} {plot.bottom:g}",
        data_log=1 if plot.is_log else None,
    )
    has_keys = is_area or (len(chart.series) > 1 and not plot.is_named)
    return Drawing(svg=svg, keys=tuple(_keys(chart)) if has_keys else ())


# --- text -----------------------------------------------------------------------------------------


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An SVG element with escaped text. Write `text_anchor` for `text-anchor`, and `class_` for
    `class`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(map(escape, children))
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, inside)


def shown(value: Number, unit: Unit) -> str:
    """A value as shown on the page: `62.4%`, `0.25 s`, `2·10⁻⁷`."""
    if value is None:
        return "–"
    if unit == "percent":
        return f"{100 * value:.1f}%"
    if unit == "seconds":
        return "<0.001 s" if 0 < value < 0.001 else f"{_plain(value)} s"
    return _plain(value)


def _plain(value: float) -> str:
    if 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e-")
        raised = str(int(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa.removesuffix('.0')}·10⁻{raised}"
    else:
        rounded = round(value) if abs(value) >= 100 else float(f"{value:.3g}")
        text = f"{rounded:,.5f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


def _tick_text(tick: float, unit: Unit, is_last: bool) -> str:
    if unit == "percent":
        return _plain(round(100 * tick, 2)) + "%" * is_last
    return _plain(tick) + " s" * (unit == "seconds" and is_last)


def _described(chart: Chart) -> str:
    known = [(series.label, [y for y in series.y if y is not None]) for series in chart.series]
    unit = chart.metric.unit
    parts = [f"{name} from {shown(y[0], unit)} to {shown(y[-1], unit)}" for name, y in known if y]
    return f"{chart.metric.title}. {'; '.join(parts)}. Use the arrow keys to read values."


def _keys(chart: Chart) -> list[tuple[str, str]]:
    if chart.kind == "line":
        return [(series.colour, series.label) for series in chart.series]
    last = [(series, [y for y in series.y if y is not None]) for series in chart.series]
    return [(s.colour, f"{s.label} {shown(y[-1], chart.metric.unit)}") for s, y in last if any(y)]


# --- positions ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plot:
    """The axes' frame in pixels, and the values at its edges."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    first_x: float
    last_x: float
    is_log: bool
    low: float
    high: float
    ticks: Sequence[float]
    is_hero: bool
    is_named: bool

    def x(self, value: Any) -> Any:
        scale = np.log if self.is_log else np.asarray
        first, last = scale(self.first_x), scale(self.last_x)
        share = (scale(np.asarray(value, dtype=float)) - first) / ((last - first) or 1)
        return self.left + (self.right - self.left) * share

    def y(self, value: Any) -> Any:
        share = (np.asarray(value, dtype=float) - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share


def _values(numbers: Sequence[Number] | None) -> Values:
    """The numbers as an array. NaN stands for None, which is a gap in the line."""
    return np.array([math.nan if y is None else y for y in numbers or ()], dtype=float)


def _lay_out(chart: Chart, width: int, height: int, is_hero: bool) -> _Plot:
    is_area = chart.kind == "area"
    xs = [x for series in chart.series for x in series.x]
    beside = [s for s in chart.series if not is_hero or _ends_late(s, max(xs))]
    name_room = 14 + BOLD_LETTER * max(len(series.label) for series in beside)
    share = 0.36 if width > 420 else 0.26
    fits = width > 560 if is_hero else len(chart.series) > 1 and name_room < share * width
    is_named = fits and not is_area
    low, high = _range(chart)
    ticks = nice_ticks(low, high, 6 if is_hero else 4)
    if not is_area:
        step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
        high = max(high, low + step) + 0.04 * (high - low)
    texts = [_tick_text(tick, chart.metric.unit, tick == ticks[-1]) for tick in ticks]
    return _Plot(
        width=width,
        height=height,
        left=8 + LETTER * max(map(len, texts)),
        right=width - (name_room if is_named else 6),
        top=14,
        bottom=height - 24,
        first_x=0 if not chart.is_log and min(xs) < 0.1 * max(xs) else min(xs),
        last_x=max(xs),
        is_log=chart.is_log,
        low=low,
        high=high,
        ticks=[tick for tick in ticks if tick <= high],
        is_hero=is_hero,
        is_named=is_named,
    )


def _range(chart: Chart) -> tuple[float, float]:
    if chart.kind == "area":
        low, high = 0.0, float(_stacked(chart)[-1].max())
    else:
        lines = [line for s in chart.series for line in (s.y, s.low, s.high)]
        ys = np.concatenate([_values(line) for line in lines])
        ys = ys[~np.isnan(ys)]
        if not len(ys):
            return 0.0, 1.0
        low, high = float(ys.min()), _without_spikes(ys)
    if chart.metric.floor is not None and high > chart.metric.floor:
        low = max(low, chart.metric.floor)
    if not chart.is_log:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < SMALLEST_RANGE:
        high = low + (abs(low) if abs(low) >= SMALLEST_RANGE else 1)
    if (chart.is_log or low < 0) and low != chart.metric.floor:
        low -= 0.05 * (high - low)
    return low, high


def _without_spikes(ys: Values) -> float:
    """The upper end of the vertical axis. Rare spikes may exceed it, so that they do not flatten
    the curve."""
    usual, highest = float(np.quantile(ys, 0.98, method="lower")), float(ys.max())
    return 1.5 * usual if len(ys) > MANY_POINTS and 0 < 4 * usual < highest else highest


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` evenly spaced round numbers between `low` and `high`."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= 0.999 * (high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


# --- elements -------------------------------------------------------------------------------------


def _axes(chart: Chart, plot: _Plot) -> list[Markup]:
    drawn = []
    for tick in plot.ticks:
        text = _tick_text(tick, chart.metric.unit, tick == plot.ticks[-1])
        y = round(plot.y(tick)) + 0.5
        line = "base" if tick == 0 else "grid"
        drawn.append(tag("line", class_=line, x1=px(plot.left), x2=px(plot.right), y1=y, y2=y))
        drawn.append(tag("text", text, x=0, y=y + 4))
    count = max(3, int((plot.right - plot.left) / 110))
    candidates = LOG_TICKS if chart.is_log else nice_ticks(plot.first_x, plot.last_x, count)
    ticks = [tick for tick in candidates if plot.first_x <= tick <= plot.last_x]
    texts = [_step_text(tick, is_short=plot.width <= 560) for tick in ticks]
    places = [float(plot.x(tick)) for tick in ticks]
    texts[-1:] = [f"{text} {chart.metric.axis}" for text in texts[-1:]]
    free = math.inf  # from right to left, each label is drawn unless it would collide
    for x, text in reversed(list(zip(places, texts, strict=True))):
        size = LETTER * len(text)
        left = min(x - size / 2, plot.width - size)
        if left + size + 6 <= free:
            drawn.append(tag("text", text, x=px(left), y=plot.height - 5))
            free = left
    return drawn


def _step_text(value: float, *, is_short: bool) -> str:
    return f"{_plain(value / 1000)}k" if is_short and value >= 10_000 else f"{value:,.0f}"


def px(value: float) -> str:
    """A length as text, rounded to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _path(xs: Values, ys: Values) -> str:
    """An SVG path that breaks at gaps."""
    drawn, pen = "", "M"
    for x, y in zip(xs, ys, strict=True):
        drawn, pen = (drawn, "M") if math.isnan(y) else (f"{drawn}{pen}{x:.1f} {y:.1f}", "L")
    return drawn


def _band(plot: _Plot, xs: Sequence[float], low: Values, high: Values) -> str:
    known = ~(np.isnan(low) | np.isnan(high))
    x, low, high = plot.x(xs)[known], plot.y(low)[known], plot.y(high)[known]
    return _path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])) + "Z"


def _stacked(chart: Chart) -> Values:
    """The upper edge of each layer. Shape (series, points)."""
    return np.cumsum([np.nan_to_num(_values(series.y)) for series in chart.series], axis=0)


def _areas(chart: Chart, plot: _Plot) -> list[Markup]:
    layers = _stacked(chart)
    floors = [np.zeros_like(layers[0]), *layers]
    return [
        tag("path", class_="layer", d=_band(plot, s.x, low, high), style=f"fill: var({s.colour})")
        for s, low, high in zip(chart.series, floors, layers, strict=False)
    ]


def _lines(chart: Chart, plot: _Plot) -> list[Markup]:
    clip = f"clip-{re.sub(r'[^a-zA-Z0-9]', '-', chart.metric.key)}-{plot.width}"
    frame = tag("rect", x=0, y=0, width=plot.width, height=plot.bottom + 1)
    drawn, names = [tag("clipPath", frame, id=clip)], []

    def path(kind: str, d: str, style: str) -> Markup:
        return tag("path", class_=kind, clip_path=f"url(#{clip})", d=d, style=style)

    for series in chart.series:
        stroke, x, y = f"stroke: var({series.colour})", plot.x(series.x), _values(series.y)
        if series.low is not None:
            band = _band(plot, series.x, _values(series.low), _values(series.high))
            drawn.append(path("band", band, f"fill: var({series.colour})"))
        if len(y) > MANY_POINTS and not plot.is_hero and not chart.metric.exact:
            drawn.append(path("raw", _path(x, plot.y(y)), stroke))
            y = _running_mean(y, max(3, round(len(y) / 16)) // 2)
        drawn.append(path("line", _path(x, plot.y(y)), stroke))
        known = np.flatnonzero(~np.isnan(y))
        if len(known):
            names.append(_name(series, float(x[known[-1]]), float(plot.y(y[known[-1]])), plot))
    drawn += [_chosen(series, plot) for series in chart.series if series.mark is not None]
    return [*drawn, *(_written(names, plot) if plot.is_named else ())]


def _running_mean(values: Values, half: int) -> Values:
    known = ~np.isnan(values)
    ones = np.ones(2 * half + 1)
    sums, counts = (np.convolve(x, ones, mode="same") for x in (np.nan_to_num(values), known))
    return np.where(known, sums / np.maximum(counts, 1), math.nan)


def _chosen(series: Series, plot: _Plot) -> Markup:
    assert series.mark is not None
    x, y = series.x[series.mark], series.y[series.mark]
    return tag(
        "circle",
        tag("title", f"{series.label}: the chosen model, {shown(y, 'percent')}"),
        class_="chosen",
        cx=px(plot.x(x)),
        cy=px(plot.y(math.nan if y is None else y)),
        r=5,
        style=f"stroke: var({series.colour})",
    )


@dataclass(slots=True)
class _Name:
    """The name of a line, written at its end."""

    series: Series
    left: float
    y: float

    @property
    def right(self) -> float:
        return self.left + BOLD_LETTER * len(self.series.label)

    def overlaps(self, other: _Name) -> bool:
        return self.left < other.right and other.left < self.right


def _name(series: Series, x: float, y: float, plot: _Plot) -> _Name:
    """The label of a line, placed to the right of the line's end. In the page's main chart, the
    label of a line that ends early is placed above its end."""
    size = BOLD_LETTER * len(series.label)
    if not plot.is_hero or _ends_late(series, plot.last_x):
        return _Name(series, x + 8, y + 4)
    return _Name(series, x - size if x - 10 - size > plot.left else x, y - 10)


def _ends_late(series: Series, last_x: float) -> bool:
    return series.x[-1] >= 0.7 * last_x


def _written(names: Sequence[_Name], plot: _Plot) -> list[Markup]:
    """The names as SVG text. Overlapping names are moved apart: first down, then up if they pass
    the bottom of the plot."""
    names = sorted(names, key=lambda name: name.y)
    for index, name in enumerate(names):
        above = [other.y + NAME_HEIGHT for other in names[:index] if other.overlaps(name)]
        name.y = max([name.y, *above])
    for index, name in reversed(list(enumerate(names))):
        below = [other.y - NAME_HEIGHT for other in names[index + 1 :] if other.overlaps(name)]
        name.y = min([name.y, plot.bottom, *below])
    return [
        tag(
            "text",
            name.series.label,
            class_="name",
            x=px(name.left),
            y=px(name.y),
            style=f"fill: var({name.series.colour})",
        )
        for name in names
    ]
