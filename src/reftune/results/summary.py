"""Computes and compares the scores of runs from the files in their folders. Also determines whether
dev accuracy had levelled off when RL began, and whether a reward model beats chance."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reftune.errors import DataError
from reftune.grading import voting
from reftune.results import stats
from reftune.results.records import EvalRow, RunResults, StageResults, read_runs
from reftune.results.stats import Comparison, Interval
from reftune.stages.plateau import NEEDED_ACCURACY, Rise
from reftune.stages.probes import choices
from reftune.storage.run_folder import RunFolder

GREEDY = "greedy"

Outcomes = NDArray[np.float64]
"""One number per problem: 1 if it was solved, and 0 if not. For pass@k, the number is the
probability that at least one of k samples solves the problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs with the same `settings` and different seeds."""

    label: str
    runs: tuple[RunResults, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def methods(self) -> list[str]:
        """Names of the methods that every run has evaluated."""
        return [name for name in self.runs[0].evals if all(name in run.evals for run in self.runs)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The share of problems solved, with its 95% interval."""

    accuracy: float
    ci95: Interval
    n: int
    by_seed: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodScore:
    """The results of one method in one group of runs."""

    group: Group
    method: str
    label: str
    """See `label_of`."""
    outcomes: Mapping[str, Sequence[Outcomes]]
    """Decision rule → outcomes, one array per seed. Every method has the rule `greedy`. A method
    with samples also has the rules `maj@k` and `pass@k`. If a reward model scored the samples, the
    method also has `weighted@k` and `rerank@k`."""
    scores: Mapping[str, Score]
    """Decision rule → score."""

    @property
    def greedy(self) -> Score:
        return self.scores[GREEDY]

    @property
    def votes(self) -> dict[str, Score]:
        """The scores under the decision rules that choose an answer from several samples."""
        apart = (GREEDY, "pass")
        return {rule: s for rule, s in self.scores.items() if rule.partition("@")[0] not in apart}

    @property
    def stage(self) -> StageResults:
        """The stage or snapshot of the first run."""
        return self.group.runs[0].stage(self.method)

    @property
    def looks(self) -> float | None:
        """Number of dev evaluations from which the model was chosen, averaged over seeds."""
        mean = self.mean("looks")
        if mean is None:
            return None
        return int(mean) if mean % 1 == 0 else round(mean, 1)

    @property
    def dev_accuracy(self) -> float | None:
        return self.mean("dev_accuracy")

    def mean(self, key: str) -> float | None:
        """The mean over seeds of the number that `stage.json` contains under `key`, or None if no
        run has this key."""
        infos = [run.stage(self.method).info for run in self.group.runs]
        values = [info[key] for info in infos if info.get(key) is not None]
        return float(np.mean(values)) if values else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTable:
    """The scores and comparisons that the tables and the report show."""

    methods: tuple[MethodScore, ...]
    comparisons: tuple[Comparison, ...]
    """Comparisons of greedy answers, and comparisons of votes. If votes are compared, the decision
    rule follows each method's label: `LABEL maj@k`."""
    baseline: str
    """Label of the method with which the others are compared: the first method called `sft` or, if
    there is none, the first method."""
    num_seeds: int
    split: str

    @property
    def starts(self) -> set[str]:
        """Labels of the methods that other methods started from."""
        inits = {(method.group.label, method.stage.init) for method in self.methods}
        return {m.label for m in self.methods if (m.group.label, m.method) in inits}

    @property
    def seeds_apart(self) -> dict[str, list[int]]:
        """Each group's label → the group's seeds. Empty if every group can be paired with every
        other group (see `_are_paired`)."""
        groups = {method.group.label: method.group for method in self.methods}
        is_whole = all(_are_paired(a, b) for a, b in combinations(groups.values(), 2))
        return {} if is_whole else {label: group.seeds for label, group in groups.items()}

    def between(self, a: str, b: str) -> Comparison | None:
        """The comparison of `a` with `b`; None if they were not compared."""
        found = next((each for each in self.comparisons if {each.a, each.b} == {a, b}), None)
        return found.turned() if found and found.a == b else found

    def method(self, label: str) -> MethodScore:
        return next(method for method in self.methods if method.label == label)


# --- one run: summary.json ------------------------------------------------------------------------


def summarize(group: Group) -> dict[str, Any]:
    """The content of `summary.json`, for a group of a single run."""
    (run,) = group.runs
    table = score_table([group])
    return {
        "name": run.name,
        "split": run.split,
        "methods": {method.method: _method_json(method) for method in table.methods},
        "comparisons": [found.to_row() for found in table.comparisons],
        "handovers": [found.to_row() for found in handovers(run)],
        "rerankers": [found.to_row() for found in rerankers(run)],
        "wall_seconds": run.wall_seconds,
    }


def _method_json(method: MethodScore) -> dict[str, Any]:
    greedy = method.greedy
    result: dict[str, Any] = {"accuracy": greedy.accuracy, "ci95": list(greedy.ci95), "n": greedy.n}
    for rule, score in method.scores.items():
        if rule != GREEDY:
            result |= {rule: score.accuracy, f"{rule}_ci95": list(score.ci95)}
    result |= {"dev_accuracy": method.dev_accuracy, "looks": method.looks}
    path = RunFolder(method.group.runs[0].folder).choices(method.method)
    rows = choices.read_rows(path) if path.is_file() else []
    return result | ({"choices": choices.summary_of(rows)} if rows else {})


# --- several runs ---------------------------------------------------------------------------------


def read_groups(run_dirs: Sequence[Path | str], *, finished: bool = True) -> list[Group]:
    """Read the runs and group them. Raises: the errors of `read_runs` and `comparable_groups`."""
    return comparable_groups(read_runs(run_dirs, finished=finished))


def comparable_groups(runs: Sequence[RunResults]) -> list[Group]:
    """The runs in groups, as `group_runs` returns them. Raises: DataError if the methods of a run
    answered different problems. With several groups, DataError is also raised if the groups have
    different numbers of seeds, or if two runs answered different problems. There is one exception:
    if all groups have the same seeds, only runs with the same seed must have answered the same
    problems."""
    for run in runs:
        if not _same_problems(run.evals.values()):
            raise DataError(
                f"{run.folder}: its methods were evaluated on different problems; expected the same"
                " problems in the same order"
            )
    groups = group_runs(runs)
    by_seed = all(group.seeds == groups[0].seeds for group in groups)
    firsts: dict[int | None, RunResults] = {}
    for run in (run for group in groups for run in group.runs if run.evals):
        first = firsts.setdefault(run.seed if by_seed else None, run)
        if not _share_problems([first, run]):
            seeds = "; ".join(f"{g.label}: {', '.join(map(str, g.seeds))}" for g in groups)
            raise DataError(
                f"{first.folder} and {run.folder}: evaluated on different problems; expected the"
                " same problems in the same order"
                + (f", or the same seeds for each recipe ({seeds})" * (not by_seed))
            )
    if len({len(group.runs) for group in groups}) > 1:
        counts = ", ".join(f"{group.label} {len(group.runs)}" for group in groups)
        raise DataError(
            f"runs to compare have different numbers of seeds ({counts}); expected the same number"
        )
    return groups


def group_runs(runs: Sequence[RunResults]) -> list[Group]:
    """Divides the runs into groups, which are ordered by the position of their first run in `runs`.
    Within a group, runs have the same `settings`, and no two runs have the same seed. A group's
    runs are sorted by seed, so that the runs of two groups with the same seeds can be paired in
    order."""
    gathered: list[list[RunResults]] = []
    for run in runs:
        same = [group for group in gathered if group[0].settings == run.settings]
        home = next((g for g in same if run.seed not in [other.seed for other in g]), None)
        gathered.append([run]) if home is None else home.append(run)
    gathered = [sorted(group, key=lambda run: run.seed) for group in gathered]
    labels = [_group_label(group) for group in gathered]
    return [
        Group(label=label if labels.count(label) == 1 else str(group[0].folder), runs=tuple(group))
        for label, group in zip(labels, gathered, strict=True)
    ]


def _group_label(runs: Sequence[RunResults]) -> str:
    """The first run's name, without the seed at its end if the runs' names differ only in that."""
    bases = {re.sub(rf"[-_.]?(s|seed)?[-_]?(?<!\d)0*{run.seed}$", "", run.name) for run in runs}
    is_numbered = len({run.name for run in runs}) > 1 == len(bases)
    return (is_numbered and bases.pop()) or runs[0].name


def _share_problems(runs: Sequence[RunResults]) -> bool:
    return _same_problems(next(iter(run.evals.values())) for run in runs if run.evals)


def _same_problems(evals: Iterable[Sequence[EvalRow]]) -> bool:
    """Whether all methods answered the same problems in the same order."""
    return len({tuple((row.id, row.question, row.gold) for row in rows) for rows in evals}) <= 1


def score_table(groups: Sequence[Group], *, k: int | None = None) -> ScoreTable:
    """Scores and paired comparisons of all methods. Votes use the first `k` samples of each
    problem. If `k` is None, each method uses the largest `k` that its samples allow.

    Raises: DataError if `k` is given and no method has samples, or if a method with samples has
    fewer than `k` samples for some problem.
    """
    if k is not None:
        evals = [run.evals[m] for group in groups for m in group.methods for run in group.runs]
        voting.check_k(k, max(map(num_samples, evals), default=0))
    shared = all(_share_problems(group.runs) for group in groups)
    methods = tuple(
        _method_score(group, name, label_of(groups, group, name), k, shared)
        for group in groups
        for name in group.methods
    )
    first = methods[0].label if methods else ""
    baseline = next((method.label for method in methods if method.method == "sft"), first)
    return ScoreTable(
        methods=methods,
        comparisons=tuple(_comparisons(methods, baseline, shared)),
        baseline=baseline,
        num_seeds=len(groups[0].runs),
        split=groups[0].runs[0].split,
    )


def label_of(groups: Sequence[Group], group: Group, method: str) -> str:
    """A method's label: the method's name or, if there are several `groups`, `GROUP/METHOD`."""
    return f"{group.label}/{method}" if len(groups) > 1 else method


def leader(table: ScoreTable) -> MethodScore | None:
    """The method with the highest greedy accuracy. The baseline is left out. Methods that other
    methods start from are left out too, unless no method would remain. Returns None if the baseline
    is the only method."""
    others = [method for method in table.methods if method.label != table.baseline]
    rivals = [method for method in others if method.label not in table.starts] or others
    return max(rivals, key=lambda method: method.greedy.accuracy, default=None)


def _method_score(
    group: Group, method: str, label: str, k: int | None, shared: bool
) -> MethodScore:
    by_run = [outcomes(run.evals[method], k) for run in group.runs]
    rules = [rule for rule in by_run[0] if all(rule in found for found in by_run)]
    by_rule = {rule: [found[rule] for found in by_run] for rule in rules}
    scores = {rule: _score(seeds, shared) for rule, seeds in by_rule.items()}
    return MethodScore(group=group, method=method, label=label, outcomes=by_rule, scores=scores)


def _score(seeds: Sequence[Outcomes], shared: bool) -> Score:
    by_seed = tuple(float(solved.mean()) for solved in seeds)
    ci95 = stats.accuracy_over_seeds(seeds, same_problems=shared)
    return Score(accuracy=float(np.mean(by_seed)), ci95=ci95, n=seeds[0].size, by_seed=by_seed)


def _comparisons(
    methods: Sequence[MethodScore], baseline: str, shared: bool
) -> Iterator[Comparison]:
    """Compares each method with the methods before it in `methods`. Two methods in the same group
    are always compared. If they have the same weights, their samples differ only by chance, so only
    their greedy answers are compared. Two methods in different groups are compared only if the
    groups can be paired, and if the methods have the same name or one of them is the baseline."""
    for b, a in combinations(methods, 2):
        is_asked = a.method == b.method or baseline in (a.label, b.label)
        if a.group is b.group or (is_asked and _are_paired(a.group, b.group)):
            for rule in [GREEDY] if _are_one_model(a, b) else a.outcomes:
                if rule in b.outcomes and not rule.startswith("pass@"):
                    yield _compare(a, b, rule, shared)


def _are_one_model(a: MethodScore, b: MethodScore) -> bool:
    """Whether two methods have the same weights in every run of their group."""
    return a.group is b.group and all(
        _model_of(run, a.method) == _model_of(run, b.method) for run in a.group.runs
    )


def _model_of(run: RunResults, method: str) -> str:
    """The name of the model that the weights of `method` belong to. If `method` is the model of a
    stage that never beat its initial model on dev, this is the initial model. If `method` is a
    snapshot taken at the step that its stage chose in the end, this is the stage's model. In all
    other cases, it is `method` itself."""
    stage = run.stages.get(method)
    if stage is None:
        return method
    whole = run.whole_of(stage)
    if whole is not None:
        return _model_of(run, whole.name)
    return _model_of(run, stage.init) if stage.chosen_step == 0 else method


def _are_paired(a: Group, b: Group) -> bool:
    """Whether each run of `a` has a partner in `b`, namely the run with the same seed. If both
    groups have a single run, the two runs are partners whatever their seeds, because they are
    compared only problem by problem."""
    return a.seeds == b.seeds or len(a.runs) == len(b.runs) == 1


def _compare(a: MethodScore, b: MethodScore, rule: str, shared: bool) -> Comparison:
    name_a, name_b = (m.label if rule == GREEDY else f"{m.label} {rule}" for m in (a, b))
    seeds_a, seeds_b = a.outcomes[rule], b.outcomes[rule]
    if len(seeds_a) == 1:
        return stats.compare(name_a, seeds_a[0], name_b, seeds_b[0])
    return stats.compare_over_seeds(name_a, seeds_a, name_b, seeds_b, same_problems=shared)


# --- decisions from samples -----------------------------------------------------------------------


def outcomes(rows: Sequence[EvalRow], k: int | None = None) -> dict[str, Outcomes]:
    """Decision rule (such as `greedy` or `maj@8`) → one outcome per row of `rows`. Votes use the
    first `k` samples of each problem, or the first `num_samples(rows)` if `k` is None."""
    result = {GREEDY: np.array([row.greedy.correct for row in rows], dtype=float)}
    if drawn := num_samples(rows):
        curves = voting_curves(rows, k or drawn)
        result |= {f"{rule}@{k or drawn}": by_k[:, -1] for rule, by_k in curves.items()}
    return result


def num_samples(rows: Sequence[EvalRow]) -> int:
    """The smallest number of samples per problem."""
    return min(len(row.samples) for row in rows)


def voting_curves(rows: Sequence[EvalRow], max_k: int) -> dict[str, NDArray[np.float64]]:
    """Decision rule → outcomes with k = 1 … `max_k` samples. The rules are `maj`, `pass` and, if a
    reward model scored every sample, `weighted` and `rerank`.

    Each array has the shape (problems, max_k). Votes and reranking use a problem's first k samples.
    pass@k is the exact mean over all ways to choose k of the problem's samples. Raises: DataError
    if a problem has fewer than `max_k` samples.
    """
    voting.check_k(max_k, num_samples(rows))
    is_scored = all(sample.score is not None for row in rows for sample in row.samples)
    curves = [_row_curves(row, max_k, is_scored) for row in rows]
    return {rule: np.array([row[rule] for row in curves]) for rule in curves[0]}


def _row_curves(row: EvalRow, max_k: int, is_scored: bool) -> dict[str, list[float]]:
    """One problem's `voting_curves`."""
    samples = row.samples[:max_k]
    graded = [sample.graded for sample in samples]
    is_choice = len(row.gold) == 1 and row.gold.isalpha()
    valid = voting.voters(row.grading, is_choice=is_choice)
    vote = partial(voting.majority_curve, graded, valid=valid, same=voting.equality(row.grading))
    winners = {"maj": vote()}
    if is_scored:
        scores = [s.score if s.score and math.isfinite(s.score) else 0.0 for s in samples]
        texts = [sample.completion for sample in samples]
        winners["weighted"] = vote(weights=scores)
        winners["rerank"] = voting.rerank_curve(graded, texts, scores, valid=valid)
    curves = {rule: [float(voting.is_correct(w)) for w in won] for rule, won in winners.items()}
    num_correct = sum(sample.correct for sample in row.samples)
    return {**curves, "pass": _pass_curve(len(row.samples), num_correct, max_k)}


@cache  # counts repeat from problem to problem, and exact arithmetic on large integers is slow
def _pass_curve(n: int, num_correct: int, max_k: int) -> list[float]:
    return [voting.pass_at_k(n, num_correct, k) for k in range(1, max_k + 1)]


# --- was the warm-up finished? --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """The start of an RL stage, and the rise in dev accuracy before it."""

    stage: str
    init: str
    rise: Rise
    """The rise over the last `LOOKS` dev evaluations of the stage that trained the initial model.
    If this model is a snapshot, evaluations after its step do not count."""
    accuracy: float
    """Dev accuracy after the rise."""

    @property
    def is_ready(self) -> bool:
        """Whether dev accuracy was at least `NEEDED_ACCURACY` and had stopped rising. False if dev
        has too few problems to tell."""
        is_flat = not (self.rise.is_beyond_chance or self.rise.is_uncertain)
        return is_flat and self.accuracy >= NEEDED_ACCURACY

    def to_row(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "init": self.init,
            "rise": self.rise.value,
            "margin": self.rise.margin,
            "accuracy": self.accuracy,
            "ready": self.is_ready,
        }


def handovers(run: RunResults) -> list[Handover]:
    """One `Handover` for each RL stage whose initial model has a `last_rise`."""
    return [
        Handover(stage=name, init=stage.init, rise=found[0], accuracy=found[1])
        for name, stage in run.stages.items()
        if _samples(stage) and (found := last_rise(run, stage.init)) is not None
    ]


def last_rise(run: RunResults, method: str) -> tuple[Rise, float] | None:
    """The last `dev/rise` logged in the training of a supervised method, and the dev accuracy in
    the same evaluation. For a snapshot, evaluations after its step are ignored. For a stage,
    evaluations after its chosen step are included, because they show whether dev accuracy was still
    rising. Returns None if the method is unknown, not supervised or not finished, or had too few
    evaluations."""
    found = run.stages.get(method)
    if found is None or "chosen_step" not in found.info:
        return None
    parent = found.info.get("snapshot_of")
    source, end = (run.stages[parent], found.info["chosen_step"]) if parent else (found, math.inf)
    rises = [row.values for row in source.metrics if row.step <= end and "dev/rise" in row.values]
    if not rises or _samples(source):
        return None
    last = rises[-1]
    return Rise(value=last["dev/rise"], margin=last["dev/rise_margin"]), last["dev/accuracy"]


def _samples(stage: StageResults) -> bool:
    return any("reward/mean" in row.values for row in stage.metrics)


# --- is the reward model better than chance? ------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Reranker:
    """How often a reward model chooses a correct sample of a dev problem, compared with a random
    choice. Neither chooses samples without an answer."""

    stage: str
    num_samples: int
    """Number of samples per problem."""
    accuracy: float
    """Share of problems whose highest-scoring sample is correct."""
    chance: float
    """Expected accuracy of a random choice among a problem's samples, averaged over problems."""
    margin: float
    """Half the width of the 95% interval of `accuracy` − `chance`, paired by problem."""

    @property
    def beats_chance(self) -> bool:
        """Whether `accuracy` exceeds `chance` by more than the margin."""
        return self.accuracy - self.chance > self.margin

    def to_row(self) -> dict[str, Any]:
        return {**asdict(self), "beats_chance": self.beats_chance}


def rerankers(run: RunResults) -> list[Reranker]:
    """The dev results of each finished reward model of the run, measured at the chosen step."""
    return [
        Reranker(
            stage=name,
            num_samples=int(run.recipe["stages"][name]["dev_samples"]),
            accuracy=row.values["dev/accuracy"],
            chance=row.values["dev/chance"],
            margin=row.values["dev/chance_margin"],
        )
        for name, stage in run.stages.items()
        for row in stage.metrics
        if row.step == stage.chosen_step and "dev/chance" in row.values
    ]
