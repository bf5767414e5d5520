"""The paper's tables from run folders: sizes, accuracy of each method on each task, votes; the
paper's numbers beside ours.

Source: ReFT (arXiv:2401.08967), published version: Tables 1, 2, 3, 4, 5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.errors import DataError
from reftune.results.records import RunResults, read_run, require_finished
from reftune.results.summary import (
    GREEDY,
    Group,
    MethodScore,
    ScoreTable,
    display,
    group_runs,
    read_groups,
    score_table,
)
from reftune.results.tables import NOT_SIGNIFICANT, grid
from reftune.storage.run_folder import RunFolder

RATIONALES = {"nl": "N-CoT", "program": "P-CoT"}
MODELS = {
    "facebook/galactica-6.7b": "Galactica-6.7B",
    "codellama/CodeLlama-7b-hf": "CodeLLAMA-7B",
    "facebook/galactica-125m": "Galactica-125M",
    "codeparrot/codeparrot-small": "Codeparrot-small",
    "Salesforce/codegen-350M-mono": "Codegen-350M",
}
TASKS = {
    "gsm8k": "GSM8K",
    "svamp": "SVAMP",
    "mathqa choice": "MathQA-MCQ",
    "mathqa numeric": "MathQA-numeric",
}
TASK_ORDER = ("GSM8K", "SVAMP", "MathQA-MCQ", "MathQA-numeric")
SIZES = {
    ("GSM8K", "N-CoT"): (7465, 1319),
    ("GSM8K", "P-CoT"): (7356, 1319),
    ("SVAMP", "N-CoT"): (3076, 1000),
    ("SVAMP", "P-CoT"): (3043, 1000),
    ("MathQA-MCQ", "N-CoT"): (14862, 1605),
    ("MathQA-MCQ", "P-CoT"): (15250, 1605),
    ("MathQA-numeric", "N-CoT"): (8955, 1605),
    ("MathQA-numeric", "P-CoT"): (7672, 1605),
}
"""Task → training and test questions in the paper's Table 1."""

_MAIN = [
    ("GSM8K", "N-CoT"),
    ("GSM8K", "P-CoT"),
    ("SVAMP", "N-CoT"),
    ("SVAMP", "P-CoT"),
    ("MathQA-MCQ", "N-CoT"),
    ("MathQA-MCQ", "P-CoT"),
]
_TABLE_2: dict[tuple[str, str], Sequence[float | None]] = {
    ("Galactica-6.7B", "sft"): (42.68, 58.83, 54.50, 70.09, 58.07, 64.61),
    ("Galactica-6.7B", "reft"): (48.14, 68.91, 61.40, 74.09, 58.13, 70.47),
    ("CodeLLAMA-7B", "sft"): (43.59, 63.68, 58.09, 75.40, 56.01, 64.79),
    ("CodeLLAMA-7B", "online_st"): (None, 67.85, None, None, None, None),
    ("CodeLLAMA-7B", "reft"): (53.30, 75.28, 64.50, 79.19, 60.13, 71.83),
}
"""None: not known well enough to be quoted."""
_TABLE_3 = {
    "Galactica-6.7B": {"sft": 40.08, "offline_st": 44.23, "online_st": 43.78, "reft": 45.23},
    "CodeLLAMA-7B": {"sft": 37.32, "offline_st": 41.24, "online_st": 38.06, "reft": 42.24},
}
_TABLE_4 = {
    ("Galactica-6.7B", "sft", "maj"): (52.8, 62.9),
    ("Galactica-6.7B", "reft", "maj"): (58.5, 71.8),
    ("Galactica-6.7B", "sft", "rerank"): (57.5, 73.4),
    ("Galactica-6.7B", "reft", "rerank"): (59.2, 76.4),
    ("CodeLLAMA-7B", "sft", "maj"): (53.5, 68.0),
    ("CodeLLAMA-7B", "reft", "maj"): (63.2, 78.0),
    ("CodeLLAMA-7B", "sft", "rerank"): (62.9, 77.0),
    ("CodeLLAMA-7B", "reft", "rerank"): (66.0, 81.2),
}
_TABLE_5 = {
    ("Galactica-125M", "sft"): (23.7, 35.6, 58.4),
    ("Galactica-125M", "reft"): (29.8, 39.4, 60.7),
    ("Codegen-350M", "sft"): (20.4, 34.4, 56.4),
    ("Codegen-350M", "reft"): (28.4, 39.3, 59.1),
}
RULES = {"maj": "voting", "rerank": "reranking"}


def _published() -> dict[tuple[str, str, str, str, str], float]:
    """(model, task, rationale, method, rule) → accuracy in percent."""
    found: dict[tuple[str, str, str, str, str], float] = {}
    for (model, method), row in _TABLE_2.items():
        for (task, rationale), number in zip(_MAIN, row, strict=True):
            if number is not None:
                found[model, task, rationale, method, GREEDY] = number
    for model, methods in _TABLE_3.items():
        found |= {
            (model, "MathQA-numeric", "N-CoT", method, GREEDY): number
            for method, number in methods.items()
        }
    for (model, method, rule), pair in _TABLE_4.items():
        for rationale, number in zip(RATIONALES.values(), pair, strict=True):
            found[model, "GSM8K", rationale, method, f"{rule}@100"] = number
    for (model, method), numbers in _TABLE_5.items():
        for task, number in zip(TASK_ORDER, numbers, strict=False):
            found[model, task, "P-CoT", method, GREEDY] = number
    return found


PUBLISHED = _published()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Runs of one model on one task with one kind of rationale."""

    model: str
    task: str
    rationale: str
    group: Group
    scores: ScoreTable

    @property
    def column(self) -> tuple[str, str]:
        return (self.task, self.rationale)

    def published(self, method: str, rule: str) -> float | None:
        """The paper's number, in percent, where the experiment is the same: model, task, rationale
        and all test questions."""
        sizes = SIZES.get(self.column)
        if (
            sizes is None
            or self.scores.split != "test"
            or self.scores.methods[0].greedy.n != sizes[1]
        ):
            return None
        return PUBLISHED.get((self.model, self.task, self.rationale, method, rule))


def is_several_tasks(runs: Sequence[RunResults]) -> bool:
    """Whether runs differ in their task or kind of rationale, so that one table of methods cannot
    hold them."""
    return len({(_task(run), _rationale(run)) for run in runs}) > 1


def read_cells(run_dirs: Sequence[Path | str], *, k: int | None = None) -> list[Cell]:
    """The runs by model, task and rationale, seeds together; votes over the first `k` samples.

    Raises: DataError if `k` exceeds the samples of a problem, where a run is missing, damaged or
    unfinished, and where two recipes would fill one place.
    """
    runs = [read_run(folder) for folder in run_dirs]
    for run in runs:
        require_finished(run)
    places: dict[tuple[str, str, str], list[RunResults]] = {}
    for run in runs:
        places.setdefault((_model(run), _task(run), _rationale(run)), []).append(run)
    return [
        _cell(place, found, k)
        for place, found in sorted(places.items(), key=lambda item: _order(*item[0]))
    ]


def _cell(place: tuple[str, str, str], runs: Sequence[RunResults], k: int | None) -> Cell:
    groups = group_runs(runs)
    if len(groups) > 1:
        first, second = groups[0].runs[0].folder, groups[1].runs[0].folder
        raise DataError(
            f"{first} and {second}: two recipes for {', '.join(place)}; expected runs that differ"
            " in the seed only"
        )
    (group,) = read_groups([run.folder for run in runs])
    model, task, rationale = place
    return Cell(
        model=model, task=task, rationale=rationale, group=group, scores=score_table([group], k=k)
    )


def _order(model: str, task: str, rationale: str) -> tuple[Any, ...]:
    known = list(MODELS.values())
    tasks = list(TASK_ORDER)
    return (
        known.index(model) if model in known else len(known),
        model,
        tasks.index(task) if task in tasks else len(tasks),
        task,
        rationale,
    )


def _table_of(run: RunResults, key: str) -> Mapping[str, Any]:
    value = run.recipe.get(key)
    return value if isinstance(value, Mapping) else {"kind": str(value or "")}


def _model(run: RunResults) -> str:
    path = _table_of(run, "model").get("path")
    return "from scratch" if not path else MODELS.get(str(path), str(path))


def _task(run: RunResults) -> str:
    dataset = _table_of(run, "dataset")
    kind, answer = str(dataset.get("kind")), dataset.get("answer")
    name = kind if answer in (None, "number") else f"{kind} {answer}"
    return TASKS.get(name, name.replace("_", " "))


def _rationale(run: RunResults) -> str:
    kind = str(_table_of(run, "format").get("kind"))
    return RATIONALES.get(kind, kind)


# --- the tables -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table as text."""

    title: str
    head: list[str]
    body: list[list[str]]
    note: str


def tables(cells: Sequence[Cell]) -> list[Grid]:
    """Sizes, greedy accuracy and, where problems were sampled, votes and reranking."""
    grids = [sizes_grid(cells), accuracy_grid(cells)]
    return [*grids, *([votes] if (votes := votes_grid(cells)).body else [])]


def sizes_grid(cells: Sequence[Cell]) -> Grid:
    """Questions by split, the paper's beside."""
    columns = list({cell.column: cell for cell in cells}.values())
    body = [
        [
            f"{split} questions",
            *(_size_text(cell, split, SIZES.get(cell.column)) for cell in columns),
        ]
        for split in ("train", "dev", "test")
    ]
    return Grid(
        title="Questions",
        head=["", *(" ".join(cell.column) for cell in columns)],
        body=body,
        note="In brackets: the paper's.",
    )


def _size_text(cell: Cell, split: str, paper: tuple[int, int] | None) -> str:
    size = data_sizes(cell).get(split)
    beside = {} if paper is None else {"train": paper[0], "test": paper[1]}
    ours = "–" if size is None else f"{size:,}"
    return f"{ours} [{beside[split]:,}]" if split in beside else ours


def data_sizes(cell: Cell) -> dict[str, int]:
    """Split → problems, from the run's `data.json`; training problems are those with a
    rationale."""
    path = RunFolder(cell.group.runs[0].folder).data
    if not path.is_file():
        return {}
    sizes: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["problems"]
    return sizes


def accuracy_grid(cells: Sequence[Cell]) -> Grid:
    """A row a model and method, a column a task and rationale, and averages where there are several
    tasks."""
    return _grid(cells, lambda cell: [GREEDY], title="Accuracy, greedy")


def votes_grid(cells: Sequence[Cell]) -> Grid:
    """Voting and reranking over all samples that every problem has."""
    return _grid(
        cells,
        lambda cell: [rule for rule in _rules(cell) if rule.partition("@")[0] in RULES],
        title="Votes",
    )


def _rules(cell: Cell) -> list[str]:
    return list(dict.fromkeys(rule for method in cell.scores.methods for rule in method.scores))


def _grid(cells: Sequence[Cell], rules_of: Callable[[Cell], list[str]], *, title: str) -> Grid:
    columns = sorted({cell.column for cell in cells}, key=lambda column: _order("", *column))
    rows = dict.fromkeys(
        (c.model, m.method, r)
        for c in cells
        for m in c.scores.methods
        for r in rules_of(c)
        if r in m.scores
    )
    by_place = {(cell.model, *cell.column): cell for cell in cells}
    rationales = [
        r
        for r in RATIONALES.values()
        if len({task for task, rationale in columns if rationale == r}) > 1
    ]
    body = []
    for model, method, rule in rows:
        found = [_lookup(by_place.get((model, *column)), method, rule) for column in columns]
        means = [
            _mean_text([f for f, c in zip(found, columns, strict=True) if c[1] == r])
            for r in rationales
        ]
        body.append(
            [model, _method_title(method, rule), *(_text(entry) for entry in found), *means]
        )
    head = [
        "Model",
        "Method",
        *(" ".join(column) for column in columns),
        *(f"Average {r}" for r in rationales),
    ]
    return Grid(title=title, head=head, body=body, note=_note(cells))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    score: float
    ci95: tuple[float, float]
    doubtful: bool
    """The difference from SFT in the same runs may be chance."""
    paper: float | None


def _lookup(cell: Cell | None, method: str, rule: str) -> _Entry | None:
    if cell is None:
        return None
    scored = next((m for m in cell.scores.methods if m.method == method and rule in m.scores), None)
    if scored is None:
        return None
    score = scored.scores[rule]
    return _Entry(
        score=score.value,
        ci95=score.ci95,
        doubtful=_is_doubtful(cell, scored, rule),
        paper=cell.published(method, rule),
    )


def _is_doubtful(cell: Cell, method: MethodScore, rule: str) -> bool:
    suffix = "" if rule == GREEDY else f" {rule}"
    against = cell.scores.between(f"{method.label}{suffix}", f"{cell.scores.baseline}{suffix}")
    return against is not None and not against.significant


def _text(entry: _Entry | None) -> str:
    if entry is None:
        return "–"
    doubt = f" {NOT_SIGNIFICANT}" if entry.doubtful else ""
    paper = "" if entry.paper is None else f" [{entry.paper:g}]"
    return f"{100 * entry.score:.1f} ± {50 * (entry.ci95[1] - entry.ci95[0]):.1f}{doubt}{paper}"


def _mean_text(entries: Sequence[_Entry | None]) -> str:
    whole = [entry for entry in entries if entry is not None]
    return (
        f"{100 * sum(entry.score for entry in whole) / len(whole):.1f}"
        if whole and len(whole) == len(entries)
        else "–"
    )


def _method_title(method: str, rule: str) -> str:
    name, _, k = rule.partition("@")
    return display(method) if rule == GREEDY else f"{display(method)} + {RULES[name]}@{k}"


def _note(cells: Sequence[Cell]) -> str:
    seeds = sorted({cell.scores.num_seeds for cell in cells})
    base = display(cells[0].scores.baseline)
    return (
        "Percent of test problems, ± half of the 95 % interval, seeds:"
        f" {', '.join(map(str, seeds))}. {NOT_SIGNIFICANT}: not significantly different from {base}"
        " on the same problems. In brackets: the paper's number where model, task, rationale and"
        " test questions are the same."
    )


def render(cells: Sequence[Cell], fmt: str) -> str:
    """`text`, `markdown`, `latex` or `json`. Raises: DataError for an unknown format."""
    if fmt == "json":
        return json.dumps([_cell_json(cell) for cell in cells], indent=2)
    return "\n\n".join(
        grid(each.head, each.body, fmt, title=each.title, note=each.note) for each in tables(cells)
    )


def _cell_json(cell: Cell) -> dict[str, Any]:
    methods = {
        method.method: {
            rule: {
                "accuracy": score.value,
                "ci95": list(score.ci95),
                "n": score.n,
                "by_seed": list(score.by_seed),
                "significant_against_baseline": (
                    None
                    if method.label == cell.scores.baseline
                    else not _is_doubtful(cell, method, rule)
                ),
                "paper": cell.published(method.method, rule),
            }
            for rule, score in method.scores.items()
        }
        for method in cell.scores.methods
    }
    return {
        "model": cell.model,
        "task": cell.task,
        "rationale": cell.rationale,
        "seeds": cell.scores.num_seeds,
        "problems": data_sizes(cell),
        "methods": methods,
    }
