"""Writes a self-contained HTML page about one or more runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from reftune.results.metrics import CHARACTER, HACKING, LEARNING, MACHINERY, VERDICTS
from reftune.results.page import charts, gallery
from reftune.results.page.drawing import draw
from reftune.results.records import RunResults
from reftune.results.stats import Comparison, Interval
from reftune.results.summary import GREEDY, Group, MethodScore, ScoreTable, leader, score_table
from reftune.results.tables import (
    Headline,
    caption,
    display,
    headline,
    p_text,
    percent,
    points,
    problems,
    remarks,
    rows,
)
from reftune.storage.files import write_atomically

ASSETS = Path(__file__).parent / "assets"


def write_report(groups: Sequence[Group], path: Path) -> None:
    """Write the page to `path`. Runs may be unfinished. Raises: CheckpointError if the page cannot
    be written."""
    write_atomically(path, render_report(groups))


def render_report(groups: Sequence[Group]) -> str:
    """The page's HTML. All text from a model or a data file is escaped: `script_json` escapes the
    text in JSON, and the template escapes all other text."""
    table, runs = score_table(groups), _runs(groups)
    table_head, table_body = rows(table)
    bounds = [end for m in table.methods for score in m.scores.values() for end in score.ci95]
    dev, best = charts.dev_chart(groups), leader(table)
    names = (display(best.label), display(table.baseline)) if best else None
    panels = _panels(groups, table)
    return _template().render(
        css=_asset("page.css"),
        js=_asset("charts.js") + _asset("page.js"),
        data=script_json(_payload(groups, table, dev, panels)),
        heading=_heading(groups, table),
        title_parts=_coloured_parts(headline(table).title, table),
        kicker=_kicker(groups),
        remarks=[line for run in runs for line in remarks(run)],
        live=any(run.missing for run in runs),
        scale=_scale(bounds),
        table=table,
        colours=charts.method_colours([method.label for method in table.methods]),
        votes=_votes(table),
        differences=_difference_rows(table),
        pair=_pair(table),
        equal=charts.equal_compute(dev, *names) if dev and names else "",
        dev=dev,
        draw=draw,
        panels=panels,
        table_head=table_head,
        table_body=table_body,
        caption=caption(table),
        runs=runs,
        recipe_differences=_recipe_differences(groups),
        groups=groups,
    )


@cache
def _template() -> Template:
    """The page's template. It is cached, because compiling it takes longer than rendering it."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "problems": problems,
        "display": display,
        "duration": duration,
        "count": _count,
        "evidence": _evidence,
        "facts": _facts,
        "passes": charts.passes_since_base,
        "plain": _plain,
    }
    return environment.get_template("page.html.j2")


def script_json(value: Any) -> Markup:
    """JSON that is safe inside a script element, because it contains no `<`, `>` or `&`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(name: str) -> Markup:
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def _runs(groups: Sequence[Group]) -> list[RunResults]:
    return [run for group in groups for run in group.runs]


# --- the script's data ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Panel:
    anchor: str
    title: str
    charts: tuple[charts.Chart, ...]

    @property
    def columns(self) -> int:
        """Maximum number of charts in a row, chosen so that a row rarely has only one chart."""
        count = len(self.charts)
        return count if count <= 4 else 4 if count in (7, 8) else 3


def _panels(groups: Sequence[Group], table: ScoreTable) -> list[_Panel]:
    found = [
        ("learning", "Is the model learning?", LEARNING, charts.verdict_charts(groups)),
        ("character", "How is the model's writing changing?", CHARACTER, []),
        ("hacking", "Do right letters come from reasoning?", HACKING, []),
        ("machinery", "Is the machinery healthy?", MACHINERY, []),
        ("time", "Where did the time go?", (), charts.time_charts(groups)),
        ("voting", "Does asking more than once help?", (), charts.voting_charts(table)),
    ]
    panels = []
    for anchor, title, metrics, others in found:
        if drawn := (*charts.training_charts(groups, metrics), *others):
            panels.append(_Panel(anchor=anchor, title=title, charts=drawn))
    return panels


def _payload(
    groups: Sequence[Group], table: ScoreTable, dev: charts.Chart | None, panels: Sequence[_Panel]
) -> dict[str, Any]:
    drawn = [*([dev] if dev else []), *(chart for panel in panels for chart in panel.charts)]
    return {
        "charts": {chart.metric.key: chart.json() for chart in drawn},
        "problems": gallery.problems(table.methods),
        "samples": gallery.samples(groups),
        "verdicts": VERDICTS,
    }


# --- the answer -----------------------------------------------------------------------------------


def _heading(groups: Sequence[Group], table: ScoreTable) -> Headline:
    found = headline(table)
    waiting = ", ".join(dict.fromkeys(display(m) for run in _runs(groups) for m in run.missing))
    if waiting and table.methods:
        return replace(found, text=f"{found.text} Still to come: {waiting}.")
    return found


def _coloured_parts(title: str, table: ScoreTable) -> list[tuple[str, str]]:
    """The title split into parts, each a string with its colour. If the string is a method's name,
    the colour is the method's CSS variable. Otherwise, the colour is an empty string."""
    colours = charts.method_colours([method.label for method in table.methods])
    by_name = {display(label): colour for label, colour in colours.items()}
    longest_first = sorted(map(re.escape, by_name), key=len, reverse=True)
    if not longest_first:
        return [(title, "")]
    return [
        (part, by_name.get(part, ""))
        for part in re.split(rf"\b({'|'.join(longest_first)})\b", title)
        if part
    ]


def _kicker(groups: Sequence[Group]) -> list[str]:
    runs = _runs(groups)
    names = " · ".join(dict.fromkeys(group.label for group in groups))
    seeds = f"seed {runs[0].seed}" if len(runs) == 1 else f"{len(runs)} runs"
    started = str(runs[0].env.get("started", ""))[:10]
    seconds = sum(run.wall_seconds for run in runs)
    return [part for part in (names, seeds, started, duration(seconds) if seconds else "") if part]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """A horizontal axis. Positions are percentages of its width."""

    ticks: tuple[float, ...]
    """Round values, from one end of the axis to the other."""

    def at(self, value: float) -> str:
        return self.width((self.ticks[0], value))

    def width(self, interval: Interval) -> str:
        return f"{100 * (interval[1] - interval[0]) / (self.ticks[-1] - self.ticks[0]):.2f}%"


def _scale(bounds: Iterable[float]) -> _Scale:
    """An axis for accuracies or differences in accuracy. Its ticks are round numbers, and the first
    and the last of them enclose `bounds`."""
    known = [*bounds] or [0.0, 1.0]
    spread = max(known) - min(known)
    step = next((step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if spread / step <= 7), 0.25)
    first, last = int(min(known) // step), -int(-max(known) // step)
    last += first == last
    return _Scale(ticks=tuple(tick * step for tick in range(first, last + 1)))


def _facts(method: MethodScore) -> list[str]:
    dev, seconds = method.dev_accuracy, method.mean("wall_seconds")
    passes = [charts.passes_since_base(run, method.method) for run in method.group.runs]
    known = [each for each in passes if each is not None]
    facts = [
        None if dev is None else f"dev {percent(dev)}",
        None if method.looks is None else f"dev evaluations: {method.looks}",
        f"{_count(mean(known))} training sequences since the base model" if known else None,
        None if seconds is None else f"{duration(seconds)} in its own stage",
    ]
    return [fact for fact in facts if fact is not None]


def _votes(table: ScoreTable) -> str:
    """A text that explains the marks for votes in the chart of accuracies. If there are no votes,
    it is empty."""
    kinds = {rule.partition("@")[0] for method in table.methods for rule in method.votes}
    marks = {
        "maj": "the majority’s answer (diamond)",
        "weighted": "the winner of a vote weighted by the reward model’s scores (circle)",
        "rerank": "the answer that the reward model scores highest (square)",
    }
    return ", ".join(text for kind, text in marks.items() if kind in kinds)


def _difference_rows(table: ScoreTable) -> dict[str, Any] | None:
    """The comparisons of greedy accuracy that involve the baseline or the best method, and an axis
    that includes 0 and the intervals of all these comparisons. Returns None if there are no such
    comparisons."""
    labels, best = {method.label for method in table.methods}, leader(table)
    greedy = [found for found in table.comparisons if {found.a, found.b} <= labels]
    ends = [table.baseline, best.label] if best else [table.baseline]
    shown = dict.fromkeys(found for end in ends for found in greedy if end in (found.a, found.b))
    if not shown:
        return None
    bounds = [bound for found in shown for bound in found.ci95]
    return {"scale": _scale([0.0, *bounds]), "rows": list(shown)}


def _evidence(found: Comparison) -> str:
    p = found.p_value
    return f"{len(found.by_seed)} seeds" if p is None else p_text(p)


def _pair(table: ScoreTable) -> dict[str, Any] | None:
    """Compares the baseline (`b`) with the best other method (`a`, see `leader`). The comparison
    uses the greedy answers of the models trained with the first seed. Returns None if there is no
    other method, or if `table` does not compare the two. `counts` holds the number of problems
    solved by both, only by `a`, only by `b`, and by neither."""
    best = leader(table)
    if best is None or table.between(best.label, table.baseline) is None:
        return None
    base = table.method(table.baseline)
    pairs = list(zip(*(method.outcomes[GREEDY][0] for method in (best, base)), strict=True))
    counts = [pairs.count(pattern) for pattern in ((1, 1), (1, 0), (0, 1), (0, 0))]
    return {"a": best.label, "b": base.label, "counts": counts}


# --- the run --------------------------------------------------------------------------------------


def _recipe_differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each key of `RunResults.settings` in which groups differ, with its values in the order of
    `groups`."""
    flat = [dict(_leaves(group.runs[0].settings)) for group in groups]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    found = ((key, [leaves.get(key, "–") for leaves in flat]) for key in keys)
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the value of every leaf, such as `stages.reft.steps` and `40`."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """A duration such as `4 min 12 s` or `9.5 s`."""
    if seconds is None:
        return "–"
    whole, units = round(seconds), ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
    for (size, unit), (small, small_unit) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {small_unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
