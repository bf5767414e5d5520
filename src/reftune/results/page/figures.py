"""The page's main charts as PNG and SVG, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.results.metrics import CHARACTER, LEARNING
from reftune.results.page.charts import (
    PASSES,
    STEPS,
    Chart,
    dev_chart,
    method_colours,
    training_charts,
    voting_charts,
)
from reftune.results.summary import ScoreTable, display, read_groups, score_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ASSETS = Path(__file__).parent / "assets"
INK, SOFT, GRID = "#17191c", "#565d66", "#e4e6e8"
DPI = 200
X_LABELS = {STEPS: "step", PASSES: "sequences trained on"}


def write_figures(run_dirs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """`accuracy` (bars with intervals) and a figure a curve (`dev_accuracy`, `reward_mean`,
    `maj@k`, …), each as .png and .svg.

    Returns the files.

    Raises: DataError if a run is missing, damaged or unfinished, or where runs met different
    problems.
    """
    groups = read_groups(run_dirs)
    table, dev = score_table(groups), dev_chart(groups)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = _save(
        folder / "accuracy",
        lambda axes: _draw_bars(axes, table),
        height=0.9 + 0.42 * len(table.methods),
    )
    curves = training_charts(groups, (*LEARNING, *CHARACTER))
    for chart in [*([dev] if dev else []), *curves, *voting_charts(groups, table)]:
        written += _save(
            folder / chart.key.replace("/", "_"), partial(_draw_curves, chart=chart), height=3.4
        )
    return written


def _save(stem: Path, draw: Callable[[Axes], None], *, height: float) -> list[Path]:
    import matplotlib
    from matplotlib.figure import Figure

    # a fixed salt and no date: the same runs give the same bytes
    style: dict[Any, Any] = {
        "svg.hashsalt": "reftune",
        "svg.fonttype": "none",
        "font.size": 9,
        "text.color": INK,
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), SOFT),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(SOFT)
        axes.tick_params(length=0)
        draw(axes)
        paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=DPI)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_bars(axes: Axes, table: ScoreTable) -> None:
    colours = _hex_colours()
    names = method_colours([method.label for method in table.methods])
    for place, method in enumerate(reversed(table.methods)):
        score, colour = method.greedy, colours[names[method.label]]
        low, high = score.ci95
        axes.barh(place, 100 * score.value, height=0.62, color=colour, alpha=0.85)
        axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=1.2)
        axes.text(
            100 * high + 1,
            place,
            f"{100 * score.value:.1f}",
            va="center",
            color=colour,
            fontweight="bold",
        )
    axes.set_yticks(
        range(len(table.methods)), [display(method.label) for method in reversed(table.methods)]
    )
    axes.set_xlim(0, min(112.0, 100 * max(method.greedy.ci95[1] for method in table.methods) + 10))
    seeds = f", mean of {table.num_seeds} seeds" if table.num_seeds > 1 else ""
    axes.set_xlabel(
        f"greedy accuracy on {table.methods[0].greedy.n:,} {table.split} problems, %{seeds}; lines:"
        " 95 % interval"
    )


def _draw_curves(axes: Axes, chart: Chart) -> None:
    colours = _hex_colours()
    for series in chart.series:
        colour = colours[series.colour]
        y = _scaled(series.y, chart)
        axes.plot(series.x, y, color=colour, linewidth=1.8, label=series.label)
        if series.low is not None and series.high is not None:
            low, high = _scaled(series.low, chart), _scaled(series.high, chart)
            axes.fill_between(series.x, low, high, color=colour, alpha=0.12, linewidth=0)
        if series.mark is not None:
            ring: dict[str, Any] = {
                "markersize": 6,
                "markerfacecolor": "white",
                "markeredgecolor": colour,
                "markeredgewidth": 1.6,
            }
            axes.plot(series.x[series.mark], y[series.mark], marker="o", **ring)
    axes.legend(frameon=False, loc="best", labelcolor="linecolor", handlelength=1.2)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.floor is not None:
        axes.set_ylim(bottom=max(chart.floor, axes.get_ylim()[0]))
    elif chart.zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_ylabel(chart.title + (", %" if chart.unit == "percent" else ""))
    rings = any(series.mark is not None for series in chart.series)
    axes.set_xlabel(
        X_LABELS.get(chart.x_label, chart.x_label) + (" (rings: chosen models)" if rings else "")
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _scaled(values: Sequence[float | None], chart: Chart) -> list[float]:
    """In percent where the chart is."""
    scale = 100 if chart.unit == "percent" else 1
    return [float("nan") if value is None else scale * value for value in values]


def _hex_colours() -> dict[str, str]:
    """The page's own colours on light, so that both show a method alike."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8").split('data-theme="dark"')[0]
    return dict(re.findall(r"(--method-\d): (#[0-9a-f]{6})", css))
