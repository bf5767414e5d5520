"""What the report draws, as plain data: learning curves, shares, voting curves. No pixels here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from reftune.results.metrics import PHASES, VERDICTS, VOTING, Metric, Unit
from reftune.results.records import MetricRow, RunResults, StageResults
from reftune.results.stats import wilson
from reftune.results.summary import Group, ScoreTable, display, num_samples, voting_curves

MAX_POINTS = 300
"""Points per series; longer ones are averaged in buckets, so that a day's run stays a small
page."""

STEPS, PASSES = "steps", "sequences"
"""Names of the horizontal axes."""

Number = float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line, or one layer of an area."""

    label: str
    colour: str
    """Name of a CSS variable."""
    x: list[float]
    y: list[Number]
    low: list[Number] | None = None
    high: list[Number] | None = None
    mark: int | None = None
    """Index of the point whose model was chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One panel."""

    key: str
    title: str
    explain: str
    """One sentence for a student."""
    series: tuple[Series, ...]
    kind: Literal["line", "area"] = "line"
    x_label: str = STEPS
    unit: Unit = "number"
    log_x: bool = False
    zero: bool = True
    """Whether the axis must hold 0."""
    floor: float | None = None
    """The axis goes no lower."""
    exact: bool = False
    """Drawn as it is, without a running mean, however many points there are."""

    def json(self) -> dict[str, Any]:
        """What the page's script needs to read values off."""
        series = [{"label": s.label, "colour": s.colour, "x": s.x, "y": s.y} for s in self.series]
        return {"x_label": self.x_label, "unit": self.unit, "series": series}


# --- colours --------------------------------------------------------------------------------------

_COLOURS = {"warmup": 0, "sft": 1, "reft": 2, "offline_st": 3, "online_st": 4, "reft_modern": 5}
NUM_COLOURS = 8


def method_colours(labels: Sequence[str]) -> dict[str, str]:
    """Label → CSS variable. A known method always has its own; in comparisons of several recipes
    they go in turn."""
    if any("/" in label for label in labels):
        return {
            label: f"--method-{1 + index % (NUM_COLOURS - 1)}" for index, label in enumerate(labels)
        }
    spare = iter(
        index
        for index in range(NUM_COLOURS)
        if index not in [_COLOURS.get(label) for label in labels]
    )
    return {
        label: f"--method-{_COLOURS[label] if label in _COLOURS else next(spare, 7)}"
        for label in labels
    }


def entry_labels(groups: Sequence[Group]) -> list[str]:
    """Every stage of every group, named as in the score table."""
    return [_label(groups, group, name) for group in groups for name in group.runs[0].stages]


def _label(groups: Sequence[Group], group: Group, method: str) -> str:
    return f"{group.label}/{method}" if len(groups) > 1 else method


# --- curves over training -------------------------------------------------------------------------


def training_charts(groups: Sequence[Group], metrics: Sequence[Metric]) -> list[Chart]:
    """A chart for each metric that some stage has measured; several seeds become their mean with a
    band."""
    colours = method_colours(entry_labels(groups))
    charts = []
    for metric in metrics:
        series = [
            _metric_series(group, name, metric, _label(groups, group, name), colours)
            for group in groups
            for name, stage in group.runs[0].stages.items()
            if stage.num_samples > 1 or not metric.of_groups
        ]
        drawn = tuple(found for found in series if len(found.x) > 1)
        if drawn:
            charts.append(_metric_chart(metric, drawn))
    return charts


def _metric_chart(metric: Metric, series: tuple[Series, ...]) -> Chart:
    return Chart(
        key=metric.key,
        title=metric.title,
        explain=metric.explain,
        series=series,
        unit=metric.unit,
        x_label=PASSES if metric.over_passes else STEPS,
        floor=metric.floor,
        exact=metric.exact,
    )


def _metric_series(
    group: Group, method: str, metric: Metric, label: str, colours: Mapping[str, str]
) -> Series:
    x, by_run = _aligned([run.stages[method] for run in group.runs], metric.key)
    if metric.over_passes:
        x = _passes_at(group.runs[0], method, x)
    series = Series(label=display(label), colour=colours[label], x=x, y=_clean(by_run.mean(axis=0)))
    if len(by_run) > 1:
        series = replace(series, low=_clean(by_run.min(axis=0)), high=_clean(by_run.max(axis=0)))
    return _thinned(series)


def _passes_at(run: RunResults, method: str, steps: Sequence[float]) -> list[float]:
    before = _passes_before(run, method)
    by_step = {
        row.step: row.values.get("compute/sequence_passes", float(row.step))
        for row in run.stages[method].metrics
    }
    return [before + by_step[int(step)] for step in steps]


def _aligned(
    stages: Sequence[StageResults], metric: str
) -> tuple[list[float], np.ndarray[Any, Any]]:
    """Steps at which every run measured `metric`, and its values (runs, steps)."""
    by_run = [
        {row.step: row.values[metric] for row in stage.metrics if metric in row.values}
        for stage in stages
    ]
    steps = sorted(set.intersection(*(set(found) for found in by_run))) if by_run else []
    values = np.array([[found[step] for step in steps] for found in by_run], dtype=float).reshape(
        len(by_run), len(steps)
    )
    return [float(step) for step in steps], values


def _clean(values: Sequence[float] | np.ndarray[Any, Any]) -> list[Number]:
    """Five digits are plenty on a screen; what is not finite is not drawn."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in map(float, values)]


def _thinned(series: Series) -> Series:
    if len(series.x) <= MAX_POINTS:
        return series
    buckets = np.array_split(np.arange(len(series.x)), MAX_POINTS)

    def means(values: Sequence[Number] | None) -> list[Number] | None:
        if values is None:
            return None
        known = [
            [value for index in bucket if (value := values[index]) is not None]
            for bucket in buckets
        ]
        return _clean([float(np.mean(bucket)) if bucket else math.nan for bucket in known])

    x = [float(np.mean([series.x[index] for index in bucket])) for bucket in buckets]
    y = means(series.y)
    assert y is not None
    return replace(series, x=x, y=y, low=means(series.low), high=means(series.high))


# --- the main curve -------------------------------------------------------------------------------


def dev_chart(groups: Sequence[Group]) -> Chart | None:
    """Dev accuracy over gradient sequence passes since the base model, all stages on one axis; None
    before the first look."""
    colours = method_colours(entry_labels(groups))
    series = [
        _dev_series(group, name, _label(groups, group, name), colours)
        for group in groups
        for name, stage in group.runs[0].stages.items()
        if stage.kind != "reward_model"  # its dev accuracy is a reranker's
    ]
    drawn = tuple(found for found in series if found is not None)
    if not drawn:
        return None
    several = any(len(group.runs) > 1 for group in groups)
    band = (
        "The band spans the lowest and highest seed."
        if several
        else "The band is the 95 % interval of each point."
    )
    return Chart(
        key="dev/accuracy",
        title="Accuracy on dev problems, by training effort",
        explain=(
            "Greedy accuracy against sequences passed backward through the model since training"
            f" began. {band}"
        ),
        series=drawn,
        x_label=PASSES,
        unit="percent",
    )


def _dev_series(group: Group, method: str, label: str, colours: Mapping[str, str]) -> Series | None:
    by_run = [_dev_points(run, method) for run in group.runs]
    length = min((len(points) for points in by_run), default=0)
    if length == 0:
        return None
    cut = np.array([points[:length] for points in by_run])  # (runs, points, 4)
    x, y, low, high = cut.mean(axis=0).T
    if len(by_run) > 1:
        low, high = cut[..., 1].min(axis=0), cut[..., 1].max(axis=0)
    return Series(
        label=display(label),
        colour=colours[label],
        x=[float(value) for value in x],
        y=_clean(y),
        low=_clean(low),
        high=_clean(high),
        mark=_chosen_index(group.runs[0], method) if len(by_run) == 1 else None,
    )


def _dev_points(run: RunResults, method: str) -> list[tuple[float, float, float, float]]:
    """(passes, accuracy, low, high) of each look, beginning with the model that the stage started
    from."""
    before = _passes_before(run, method)
    return [
        _dev_point(row, before) for row in [*_start_rows(run, method), *_looks(run.stages[method])]
    ]


def _dev_point(row: MetricRow, before: float) -> tuple[float, float, float, float]:
    accuracy, n = row.values["dev/accuracy"], int(row.values.get("dev/n", 0))
    low, high = wilson(round(accuracy * n), n) if n else (accuracy, accuracy)
    return before + row.values.get("compute/sequence_passes", float(row.step)), accuracy, low, high


def _looks(stage: StageResults) -> list[MetricRow]:
    """Rows with a dev accuracy; for a snapshot, the one in its `stage.json`."""
    if stage.metrics or stage.chosen_step is None:
        return [row for row in stage.metrics if "dev/accuracy" in row.values]
    names = {
        "dev_accuracy": "dev/accuracy",
        "dev_n": "dev/n",
        "sequence_passes": "compute/sequence_passes",
    }
    values = {
        metric: float(stage.info[key])
        for key, metric in names.items()
        if stage.info.get(key) is not None
    }
    return (
        [MetricRow(step=stage.chosen_step, time=0.0, values=values)]
        if "dev/accuracy" in values
        else []
    )


def _start_rows(run: RunResults, method: str) -> list[MetricRow]:
    """The chosen point of the stage that `method` starts from, as its own point 0, unless it looked
    there itself."""
    looks = _looks(run.stages[method])
    start = _chosen_row(run, run.stages[method].init)
    if start is None or not run.stages[method].metrics or not looks or looks[0].step == 0:
        return []
    return [
        MetricRow(step=0, time=start.time, values={**start.values, "compute/sequence_passes": 0.0})
    ]


def _chosen_row(run: RunResults, method: str) -> MetricRow | None:
    stage = run.stages.get(method)
    if stage is None:
        return None
    return next((row for row in _looks(stage) if row.step == stage.chosen_step), None)


def _chosen_index(run: RunResults, method: str) -> int | None:
    chosen = _chosen_row(run, method)
    return (
        None
        if chosen is None
        else _looks(run.stages[method]).index(chosen) + len(_start_rows(run, method))
    )


def _passes_before(run: RunResults, method: str) -> float:
    """Passes that made the model which `method` starts from."""
    init = run.stages[method].init
    if init not in run.stages or init == method:
        return 0.0
    chosen = _chosen_row(run, init)
    own = chosen.values.get("compute/sequence_passes") if chosen is not None else None
    return _passes_before(run, init) + float(
        own if own is not None else run.stages[init].info.get("sequence_passes", 0)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualCompute:
    """Two methods after as many gradient passes."""

    a: str
    b: str
    passes: float
    best_a: float
    best_b: float


def equal_compute(chart: Chart, a: str, b: str) -> EqualCompute | None:
    """The best dev accuracy of `a` and `b` within the passes that both have had; None if one is not
    drawn."""
    found = {series.label: series for series in chart.series}
    if a not in found or b not in found:
        return None
    passes = min(found[a].x[-1], found[b].x[-1])
    best_a, best_b = _best_until(found[a], passes), _best_until(found[b], passes)
    if best_a is None or best_b is None:
        return None
    return EqualCompute(a=a, b=b, passes=passes, best_a=best_a, best_b=best_b)


def _best_until(series: Series, passes: float) -> float | None:
    reached = [y for x, y in zip(series.x, series.y, strict=True) if x <= passes and y is not None]
    return max(reached, default=None)


# --- shares ---------------------------------------------------------------------------------------


def verdict_charts(groups: Sequence[Group]) -> list[Chart]:
    """Verdict shares over steps, a chart for each stage that samples."""
    layers = [
        (f"verdict/{verdict}", words, f"--verdict-{verdict}") for verdict, words in VERDICTS.items()
    ]
    explain = "Share of each verdict among sampled solutions, step by step."
    return _area_charts(groups, layers, title="Verdicts", explain=explain, unit="percent")


def time_charts(groups: Sequence[Group]) -> list[Chart]:
    """Seconds per step by phase, a chart for each stage."""
    layers = [
        (metric, words, f"--phase-{index}") for index, (metric, words) in enumerate(PHASES.items())
    ]
    explain = (
        "Seconds each step took: writing solutions, grading them, scoring their tokens, updating"
        " weights."
    )
    return _area_charts(groups, layers, title="Time", explain=explain, unit="seconds")


def _area_charts(
    groups: Sequence[Group],
    layers: Sequence[tuple[str, str, str]],
    *,
    title: str,
    explain: str,
    unit: Unit,
) -> list[Chart]:
    charts = []
    for group in groups:
        for name in group.runs[0].stages:
            stages = [run.stages[name] for run in group.runs]
            found = [(words, colour, *_aligned(stages, metric)) for metric, words, colour in layers]
            shown = [
                (words, colour, x, y.mean(axis=0)) for words, colour, x, y in found if len(x) > 1
            ]
            series = tuple(
                _thinned(Series(label=words, colour=colour, x=x, y=_clean(y)))
                for words, colour, x, y in shown
            )
            if len(series) > 1:
                label = display(_label(groups, group, name))
                charts.append(
                    Chart(
                        key=f"{title}/{label}",
                        title=f"{title}: {label}",
                        explain=explain,
                        series=series,
                        kind="area",
                        unit=unit,
                    )
                )
    return charts


# --- samples at test time -------------------------------------------------------------------------


def voting_charts(groups: Sequence[Group], table: ScoreTable) -> list[Chart]:
    """maj@k, rerank@k and pass@k over k, for runs that were evaluated with samples."""
    curves = {
        (group.label, name): _mean_curves(group, name)
        for group in groups
        for name in group.methods
        if all(num_samples(run.evals[name]) > 1 for run in group.runs)
    }
    colours = method_colours([method.label for method in table.methods])
    charts = []
    for rule, (title, explain) in VOTING.items():
        series = tuple(
            Series(
                label=display(method.label),
                colour=colours[method.label],
                x=[float(k) for k in range(1, len(found[rule]) + 1)],
                y=_clean(found[rule]),
            )
            for method in table.methods
            if rule in (found := curves.get((method.group.label, method.method), {}))
        )
        if series:
            charts.append(
                Chart(
                    key=f"{rule}@k",
                    title=title,
                    explain=explain,
                    series=series,
                    x_label="samples k",
                    unit="percent",
                    log_x=True,
                    zero=False,
                    exact=True,
                )
            )
    return charts


def _mean_curves(group: Group, method: str) -> dict[str, np.ndarray[Any, Any]]:
    k = min(num_samples(run.evals[method]) for run in group.runs)
    by_run = [voting_curves(run.evals[method], k) for run in group.runs]
    rules = [rule for rule in by_run[0] if all(rule in found for found in by_run)]
    return {rule: np.mean([found[rule].mean(axis=0) for found in by_run], axis=0) for rule in rules}
