"""Evaluates a model: grades and stores its greedy answers and, optionally, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reftune.model.policy import Policy
from reftune.recipe import Recipe
from reftune.seeds import derive_seed
from reftune.stages.rollouts import Collector
from reftune.storage.files import in_parts
from reftune.types import Attempt, Completion, Graded, Problem, Verdict

PROBLEMS_AT_ONCE = 250
"""Number of problems in a part."""


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    collector: Collector,
    recipe: Recipe,
    *,
    method: str,
    path: Path,
) -> list[dict[str, Any]]:
    """Answer `problems` in parts, write the answers to `path`, and return all rows. Every sample is
    a function of the weights, the recipe, the method's name and the problem's position, so
    interruptions change nothing."""

    def answer(start: int, part: Sequence[Problem]) -> list[dict[str, Any]]:
        seed = derive_seed(recipe.seed, method, "evaluate", start)
        num_samples = recipe.evaluate.num_samples(method)
        return _answer(policy, part, collector, recipe, num_samples=num_samples, seed=seed)

    return in_parts(problems, path, answer, at_once=PROBLEMS_AT_ONCE)


def _answer(
    policy: Policy,
    problems: Sequence[Problem],
    collector: Collector,
    recipe: Recipe,
    *,
    num_samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    greedy = collector.solve(policy, problems)
    rows = [
        {
            "id": problem.id,
            "question": problem.question,
            "gold": str(problem.answer),
            "prompt_tokens": len(prompt),
            "greedy": {
                **_attempt(completion, graded).to_row(),
                "tokens": len(completion.token_ids),
            },
        }
        for problem, prompt, completion, graded in zip(
            problems, greedy.prompts, greedy.completions, greedy.graded, strict=True
        )
    ]
    if num_samples == 0:
        return rows
    sampled = collector.solve(
        policy,
        [p for p in problems for _ in range(num_samples)],
        temperature=recipe.evaluate.temperature,
        top_k=recipe.evaluate.top_k,
        seed=seed,
    )
    answers = [
        _attempt(completion, graded).to_row()
        for completion, graded in zip(sampled.completions, sampled.graded, strict=True)
    ]
    return [
        {**row, "samples": answers[i * num_samples : (i + 1) * num_samples]}
        for i, row in enumerate(rows)
    ]


def _attempt(completion: Completion, graded: Graded) -> Attempt:
    timeless = replace(graded, program_s=None)  # so that a repeated evaluation writes the same file
    return Attempt(
        completion=completion.text, graded=timeless, finish_reason=completion.finish_reason
    )


def accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """The share of greedy answers that are right."""
    verdicts: list[str] = [row["greedy"]["verdict"] for row in rows]
    return verdicts.count(Verdict.CORRECT.value) / len(verdicts)
