"""The report's charts as plain data, without pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reftune.recipe import local_path
from reftune.results.metrics import PHASES, VERDICTS, VOTING, Metric
from reftune.results.records import MetricRow, RunResults, StageResults, read_json
from reftune.results.stats import wilson
from reftune.results.summary import Group, ScoreTable, label_of, num_samples, voting_curves
from reftune.results.tables import display, percent
from reftune.storage.run_folder import StageFolder

MAX_POINTS = 300
"""Maximum number of points per series. A longer series is divided into this many buckets, and each
bucket is averaged."""

Number = float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a line chart, or one layer of an area chart."""

    label: str
    colour: str
    """The name of a CSS variable."""
    x: list[float]
    y: list[Number]
    low: list[Number] | None = None
    high: list[Number] | None = None
    mark: int | None = None
    """Index of the point whose model was chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart's lines or areas."""

    metric: Metric
    series: tuple[Series, ...]
    kind: Literal["line", "area"] = "line"

    @property
    def is_log(self) -> bool:
        """Whether the horizontal axis is logarithmic."""
        return self.metric.axis == "samples k"

    def json(self) -> dict[str, Any]:
        """The data that the page's script needs to show values."""
        series = [{"label": s.label, "colour": s.colour, "x": s.x, "y": s.y} for s in self.series]
        return {"x_label": self.metric.axis, "unit": self.metric.unit, "series": series}


# --- colours --------------------------------------------------------------------------------------

_COLOURS = {
    "warmup": 0,
    "sft": 1,
    "reft": 2,
    "offline_st": 3,
    "online_st": 4,
    "reft_modern": 5,
    "base": 7,
}
NUM_COLOURS = 8


def method_colours(labels: Sequence[str]) -> dict[str, str]:
    """Label of a method → CSS variable of the method's colour. `base`, which has no training curve,
    always gets the last colour of the palette. If there is only one group of runs, the methods in
    `_COLOURS` have fixed colours. Methods without a fixed colour get colours in order of
    appearance."""
    if any("/" in label for label in labels):
        trained = [label for label in labels if not label.endswith("/base")]
        places = {label: index for index, label in enumerate(trained)}
        return {
            label: f"--method-{1 + places.get(label, -1) % (NUM_COLOURS - 1)}" for label in labels
        }
    spare = iter(sorted(set(range(NUM_COLOURS)) - {_COLOURS.get(label) for label in labels}))
    return {
        label: f"--method-{_COLOURS[label] if label in _COLOURS else next(spare, 7)}"
        for label in labels
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A stage of a group of runs, ready to be drawn."""

    group: Group
    method: str
    name: str
    """The name shown to the reader. If there are several groups, it includes the group's label."""
    colour: str

    @property
    def stages(self) -> list[StageResults]:
        return [run.stages[self.method] for run in self.group.runs]


def entries(groups: Sequence[Group]) -> list[Entry]:
    """Every stage of every group, named as in the score table."""
    pairs = [(group, name) for group in groups for name in group.runs[0].stages]
    labels = [label_of(groups, group, name) for group, name in pairs]
    colours = method_colours(labels)
    return [
        Entry(group=group, method=method, name=display(label), colour=colours[label])
        for (group, method), label in zip(pairs, labels, strict=True)
    ]


# --- curves over training -------------------------------------------------------------------------


def training_charts(groups: Sequence[Group], metrics: Sequence[Metric]) -> list[Chart]:
    """A chart for each metric that some stage measured at more than one step. If there are several
    seeds, lines show the mean over seeds, and bands show the range."""
    charts = []
    for metric in metrics:
        series = [
            _metric_series(entry, metric)
            for entry in entries(groups)
            if entry.stages[0].num_samples > 1 or not metric.of_groups
        ]
        if drawn := tuple(found for found in series if len(found.x) > 1):
            charts.append(Chart(metric=metric, series=drawn))
    return charts


def _metric_series(entry: Entry, metric: Metric) -> Series:
    x, by_run = _aligned(entry.stages, metric.key)
    if metric.axis == "sequences":
        before = _passes_before(entry.group.runs[0], entry.method)
        passes = {row.step: row.passes for row in entry.stages[0].metrics}
        x = [before + passes[int(step)] for step in x]
    series = Series(label=entry.name, colour=entry.colour, x=x, y=_clean(by_run.mean(axis=0)))
    if len(by_run) > 1:
        series = replace(series, low=_clean(by_run.min(axis=0)), high=_clean(by_run.max(axis=0)))
    return _thinned(series)


def _aligned(
    stages: Sequence[StageResults], metric: str
) -> tuple[list[float], np.ndarray[Any, Any]]:
    """The steps at which every run measured `metric`, and the metric's values at these steps. The
    values have the shape (runs, steps)."""
    by_run = [
        {row.step: row.values[metric] for row in stage.metrics if metric in row.values}
        for stage in stages
    ]
    steps = sorted(set.intersection(*map(set, by_run)))
    values = np.array([[found[step] for step in steps] for found in by_run], dtype=float)
    return [float(step) for step in steps], values.reshape(len(by_run), len(steps))


def _clean(values: Sequence[float] | np.ndarray[Any, Any]) -> list[Number]:
    """The values rounded to five significant digits. A non-finite value becomes None and is not
    drawn."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in map(float, values)]


def _thinned(series: Series) -> Series:
    if len(series.x) <= MAX_POINTS:
        return series
    buckets = np.array_split(np.arange(len(series.x)), MAX_POINTS)

    def means(values: Sequence[Number]) -> list[float]:
        known = [[y for index in bucket if (y := values[index]) is not None] for bucket in buckets]
        return [float(np.mean(bucket)) if bucket else math.nan for bucket in known]

    return replace(
        series,
        x=means(series.x),
        y=_clean(means(series.y)),
        low=None if series.low is None else _clean(means(series.low)),
        high=None if series.high is None else _clean(means(series.high)),
    )


# --- the main curve -------------------------------------------------------------------------------


def dev_chart(groups: Sequence[Group]) -> Chart | None:
    """A chart of the dev accuracy of every stage except those that train reward models. The
    horizontal axis shows the total number of sequences that the model has been trained on, starting
    at zero for the base model. Returns None if there is no dev evaluation yet."""
    # a reward model's dev accuracy is the accuracy of reranking
    solvers = [entry for entry in entries(groups) if entry.stages[0].is_method]
    series = tuple(filter(None, map(_dev_series, solvers)))
    if not series:
        return None
    are_means = any(len(group.runs) > 1 for group in groups)
    band = "shows the range over seeds" if are_means else "is the 95% interval of each point"
    metric = Metric(
        "dev/accuracy",
        "Accuracy on dev problems, by training effort",
        "Greedy accuracy by the number of sequences trained on, counted from the base model. The"
        f" band {band}.",
        unit="percent",
        axis="sequences",
    )
    return Chart(metric=metric, series=series)


def _dev_series(entry: Entry) -> Series | None:
    curves = [_dev_curve(run, entry.method) for run in entry.group.runs]
    length = min(map(len, curves))
    if length == 0:
        return None
    points = np.array([[(x, *_accuracy(row)) for x, row in c[:length]] for c in curves])
    x, y, low, high = points.mean(axis=0).T
    mark = None
    if len(curves) > 1:
        low, high = points[..., 1].min(axis=0), points[..., 1].max(axis=0)
    else:
        steps, chosen = [row.step for _, row in curves[0]], entry.stages[0].chosen_step
        mark = steps.index(chosen) if chosen in steps else None
    return Series(
        label=entry.name,
        colour=entry.colour,
        x=[float(value) for value in x],
        y=_clean(y),
        low=_clean(low),
        high=_clean(high),
        mark=mark,
    )


def _accuracy(look: MetricRow) -> tuple[float, float, float]:
    """A dev evaluation's accuracy and the ends of its 95% interval."""
    accuracy, n = look.values["dev/accuracy"], int(look.values.get("dev/n", 0))
    return accuracy, *(wilson(round(accuracy * n), n) if n else (accuracy, accuracy))


def _dev_curve(run: RunResults, method: str) -> list[tuple[float, MetricRow]]:
    """The method's dev evaluations as pairs (x, evaluation): x is the total number of sequences
    trained on so far, starting at 0 for the base model. If the model that the method started from
    was evaluated, that evaluation comes first."""
    stage, before = run.stages[method], _passes_before(run, method)
    looks, start = _looks(stage), _chosen(run, stage.init)
    curve = [(before + look.passes, look) for look in looks]
    if start is not None and stage.metrics and looks and looks[0].step != 0:
        return [(before, replace(start, step=0)), *curve]
    return curve


def _looks(stage: StageResults) -> list[MetricRow]:
    """The dev evaluations in the stage's metrics or, for a snapshot, the dev evaluation in its
    `stage.json`."""
    if stage.metrics or stage.chosen_step is None or stage.info.get("dev_accuracy") is None:
        return [row for row in stage.metrics if "dev/accuracy" in row.values]
    values = {
        "dev/accuracy": float(stage.info["dev_accuracy"]),
        "dev/n": float(stage.info.get("dev_n") or 0),
        "compute/sequence_passes": float(stage.info.get("sequence_passes") or stage.chosen_step),
    }
    return [MetricRow(step=stage.chosen_step, values=values)]


def _chosen(run: RunResults, method: str) -> MetricRow | None:
    """The dev evaluation of a method's chosen model; None if that model was not evaluated."""
    stage = run.stages.get(method)
    looks = [] if stage is None else _looks(stage)
    return next((look for look in looks if stage and look.step == stage.chosen_step), None)


def _passes_before(run: RunResults, method: str) -> float:
    """Number of gradient passes, each over one sequence, from the base model to the model that
    `method` starts from."""
    init = run.stages[method].init
    if init == method:
        return 0.0
    if init not in run.stages:
        return _passes_to(local_path(init))
    chosen = _chosen(run, init)
    own = run.stages[init].info.get("sequence_passes", 0) if chosen is None else chosen.passes
    return _passes_before(run, init) + float(own)


def passes_since_base(run: RunResults, method: str) -> float | None:
    """Number of gradient passes, each over one sequence, from the base model to the end of
    `method`. None if `method` is not done or is `base`."""
    own = run.stage(method).info.get("sequence_passes")
    return None if own is None else _passes_before(run, method) + float(own)


def _passes_to(folder: Path) -> float:
    """Number of sequences on which a model was trained, summed over all stages since the base
    model. `folder` is the model's stage folder in an earlier run. The number is 0 if the folder has
    no `stage.json`, as for `base`. Within a stage, every step is assumed to train on the same
    number of sequences."""
    passes, seen = 0.0, set[Path]()
    while folder.resolve() not in seen and (info := read_json(StageFolder(folder).info)):
        seen.add(folder.resolve())
        share = info.get("chosen_step", 0) / max(1, info.get("steps", 0))
        passes += share * info.get("sequence_passes", 0)
        init = str(info.get("init", "base"))
        folder = folder.with_name(init) if "/" not in init else local_path(init)
    return passes


def equal_compute(chart: Chart, a: str, b: str) -> str:
    """A sentence with the best dev accuracies of `a` and `b` at equal training effort. A model's
    effort is the number of sequences it was trained on, counted from the base model. The comparison
    stops at the smaller of the efforts that the two models had reached at their last dev
    evaluations. Later dev evaluations are ignored. If a model has no dev evaluation left, the
    result is an empty string."""
    by_name = {series.label: series for series in chart.series}
    found = [by_name[name] for name in (a, b) if name in by_name]
    passes = min((series.x[-1] for series in found), default=0.0)
    reached = [
        [y for x, y in zip(series.x, series.y, strict=True) if x <= passes and y is not None]
        for series in found
    ]
    if len(found) < 2 or not all(reached):
        return ""
    best_a, best_b = map(max, reached)
    return (
        f"Within {passes:,.0f} training sequences since the base model, which both methods reached,"
        f" the best dev accuracy was {percent(best_a)} for {a} and {percent(best_b)} for {b}."
    )


# --- shares ---------------------------------------------------------------------------------------


def verdict_charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart for each `rl` stage with several steps. It shows, step by step, the share of each
    verdict among the sampled solutions."""
    layers = [(f"verdict/{name}", words, f"--verdict-{name}") for name, words in VERDICTS.items()]
    explain = "Share of each verdict among sampled solutions, step by step."
    return _area_charts(groups, layers, Metric("Verdicts", "Verdicts", explain, unit="percent"))


def time_charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart for each stage whose steps have several phases. It shows how many seconds each phase
    of a step takes."""
    layers = [(key, words, f"--phase-{i}") for i, (key, words) in enumerate(PHASES.items())]
    explain = (
        "Seconds of each step spent on sampling solutions, grading them, scoring their tokens and"
        " updating weights."
    )
    return _area_charts(groups, layers, Metric("Time", "Time", explain, unit="seconds"))


def _means(stages: Sequence[StageResults], metric: str) -> dict[float, Number]:
    steps, values = _aligned(stages, metric)
    return dict(zip(steps, _clean(values.mean(axis=0)), strict=True))


def _area_charts(
    groups: Sequence[Group], layers: Sequence[tuple[str, str, str]], whole: Metric
) -> list[Chart]:
    """A stacked area chart for each stage that measured at least two of the `layers` at several
    steps. Each layer is given as a metric's key, a name and a colour, starting with the bottom
    layer. `whole` has the charts' title, explanation and unit."""
    charts = []
    for entry in entries(groups):
        found = [(name, colour, _means(entry.stages, key)) for key, name, colour in layers]
        steps = sorted(set().union(*(means for _, _, means in found)))
        series = tuple(
            _thinned(Series(label=name, colour=colour, x=steps, y=[*map(means.get, steps)]))
            for name, colour, means in found
            if len(means) > 1
        )
        if len(series) > 1:
            key, title = f"{whole.key}/{entry.name}", f"{whole.title}: {entry.name}"
            metric = replace(whole, key=key, title=title)
            charts.append(Chart(metric=metric, series=series, kind="area"))
    return charts


# --- samples at test time -------------------------------------------------------------------------


def voting_charts(table: ScoreTable) -> list[Chart]:
    """Charts of maj@k, weighted@k, rerank@k and pass@k against k, for methods with several samples
    per problem."""
    curves = {
        method.label: _mean_curves(method.group, method.method)
        for method in table.methods
        if all(num_samples(run.evals[method.method]) > 1 for run in method.group.runs)
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
            if rule in (found := curves.get(method.label, {}))
        )
        if series:
            texts = f"{rule}@k", title, explain
            metric = Metric(*texts, unit="percent", axis="samples k", exact=True)
            charts.append(Chart(metric=metric, series=series))
    return charts


def _mean_curves(group: Group, method: str) -> dict[str, np.ndarray[Any, Any]]:
    k = min(num_samples(run.evals[method]) for run in group.runs)
    by_run = [voting_curves(run.evals[method], k) for run in group.runs]
    rules = [rule for rule in by_run[0] if all(rule in found for found in by_run)]
    return {rule: np.mean([found[rule].mean(axis=0) for found in by_run], axis=0) for rule in rules}
