"""Writes the page's main charts as SVG and PNG files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from reftune.results.metrics import CHARACTER, LEARNING
from reftune.results.page.charts import dev_chart, method_colours, training_charts, voting_charts
from reftune.results.page.drawing import LETTER, draw, px, tag
from reftune.results.summary import ScoreTable, read_groups, score_table
from reftune.results.tables import display, percent, problems
from reftune.storage.files import writing

LOG = logging.getLogger(__name__)
ASSETS = Path(__file__).parent / "assets"
WIDTH, HEIGHT, TITLE = 680, 320, 30
ZOOM = 2
"""Pixels of the PNG per pixel of the SVG."""
ROW, BAR = 34, 26
"""Height of a bar in pixels: with the gap below it, and without the gap."""


def write_figures(run_dirs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """Plot the runs, and save each figure in `folder` as .png and .svg: the bar chart `accuracy`,
    and line charts such as `dev_accuracy` and `maj@k`. Returns: the paths. Raises: DataError if a
    run is missing, damaged or unfinished, or if runs are not comparable; CheckpointError if the
    folder cannot be written. Logs a warning if no font is installed for the text in the PNGs."""
    groups = read_groups(run_dirs)
    table, dev = score_table(groups), dev_chart(groups)
    curves = [
        *filter(None, [dev]),
        *training_charts(groups, (*LEARNING, *CHARACTER)),
        *voting_charts(table),
    ]
    bars = {"accuracy": _bars(table)} if table.methods else {}
    figures = bars | {
        chart.metric.key.replace("/", "_"): _titled(
            chart.metric.title, draw(chart, WIDTH, HEIGHT, is_hero=True).svg, HEIGHT
        )
        for chart in curves
    }
    if _png(_titled("A", Markup(), 0)) == _png(_titled("", Markup(), 0)):
        LOG.warning("the PNG figures have no text: no known font; install one such as DejaVu Sans")
    with writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [path for name, svg in figures.items() for path in _save(Path(folder) / name, svg)]


def _png(svg: str) -> bytes:
    import resvg_py

    return resvg_py.svg_to_bytes(svg_string=svg, zoom=ZOOM, background="white")


def _save(stem: Path, svg: str) -> list[Path]:
    png, vector = stem.with_suffix(".png"), stem.with_suffix(".svg")
    vector.write_text(svg, encoding="utf-8")
    png.write_bytes(_png(svg))
    return [png, vector]


def _titled(title: str, drawing: Markup, height: int) -> str:
    """A complete SVG file: a title above the drawing, in the colours of the page's light theme."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    values = dict(re.findall(r"(--[\w-]+): ([^;]+);", css.partition("data-theme")[0]))
    rules = "\n".join(re.findall(r"^\.chart (?:text|\.).*$", css, re.MULTILINE))
    rules = rules.replace(".chart ", "")
    page = tag(
        "svg",
        tag("style", Markup(rules)),
        tag("text", title, x=0, y=14, class_="title"),
        tag("g", drawing, transform=f"translate(0 {TITLE})"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height + TITLE}",
        width=WIDTH,
        height=height + TITLE,
    )
    return re.sub(r"var\((--[\w-]+)\)", lambda found: values[found[1]], page)


def _bars(table: ScoreTable) -> str:
    """A bar chart of greedy accuracies. The line through the end of each bar is the 95%
    interval."""
    colours = method_colours([method.label for method in table.methods])
    names = [display(method.label) for method in table.methods]
    left = 14 + LETTER * max(map(len, names))
    longest = max(method.greedy.ci95[1] for method in table.methods) or 1.0
    scale = (WIDTH - left - 60) / longest
    drawn = []
    for index, (method, name) in enumerate(zip(table.methods, names, strict=True)):
        score, top, fill = method.greedy, index * ROW, f"fill: var({colours[method.label]})"
        low, high = (left + scale * bound for bound in score.ci95)
        middle, length = top + ROW // 2 - 4, scale * score.accuracy
        share = percent(score.accuracy)
        drawn += [
            tag("text", name, x=0, y=middle + 4),
            tag("rect", x=px(left), y=top, width=px(length), height=BAR, style=fill),
            tag("line", class_="cross", x1=px(low), x2=px(high), y1=middle, y2=middle),
            tag("text", share, class_="name", x=px(high + 8), y=middle + 4, style=fill),
        ]
    seeds = f", mean of {table.num_seeds} seeds" if table.num_seeds > 1 else ""
    title = (
        f"Greedy accuracy on {problems(table.methods[0].greedy.n, table.split)}{seeds}, with"
        " 95% intervals"
    )
    return _titled(title, Markup("").join(drawn), ROW * len(names))
