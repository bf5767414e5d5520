"""Shows the results of runs on several tasks in tables like the paper's. Each row is for a model
and a method, and each column is for a task and a kind of rationale. The paper's numbers are in
brackets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import yaml

from reftune.errors import DataError
from reftune.recipe import shipped_recipes
from reftune.results.records import RunResults, read_json
from reftune.results.summary import (
    GREEDY,
    MethodScore,
    ScoreTable,
    comparable_groups,
    group_runs,
    score_table,
)
from reftune.results.tables import NOT_SIGNIFICANT, display, grid
from reftune.storage.run_folder import RunFolder

NOT_COMPARED = "n.c."
RULES = {"maj": "voting", "rerank": "reranking"}
RATIONALES = {"N-CoT": "solutions in words", "P-CoT": "programs"}
"""The paper's names for kinds of rationales, and what they mean."""

Place = tuple[str, str, str]
"""The names of a model, a task and a kind of rationale. If the paper has a name for one of these,
that name is used."""
Cell = dict[str, Any]
"""What `--json` prints for all runs with the same `Place`: the place, the number of seeds, the
split sizes and the scores."""


@cache
def published() -> dict[str, Any]:
    """The paper's names and numbers, from `recipes/paper/published.yaml`."""
    path = shipped_recipes() / "paper" / "published.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def is_several_tasks(runs: Sequence[RunResults]) -> bool:
    """Whether the runs differ in task or kind of rationale."""
    return len({_place(run)[1:] for run in runs}) > 1


def _place(run: RunResults) -> Place:
    model, dataset, form = (
        value if isinstance(value := run.recipe.get(key), Mapping) else {"kind": str(value or "")}
        for key in ("model", "dataset", "format")
    )
    path, kind, answer = model.get("path"), str(dataset.get("kind")), dataset.get("answer")
    task = kind if answer in (None, "number") else f"{kind} {answer}"
    rationale, names = str(form.get("kind")), published()
    return (
        names["models"].get(path, str(path)) if path else "from scratch",
        names["tasks"].get(task, task.replace("_", " ")),
        names["rationales"].get(rationale, rationale),
    )


def _order(place: Place) -> tuple[Any, ...]:
    """A sort key. The paper's names come first, in the paper's order. Other names follow in
    alphabetical order."""

    def rank(names: str, name: str) -> tuple[int, str]:
        known = list(published()[names].values())
        return known.index(name) if name in known else len(known), name

    model, task, rationale = place
    return rank("models", model), rank("tasks", task), rationale


def cells(runs: Sequence[RunResults], *, k: int | None = None) -> list[Cell]:
    """One cell, with the scores of all methods, for each combination of model, task and kind of
    rationale. Votes use the first `k` samples, as in `score_table`. Raises: the errors of
    `comparable_groups` and `score_table`; DataError if two recipes would fill the same cell."""
    places: dict[Place, list[RunResults]] = {}
    for run in runs:
        places.setdefault(_place(run), []).append(run)
    return [_cell(place, places[place], k) for place in sorted(places, key=_order)]


def _cell(place: Place, runs: Sequence[RunResults], k: int | None) -> Cell:
    groups = group_runs(runs)
    if len(groups) > 1:
        first, second = groups[0].runs[0].folder, groups[1].runs[0].folder
        raise DataError(
            f"{first} and {second}: two recipes for {', '.join(place)}; expected runs that differ"
            " only in the seed"
        )
    table = score_table(comparable_groups(runs), k=k)
    return {
        **dict(zip(("model", "task", "rationale"), place, strict=True)),
        "seeds": table.num_seeds,
        "problems": read_json(RunFolder(runs[0].folder).data).get("problems", {}),
        "baseline": table.baseline,
        "methods": {
            method.method: {rule: _score(place, table, method, rule) for rule in method.scores}
            for method in table.methods
        },
    }


def _score(place: Place, table: ScoreTable, method: MethodScore, rule: str) -> dict[str, Any]:
    """A method's score under a decision rule, such as `greedy` or `maj@8`, as JSON. The key `paper`
    contains the paper's score in percent, or None if the paper has none for the same model, task,
    form of rationales, method, decision rule and number of test questions."""
    model, *of = place
    column, suffix = " ".join(of), "" if rule == GREEDY else f" {rule}"
    against = table.between(method.label + suffix, table.baseline + suffix)
    is_same = table.split == "test" and method.greedy.n == _paper_sizes(column).get("test")
    rows = published()["accuracy"].get(model, {}) if is_same else {}
    return asdict(method.scores[rule]) | {
        "significant_against_baseline": None if against is None else against.significant,
        "paper": rows.get(method.method + suffix, {}).get(column),
    }


def _paper_sizes(column: str) -> dict[str, int]:
    sizes = published()["questions"].get(column, ())
    return dict(zip(("train", "test"), sizes, strict=False))


# --- the tables -----------------------------------------------------------------------------------


def render(found: Sequence[Cell], fmt: str) -> str:
    """The cells as `text`, `markdown`, `latex` or `json`. In the first three formats, the first
    table contains split sizes, and the second contains greedy accuracies. If solutions were
    sampled, a third table contains the accuracies of voting and reranking. Raises: DataError for an
    unknown format."""
    if fmt == "json":
        return json.dumps(found, indent=2)
    parts = [
        _sizes(found, fmt),
        _accuracies(found, fmt, lambda rule: rule == GREEDY, title="Accuracy, greedy"),
        _accuracies(found, fmt, lambda rule: rule.partition("@")[0] in RULES, title="Votes"),
    ]
    return "\n\n".join(filter(None, parts))


def _column(cell: Cell) -> str:
    return f"{cell['task']} {cell['rationale']}"


def _sizes(found: Sequence[Cell], fmt: str) -> str:
    columns = list(dict.fromkeys(map(_column, found)))
    body = [
        [f"{split} questions", *(_size(found, split, column) for column in columns)]
        for split in ("train", "dev", "test")
    ]
    used = {cell["rationale"] for cell in found}
    kinds = ", ".join(f"{name}: {text}" for name, text in RATIONALES.items() if name in used)
    notes = [f"{kinds}." if kinds else "", "In brackets: the paper's numbers." * _has_paper(body)]
    note = " ".join(filter(None, notes))
    return grid(["", *columns], body, fmt, title="Questions", note=note)


def _has_paper(body: Sequence[Sequence[str]]) -> bool:
    """Whether a cell after the first of its row contains a number of the paper."""
    return any(cell.endswith("]") for _, *cells in body for cell in cells)


def _size(found: Sequence[Cell], split: str, column: str) -> str:
    """The number of questions of a split, or a range if it differs between a column's models."""
    problems = [cell["problems"] for cell in found if _column(cell) == column]
    sizes = [each[split] for each in problems if split in each]
    ours = "–".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)})) if sizes else "–"
    paper = _paper_sizes(column).get(split)
    return ours + ("" if paper is None else f" [{paper:,}]")


def _accuracies(
    found: Sequence[Cell], fmt: str, is_shown: Callable[[str], bool], *, title: str
) -> str:
    """A table with a row for each combination of model, method and decision rule. Only rules for
    which `is_shown` returns True are included; if there are none, the result is an empty string. If
    several tasks use the same kind of rationale, an additional column contains the average of their
    accuracies. Kinds for which the paper has no name, such as a user's own format, get no such
    column."""
    places = sorted({("", cell["task"], cell["rationale"]) for cell in found}, key=_order)
    columns = {f"{task} {rationale}": rationale for _, task, rationale in places}
    counts = Counter(columns.values())
    averaged = [name for name in published()["rationales"].values() if counts[name] > 1]
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for cell in found:
        for method, scores in cell["methods"].items():
            for rule in filter(is_shown, scores):
                row = rows.setdefault((cell["model"], _method(method, rule)), {})
                is_baseline = method == cell["baseline"]
                row[_column(cell)] = {**scores[rule], "is_baseline": is_baseline}
    body = [
        [
            *names,
            *(_text(row.get(column)) for column in columns),
            *(_mean([row.get(c) for c, of in columns.items() if of == r]) for r in averaged),
        ]
        for names, row in rows.items()
    ]
    head = ["Model", "Method", *columns, *(f"Average {rationale}" for rationale in averaged)]
    return grid(head, body, fmt, title=title, note=_note(found, body)) if body else ""


def _method(method: str, rule: str) -> str:
    name, _, k = rule.partition("@")
    return display(method) if rule == GREEDY else f"{display(method)} + {RULES[name]}@{k}"


def _text(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    low, high = score["ci95"]
    doubt = ""
    if not score["is_baseline"] and not score["significant_against_baseline"]:
        is_compared = score["significant_against_baseline"] is not None
        doubt = f" {NOT_SIGNIFICANT if is_compared else NOT_COMPARED}"
    paper = "" if score["paper"] is None else f" [{score['paper']:g}]"
    return f"{100 * score['accuracy']:.1f} ± {50 * (high - low):.1f}{doubt}{paper}"


def _mean(scores: Sequence[Mapping[str, Any] | None]) -> str:
    values = [score["accuracy"] for score in scores if score is not None]
    return f"{100 * sum(values) / len(values):.1f}" if len(values) == len(scores) else "–"


def _note(found: Sequence[Cell], body: Sequence[Sequence[str]]) -> str:
    seeds = ", ".join(map(str, sorted({cell["seeds"] for cell in found})))
    baselines = ", ".join(dict.fromkeys(display(cell["baseline"]) for cell in found))
    own = " (each task's own baseline)" if "," in baselines else ""
    paper = (
        " In brackets: the paper's accuracy for the same model, task, rationale and number of test"
        " questions, if the paper reports one."
    )
    return (
        "Percent of problems solved, ± half the width of the 95% interval. Number of seeds:"
        f" {seeds}. {NOT_SIGNIFICANT}: not significantly different from {baselines}{own} on the"
        f" same problems; {NOT_COMPARED}: not compared.{paper * _has_paper(body)}"
    )
