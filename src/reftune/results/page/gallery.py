"""Which problems and sampled solutions the report carries, within a budget of bytes, as plain data
for the page's script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from reftune.results.page.charts import entry_labels, method_colours
from reftune.results.records import TrainingSample
from reftune.results.summary import Group, display
from reftune.types import Attempt

MAX_TEXT = 6_000
"""Characters of one text; the rest stays in the run folder."""
PROBLEMS_BYTES = 1_400_000
SAMPLES_BYTES = 2_000_000
MAX_PROBLEMS = 2_000
MAX_SAMPLES = 1_200
EXTREMES = 12
"""Longest and slowest samples of a stage that are there in any case."""

Json = dict[str, Any]


def problems(groups: Sequence[Group]) -> Json:
    """The same test problems, side by side: what each method answered, first seed of each group.

    Problems on which methods disagree come first into the budget; all are shown in the order of the
    evaluation.
    """
    labels = [(group, name) for group in groups for name in group.methods]
    names = _evaluated_labels(groups)
    colours = method_colours(names)
    columns = [group.runs[0].evals[name] for group, name in labels]
    if not columns:
        return {"methods": [], "rows": [], "total": 0}
    rows = list(zip(*columns, strict=True))
    order = sorted(
        range(len(rows)), key=lambda index: len({row.greedy.correct for row in rows[index]}) == 1
    )
    packed = {index: _problem(rows[index]) for index in order[:MAX_PROBLEMS]}
    kept = sorted(_within(order[:MAX_PROBLEMS], packed, PROBLEMS_BYTES))
    return {
        "methods": [{"label": display(name), "colour": colours[name]} for name in names],
        "rows": [packed[index] for index in kept],
        "total": len(rows),
    }


def samples(groups: Sequence[Group]) -> Json:
    """Solutions sampled in training, spread evenly over the steps of each stage."""
    labels = entry_labels(groups)
    colours = method_colours(labels)
    by_label = dict(
        zip(
            labels,
            ((group, name) for group in groups for name in group.runs[0].stages),
            strict=True,
        )
    )
    pools = [
        (index, run.seed, run.stages[name].samples)
        for index, (group, name) in enumerate(by_label.values())
        for run in group.runs
        if name in run.stages and run.stages[name].samples
    ]
    each = MAX_SAMPLES // len(pools) if pools else 0
    chosen = [
        _sample(pool[place], index, seed)
        for index, seed, pool in pools
        for place in _spread(pool, each)
    ]
    extreme = {*_largest(chosen, "tokens"), *_largest(chosen, "program_s")}
    order = sorted(_interleaved(range(len(chosen))), key=lambda place: place not in extreme)
    kept = sorted(_within(order, dict(enumerate(chosen)), SAMPLES_BYTES))
    return {
        "methods": [{"label": display(label), "colour": colours[label]} for label in labels],
        "rows": [chosen[index] for index in kept],
        "total": sum(len(pool) for _, _, pool in pools),
    }


def _evaluated_labels(groups: Sequence[Group]) -> list[str]:
    return [
        f"{group.label}/{name}" if len(groups) > 1 else name
        for group in groups
        for name in group.methods
    ]


def _within(order: Iterable[int], packed: dict[int, Json], budget: int) -> list[int]:
    kept = []
    for index in order:
        budget -= len(json.dumps(packed[index]))
        if budget < 0:
            break
        kept.append(index)
    return kept


def _interleaved(indices: Sequence[int]) -> list[int]:
    """Every 16th, then the ones between: wherever it is cut off, what was taken is spread over the
    whole."""
    return sorted(indices, key=lambda index: (index % 16 != 0, index % 4 != 0, index % 2 != 0))


def _spread(pool: Sequence[TrainingSample], count: int) -> list[int]:
    """Places of samples evenly apart, and of the longest and slowest."""
    if len(pool) <= count:
        return list(range(len(pool)))
    attempts = [
        {"tokens": sample.attempt.num_tokens, "program_s": sample.attempt.graded.program_s}
        for sample in pool
    ]
    extreme = {*_largest(attempts, "tokens"), *_largest(attempts, "program_s")}
    return sorted(extreme | {index * len(pool) // count for index in range(count)})


def _largest(rows: Sequence[Json], key: str) -> list[int]:
    """Places of the `EXTREMES` rows with most of `key`, the first of equal ones first."""
    return sorted(
        (place for place, row in enumerate(rows) if row[key]), key=lambda place: -rows[place][key]
    )[:EXTREMES]


def _problem(rows: Sequence[Any]) -> Json:
    first = rows[0]
    return {
        "id": first.id,
        "question": _cut(first.question),
        "gold": _cut(first.gold),
        "answers": [_answer(row.greedy) for row in rows],
    }


def _answer(attempt: Attempt) -> Json:
    return {
        "text": _cut(attempt.completion),
        "verdict": attempt.graded.verdict.value,
        "value": None if attempt.graded.value is None else _cut(attempt.graded.value),
        "reason": _cut(attempt.graded.reason),
        "reward": _finite(attempt.reward),
        "tokens": attempt.num_tokens,
        "cut": attempt.finish_reason == "length",
    }


def _sample(sample: TrainingSample, method: int, seed: int) -> Json:
    row = _answer(sample.attempt) | {
        "method": method,
        "seed": seed,
        "step": sample.step,
        "program_s": sample.attempt.graded.program_s,
        "id": sample.id,
        "question": _cut(sample.question),
        "gold": _cut(sample.gold),
    }
    if (
        sample.tokens
        and len(sample.tokens) == len(sample.logprobs)
        and len(sample.attempt.completion) <= MAX_TEXT
    ):
        row["pieces"] = list(sample.tokens)
        row["logprobs"] = [
            round(logprob, 3) if math.isfinite(logprob) else None for logprob in sample.logprobs
        ]
    return row


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= MAX_TEXT
        else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
