"""Chooses the problems and sampled solutions that the report shows, so that they fit in a budget of
bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from reftune.results.page.charts import entries, method_colours
from reftune.results.records import EvalRow, TrainingSample
from reftune.results.summary import Group, MethodScore
from reftune.results.tables import display
from reftune.types import Attempt

MAX_TEXT = 6_000
"""Maximum length of a string in the page, in characters. The run folder has the full text."""
PROBLEMS_BYTES = 1_400_000
SAMPLES_BYTES = 2_000_000
MAX_PROBLEMS = 2_000
MAX_SAMPLES = 1_200
EXTREMES = 12
"""Before all others, this many of a stage's longest samples are chosen, and this many of the
samples whose programs ran longest."""

Json = dict[str, Any]


def problems(methods: Sequence[MethodScore]) -> Json:
    """Problems from the final evaluation, each with the greedy answer of every method. If there are
    several seeds, the answers come from the first seed.

    Problems that some methods solved and others did not are chosen first. The chosen problems are
    shown in the evaluation's order.
    """
    colours = method_colours([method.label for method in methods])
    columns = [method.group.runs[0].evals[method.method] for method in methods]
    rows = list(zip(*columns, strict=True))
    agreed = [len({row.greedy.correct for row in problem}) == 1 for problem in rows]
    order = sorted(range(len(rows)), key=agreed.__getitem__)
    packed = (
        (i, _asked(rows[i][0]) | {"answers": [_answer(row.greedy) for row in rows[i]]})
        for i in order[:MAX_PROBLEMS]
    )
    return {
        "methods": [{"label": display(name), "colour": colour} for name, colour in colours.items()],
        "rows": _within(packed, PROBLEMS_BYTES),
        "total": len(rows),
    }


def samples(groups: Sequence[Group]) -> Json:
    """Solutions sampled in training, chosen in rounds: in each round, every stage of every run
    adds one solution. A stage first adds its longest solutions and those whose programs ran
    longest, then others that are spread evenly over its steps."""
    stages = entries(groups)
    pools = [
        (index, run.seed, run.stages[entry.method].samples)
        for index, entry in enumerate(stages)
        for run in entry.group.runs
    ]
    turns = sorted(
        (turn, number, place)
        for number, (_, _, pool) in enumerate(pools)
        for turn, place in enumerate(_order(pool))
    )
    chosen = [(number, place) for _, number, place in turns[:MAX_SAMPLES]]
    wanted = set(chosen)
    # read again, because only the chosen samples fit in memory
    rows = {
        (number, place): _sample(sample, method, seed)
        for number, (method, seed, pool) in enumerate(pools)
        for place, sample in enumerate(pool)
        if (number, place) in wanted
    }
    return {
        "methods": [{"label": entry.name, "colour": entry.colour} for entry in stages],
        "rows": _within(((key, rows[key]) for key in chosen if key in rows), SAMPLES_BYTES),
        "total": len(turns),
    }


def _within(rows: Iterable[tuple[Any, Json]], budget: int) -> list[Json]:
    """As many of the first `rows` as fit in `budget` bytes. The result is sorted by key."""
    kept = {}
    for key, row in rows:
        budget -= len(json.dumps(row))
        if budget < 0:
            break
        kept[key] = row
    return [kept[key] for key in sorted(kept)]


def _order(pool: Iterable[TrainingSample]) -> list[int]:
    """Indices of samples in the order in which to include them. The longest samples and those whose
    programs ran longest come first. The others follow in rounds: first every 2ⁿ-th sample for a
    large n, then the same for each smaller n. Even the first rounds are therefore spread over the
    whole stage."""
    costs = [
        (sample.attempt.num_tokens or 0, sample.attempt.graded.program_s or 0.0) for sample in pool
    ]
    places = range(len(costs))
    extreme = {
        place
        for kind in (0, 1)
        for place in sorted(places, key=lambda place: -costs[place][kind])[:EXTREMES]
        if costs[place][kind]
    }
    return sorted(
        places, key=lambda place: (place not in extreme, -(place & -place or len(places)))
    )


def _asked(row: EvalRow | TrainingSample) -> Json:
    return {"id": row.id, "question": _cut(row.question), "gold": _cut(row.gold)}


def _answer(attempt: Attempt) -> Json:
    return {
        "text": _cut(attempt.completion),
        "verdict": attempt.graded.verdict.value,
        "value": None if attempt.graded.value is None else _cut(attempt.graded.value),
        "reason": _cut(attempt.graded.reason),
        "reward": attempt.reward if math.isfinite(attempt.reward or 0) else None,
        "tokens": attempt.num_tokens,
        "cut": attempt.finish_reason == "length",
    }


def _sample(sample: TrainingSample, method: int, seed: int) -> Json:
    seconds = sample.attempt.graded.program_s
    where = {"method": method, "seed": seed, "step": sample.step, "program_s": seconds}
    row = _answer(sample.attempt) | where | _asked(sample)
    is_whole = len(sample.attempt.completion) <= MAX_TEXT
    if is_whole and 0 < len(sample.tokens) == len(sample.logprobs):
        row["pieces"] = list(sample.tokens)
        row["logprobs"] = [round(x, 3) if math.isfinite(x) else None for x in sample.logprobs]
    return row


def _cut(text: str) -> str:
    rest = len(text) - MAX_TEXT
    return text if rest <= 0 else f"{text[:MAX_TEXT]}… ({rest:,} more characters)"
